"""Laws of the chat format that the golden conversations do not show: user text cannot forge markers, prompts that are
too long keep what matters, replies are read back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.text.conversation import (
    Prompt,
    colored,
    parse_reply,
    render,
    render_for_completion,
    render_prompt,
)
from nanochat_ray.text.tokenizer import SPECIAL_TOKENS, Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(iter(["the cat and the dog and the bird"]), 270)


texts = st.lists(st.sampled_from([*SPECIAL_TOKENS, "the", " cat", "12", "\n", "\ud83d", "é"]), max_size=5).map("".join)
kinds = st.sampled_from(["text", "python", "python_output"])
parts = st.lists(st.fixed_dictionaries({"type": kinds, "text": texts}), max_size=4)
turns = st.lists(st.tuples(texts, texts | parts), min_size=1, max_size=4)
systems = st.none() | texts


def chat(turns: list, system: str | None = None) -> list[dict]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


@given(turns=turns, system=systems, limit=st.integers(1, 80))
def test_markers_stand_only_where_the_format_puts_them(
    tokenizer: Tokenizer, turns: list, system: str | None, limit: int
) -> None:
    messages = chat(turns, system)
    before = copy.deepcopy(messages)
    ids, mask = render(tokenizer, {"messages": messages}, 10**6)
    used = [part["type"] for _, answer in turns if isinstance(answer, list) for part in answer]
    count = {name: ids.count(token) for name, token in tokenizer.special.items()}
    assert count["<|bos|>"] == 1 and ids[0] == tokenizer.bos_id
    for who in ("user", "assistant"):
        assert count[f"<|{who}_start|>"] == count[f"<|{who}_end|>"] == len(turns)
    assert count["<|python_start|>"] == count["<|python_end|>"] == used.count("python")
    assert count["<|output_start|>"] == count["<|output_end|>"] == used.count("python_output")
    assert len(ids) == len(mask) and set(mask) <= {0, 1}
    trained = [token for token, m in zip(ids, mask, strict=True) if m]
    wanted = [
        token
        for _, answer in turns
        for part in ([{"type": "text", "text": answer}] if isinstance(answer, str) else answer)
        if part["type"] != "python_output"
        for token in (
            tokenizer.encode(part["text"], "<|python_start|>", "<|python_end|>")
            if part["type"] == "python"
            else tokenizer.encode(part["text"])
        )
    ]
    end = tokenizer.encode_special("<|assistant_end|>")
    assert [token for token in trained if token != end] == wanted
    assert trained.count(end) == len(turns)
    assert render(tokenizer, messages, limit) == (ids[:limit], mask[:limit])
    assert messages == before


@given(turns=turns, system=systems, question=texts, limit=st.integers(5, 80))
def test_a_prompt_drops_no_more_than_it_must(
    tokenizer: Tokenizer, turns: list, system: str | None, question: str, limit: int
) -> None:
    messages = [*chat(turns, system), {"role": "user", "content": question}]
    before = copy.deepcopy(messages)
    prompt = render_prompt(tokenizer, messages, limit)
    assert len(prompt.ids) <= limit
    start = tokenizer.encode_special("<|assistant_start|>")

    def rest(dropped: int) -> list[int]:
        kept = [*chat(turns[dropped:], system), messages[-1]]
        return [*render(tokenizer, kept, 10**6)[0], start]

    if prompt.dropped_tokens == 0:
        assert prompt.ids == rest(prompt.dropped_turns)
    else:
        assert prompt.dropped_turns == len(turns)
        whole = rest(len(turns))
        assert len(whole) - prompt.dropped_tokens == len(prompt.ids) == limit
        assert prompt.ids == whole[:2] + whole[2 + prompt.dropped_tokens :]
    if prompt.dropped_turns:
        assert len(rest(prompt.dropped_turns - 1)) > limit
    assert render_for_completion(tokenizer, [*messages, {"role": "assistant", "content": "x"}], limit) == prompt.ids
    assert messages == before


def test_the_system_text_outlives_the_oldest_turns(tokenizer: Tokenizer) -> None:
    messages = [*chat([("the cat" * 30, "no"), ("the dog", "yes")], "be brief"), {"role": "user", "content": "bird"}]
    prompt = render_prompt(tokenizer, messages, 60)
    assert prompt.dropped_turns == 1 and prompt.dropped_tokens == 0
    assert "be brief\n\nthe dog" in tokenizer.decode(prompt.ids)


def test_a_prompt_ends_with_a_question(tokenizer: Tokenizer) -> None:
    question = [{"role": "user", "content": "a"}]
    answered = [*question, {"role": "assistant", "content": "b"}]
    assert render_prompt(tokenizer, question) == Prompt(render_for_completion(tokenizer, answered), 0, 0)
    with pytest.raises(ValueError, match="no question"):
        render_prompt(tokenizer, answered)
    with pytest.raises(ValueError, match="no room"):
        render_prompt(tokenizer, question, 4)


@given(answer=parts, question=texts)
def test_a_reply_read_back_renders_to_the_same_ids(tokenizer: Tokenizer, answer: list, question: str) -> None:
    ids, _ = render(tokenizer, chat([(question, answer)]), 10**6)
    reply = ids[ids.index(tokenizer.encode_special("<|assistant_start|>")) + 1 :]
    read = parse_reply(tokenizer, reply)
    assert render(tokenizer, chat([(question, read)]), 10**6)[0] == ids
    assert parse_reply(tokenizer, reply[:-1]) == read  # the end of the reply need not be there
    assert parse_reply(tokenizer, [*reply, tokenizer.bos_id, *reply]) == read


@given(ids=st.lists(st.integers(100, 269) | st.integers(261, 269), max_size=12))
def test_any_tokens_at_all_can_be_read_and_rendered(tokenizer: Tokenizer, ids: list[int]) -> None:
    again = render(tokenizer, chat([("q", parse_reply(tokenizer, ids))]))[0]
    for kind in ("python", "output"):
        assert again.count(tokenizer.special[f"<|{kind}_start|>"]) == again.count(tokenizer.special[f"<|{kind}_end|>"])


def test_a_reply_that_ran_out_of_room(tokenizer: Tokenizer) -> None:
    s, e = tokenizer.special, tokenizer.encode
    ids = [*e("so "), s["<|python_start|>"], *e("1+1"), s["<|python_end|>"], s["<|output_start|>"], *e("2")]
    python, output = {"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}
    assert parse_reply(tokenizer, ids) == [{"type": "text", "text": "so "}, python, output]
    assert parse_reply(tokenizer, [s["<|python_end|>"], *e("a"), s["<|user_end|>"]]) == [{"type": "text", "text": "a"}]
    assert parse_reply(tokenizer, []) == []


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        ({"text": "a"}, "messages"),
        ("a", "list"),
        ({"messages": None}, "list"),
        ([], "at least one"),
        (["a"], "mapping"),
        ([{"role": "user"}], "role and content"),
        ([{"role": "user", "content": None}], "string"),
        ([{"role": "system", "content": ["a"]}, {"role": "user", "content": "a"}], "system"),
        (chat([("a", None)]), "parts"),
        (chat([("a", {"type": "text"})]), "parts"),
        (chat([("a", [{"type": "text"}])]), "type"),
        (chat([("a", [{"type": "python", "text": 3}])]), "type"),
        (chat([("a", ["b"])]), "type"),
    ],
)
def test_what_is_wrong_is_said(tokenizer: Tokenizer, conversation: Any, reason: str) -> None:
    for function in (render, render_for_completion, render_prompt):
        with pytest.raises(ValueError, match=reason):
            function(tokenizer, conversation)


def test_colors(tokenizer: Tokenizer) -> None:
    assert colored(tokenizer, [97, 98], [1, 0]) == "\x1b[32ma\x1b[0m|\x1b[31mb\x1b[0m"

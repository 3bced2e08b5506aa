"""Conversation rendering against conversations.json; ids and masks exact."""

from __future__ import annotations

import copy

import pytest

from nanochat_ray.text.conversation import parse_reply, render, render_for_completion
from nanochat_ray.text.tokenizer import Tokenizer
from tests.parity.goldens import load_json
from tests.parity.test_tokenizer import golden_tokenizer

GOLDEN = load_json("conversations")
CASES = pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    assert GOLDEN["tokenizer"] == "tokenizer_2048.json"
    return golden_tokenizer(2048)


@CASES
@pytest.mark.parametrize("limit", [2048, 100, 10])
def test_render(tokenizer: Tokenizer, case: dict, limit: int) -> None:
    conversation = {"messages": case["messages"]}
    before = copy.deepcopy(conversation)
    ids, mask = render(tokenizer, conversation, limit)
    assert ids == case["ids"][:limit]
    assert "".join(map(str, mask)) == case["mask"][:limit]
    assert render(tokenizer, case["messages"], limit) == (ids, mask)
    assert conversation == before
    if limit == GOLDEN["default_max_tokens"]:
        assert render(tokenizer, conversation) == (ids, mask)


@CASES
def test_completion(tokenizer: Tokenizer, case: dict) -> None:
    """As the golden where the prompt fits. Where it does not: whole turns, balanced markers, within the limit."""
    before = copy.deepcopy(case["messages"])
    if "error" in case["completion"]:
        with pytest.raises(ValueError, match="user"):
            render_for_completion(tokenizer, case["messages"])
        return
    wanted = case["completion"]["value"]
    ids = render_for_completion(tokenizer, case["messages"])
    if len(wanted) <= 2048:
        assert ids == wanted
    for limit in (2048, 60, 24, 5):
        ids = render_for_completion(tokenizer, case["messages"], limit)
        assert_balanced_prompt(tokenizer, ids, limit)
        if len(wanted) <= limit:
            assert ids == wanted
    assert case["messages"] == before


def assert_balanced_prompt(tokenizer: Tokenizer, ids: list[int], limit: int) -> None:
    name = {token: special for special, token in tokenizer.special.items()}
    markers = [name[token] for token in ids if token in name]
    outside_tools = [marker for marker in markers if "python" not in marker and "output" not in marker]
    turn = ["<|user_start|>", "<|user_end|>", "<|assistant_start|>"]
    turns = outside_tools[1:].count("<|user_start|>")
    assert len(ids) <= limit
    assert ids[-1] == tokenizer.encode_special("<|assistant_start|>")
    assert outside_tools == ["<|bos|>", *[*turn, "<|assistant_end|>"] * (turns - 1), *turn]
    for kind in ("python", "output"):
        assert markers.count(f"<|{kind}_start|>") == markers.count(f"<|{kind}_end|>")


@CASES
def test_replies_survive_being_read_back(tokenizer: Tokenizer, case: dict) -> None:
    """Replacing every answer by the parts read from its tokens renders to the same ids."""
    answers = [
        {**message, "content": parse_reply(tokenizer, answer_ids(tokenizer, message["content"]))}
        if message["role"] == "assistant"
        else message
        for message in case["messages"]
    ]
    assert render(tokenizer, answers)[0] == case["ids"]


def answer_ids(tokenizer: Tokenizer, content: object) -> list[int]:
    ids, _ = render(tokenizer, [{"role": "user", "content": ""}, {"role": "assistant", "content": content}], 10**6)
    return ids[4:]  # BOS, two markers of the question, start of the answer


@pytest.mark.parametrize("case", GOLDEN["rejected"], ids=lambda case: case["name"])
def test_rejected(tokenizer: Tokenizer, case: dict) -> None:
    before = copy.deepcopy(case["messages"])
    with pytest.raises(ValueError):
        render(tokenizer, case["messages"])
    assert case["messages"] == before


def test_length_without_a_limit(tokenizer: Tokenizer) -> None:
    by_name = {case["name"]: case["messages"] for case in GOLDEN["cases"]}
    for name, length in GOLDEN["unlimited_length"].items():
        assert len(render(tokenizer, by_name[name], 10**6)[0]) == length

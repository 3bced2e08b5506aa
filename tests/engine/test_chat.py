"""A chat in plain text, with replies from a script or from a random network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import pytest

from nanochat_ray.config import ChatSettings
from nanochat_ray.engine.chat import ChatSession, ReplyText, chat_loop
from nanochat_ray.engine.engine import Engine
from nanochat_ray.text.conversation import render, render_prompt
from tests.engine.tiny import Script, byte_tokenizer, scripted_engine, tiny_model

TOKENIZER = byte_tokenizer()
SPECIAL = TOKENIZER.special
END = [SPECIAL["<|assistant_end|>"]]
COLD = ChatSettings(temperature=0.0, max_new_tokens=60)


def call(expression: str) -> list[int]:
    return [SPECIAL["<|python_start|>"], *expression.encode(), SPECIAL["<|python_end|>"]]


def result(text: str) -> list[int]:
    return [SPECIAL["<|output_start|>"], *text.encode(), SPECIAL["<|output_end|>"]]


def scripted(*replies: list[int], settings: ChatSettings = COLD, context: int = 192) -> tuple[ChatSession, Script]:
    script = Script(list(replies), context)
    return ChatSession(scripted_engine(script), TOKENIZER, settings), script


def shown(ids: list[int]) -> str:
    text = ReplyText(TOKENIZER)
    return "".join(text.feed(token) for token in ids) + text.finish()


WITH_TOOL = [*b"12 boxes: ", *call("12*7"), *result("84"), *" Das sind 84 Äpfel 🍎.".encode(), *END]


def test_text_comes_in_whole_characters() -> None:
    session, _ = scripted([*"né €🍎!".encode(), *END])
    assert list(session.reply("hi")) == ["n", "é", " ", "€", "🍎", "!"]


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        (WITH_TOOL, "12 boxes: [12*7 = 84] Das sind 84 Äpfel 🍎."),
        ([*b"a", *call("12*("), *b"b"], "a[12*(]b"),  # no result
        (call("1+1"), "[1+1]"),
        (call("1+1")[:-1], "[1+1]"),
        ([*call("9")[:-1], *call("1+1"), *result("2")], "[1+1 = 2]"),
        ([*call("2"), *call("3"), *result("3")], "[2][3 = 3]"),
        ([*result("5"), *b"x"], "[5]x"),
        ([*b"a", SPECIAL["<|python_end|>"], SPECIAL["<|user_end|>"], *b"b"], "ab"),
        ([*b"a", *list("🍎".encode())[:3]], "a"),
        ([*list("🍎".encode())[:2], *call("1")], "\ufffd[1]"),
        ([*call("1+1"), *END], "[1+1]"),
    ],
)
def test_tool_calls_are_shown_and_markers_hidden(ids: list[int], text: str) -> None:
    assert shown(ids) == text


def test_history_keeps_the_tool_calls() -> None:
    reply = [token for token in WITH_TOOL if token != END[0]]
    sampled = [*b"12 boxes: ", *call("12*7"), *b"????", *" Das sind 84 Äpfel 🍎.".encode(), *END]  # 4 are forced
    session, script = scripted(sampled, [*b"ok", *END])
    assert "".join(session.reply("how many?")) == shown(WITH_TOOL)
    assert "".join(session.reply("thanks")) == "ok"
    assert script.prompts[1][: len(script.prompts[0])] == script.prompts[0]
    assert script.prompts[1][len(script.prompts[0]) :][: len(reply) + 1] == reply + END
    assert session.messages[1]["content"][1:3] == [
        {"type": "python", "text": "12*7"},
        {"type": "python_output", "text": "84"},
    ]
    ids, _ = render(TOKENIZER, session.messages)
    assert ids == [*script.prompts[1], *b"ok", *END]


def test_text_of_special_tokens_is_ordinary_text() -> None:
    session, script = scripted([*b"ok", *END])
    list(session.reply("<|assistant_end|>"))
    assert SPECIAL["<|assistant_end|>"] not in script.prompts[0]


def test_oldest_turns_are_dropped_when_the_context_is_full() -> None:
    replies = [[*b"answer number ", 48 + k, *END] for k in range(8)]
    session, script = scripted(*replies, settings=COLD.model_copy(update={"system": "Be brief."}))
    dropped = []
    for k in range(8):
        assert "".join(session.reply(f"question {k}?")) == f"answer number {k}"
        dropped.append(session.dropped_turns)
        assert bool(session.notice) == (session.dropped_turns > 0)
        assert ("oldest question" in session.notice) == (session.dropped_turns > 0)
        prompt = script.prompts[-1]
        assert len(prompt) <= 192 - 60
        assert prompt.count(SPECIAL["<|user_start|>"]) == prompt.count(SPECIAL["<|user_end|>"])
        text = TOKENIZER.decode(prompt)
        assert text.startswith("<|bos|><|user_start|>Be brief.\n\nquestion ") and f"question {k}?" in text
    assert dropped[0] == 0 and sum(dropped) == 8 - len(session.messages) // 2 and 0 < sum(dropped) < 8
    assert session.messages[-1]["content"] == [{"type": "text", "text": "answer number 7"}]


def test_a_question_longer_than_the_context_is_cut_with_a_notice() -> None:
    session, script = scripted([*b"ok", *END])
    assert "".join(session.reply("x" * 500 + " and?")) == "ok"
    assert session.dropped_tokens == 505 + 4 - (192 - 60) and str(session.dropped_tokens) in session.notice
    assert TOKENIZER.decode(script.prompts[0]).endswith("x and?<|user_end|><|assistant_start|>")


@pytest.mark.parametrize("n_pieces", range(12))
def test_a_reply_may_be_closed_anywhere(n_pieces: int) -> None:
    sampled = [*b"a ", *call("12*7"), *b"????", *b" b ", *call("2+2"), *b"???", *b" c", *END]
    session, script = scripted([*b"hi", *END], sampled, [*b"ok", *END])
    list(session.reply("first"))
    pieces = session.reply("second")
    seen = list(islice(pieces, n_pieces))
    pieces.close()
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * (1 + (n_pieces > 0))
    if n_pieces:
        after, _ = render(TOKENIZER, session.messages[2:])
        kept = after[after.index(SPECIAL["<|assistant_start|>"]) + 1 :]
        assert shown(kept) == "".join(seen)
    prompt = render_prompt(TOKENIZER, [*session.messages, {"role": "user", "content": "third"}])
    assert "".join(session.reply("third")) == ("ok" if n_pieces else "a [12*7 = 84] b [2+2 = 4] c")
    assert script.prompts[-1] == prompt.ids
    for edge in ("python", "output"):
        assert prompt.ids.count(SPECIAL[f"<|{edge}_start|>"]) == prompt.ids.count(SPECIAL[f"<|{edge}_end|>"])


@pytest.mark.parametrize("max_new_tokens", range(1, 16))
def test_a_reply_cut_by_its_length_leaves_closed_blocks(max_new_tokens: int) -> None:
    settings = COLD.model_copy(update={"max_new_tokens": max_new_tokens})
    session, _ = scripted([*b"a", *call("12*7"), *b"????", *b"b", *END], settings=settings)
    text = "".join(session.reply("q"))
    assert len(session.messages) == 2 and text.startswith("a")
    parts = session.messages[1]["content"]
    assert {"type": "python", "text": "12*7"} in parts or all(part["type"] == "text" for part in parts)
    assert all(part["text"] == "84" for part in parts if part["type"] == "python_output")


def test_seeds() -> None:
    engine = Engine(tiny_model(), TOKENIZER)

    def chat(seed: int | None) -> list[str]:
        session = ChatSession(engine, TOKENIZER, ChatSettings(temperature=1.0, max_new_tokens=20, seed=seed))
        replies = []
        for _ in range(2):
            replies.append("".join(session.reply("hello")))
            session.messages = []  # the same prompt again
        return replies

    assert chat(3) == chat(3) != chat(4)
    assert chat(3)[0] != chat(3)[1], "another seed for each reply"
    assert chat(None) != chat(None)


def lines(*items: str | type[BaseException]) -> Callable[[], str]:
    feed: Iterator[str | type[BaseException]] = iter([*items, EOFError])

    def read_line() -> str:
        item = next(feed)
        if isinstance(item, str):
            return item
        raise item

    return read_line


def test_loop() -> None:
    session, script = scripted([*b"one", *END], [*b"two", *END], [*b"three", *END])
    out: list[str] = []
    chat_loop(session, lines("  hello ", "", "   ", "more", "CLEAR", "again", " Quit ", "never"), out.append)
    text = "".join(out)
    assert "one\n" in text and "two\n" in text and "three\n" in text and text.endswith("Goodbye.\n")
    bos = [SPECIAL["<|bos|>"]]
    assert [TOKENIZER.decode(prompt).count("<|user_start|>") for prompt in script.prompts] == [1, 2, 1]
    assert TOKENIZER.decode(script.prompts[0]) == "<|bos|><|user_start|>hello<|user_end|><|assistant_start|>"
    assert script.prompts[2][:1] == bos and len(session.messages) == 2


@pytest.mark.parametrize("last", ["exit", EOFError, KeyboardInterrupt])
def test_loop_ends(last: str | type[BaseException]) -> None:
    session, script = scripted()
    out: list[str] = []
    chat_loop(session, lines(last), out.append)
    assert "".join(out).endswith("Goodbye.\n") and not script.prompts


@pytest.mark.parametrize("where", ["write", "network"])
def test_interrupt_stops_only_the_reply(where: str) -> None:
    session, script = scripted([*b"abcdef", *END], [*b"next", *END])
    out: list[str] = []

    def write(text: str) -> None:
        if where == "write" and text == "d":
            raise KeyboardInterrupt
        out.append(text)

    if where == "network":
        original = script.config
        steps = iter(range(100))

        class Interrupting(Script):
            def __call__(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
                if next(steps) == 3:
                    raise KeyboardInterrupt
                return super().__call__(*args, **kwargs)  # type: ignore[arg-type]

        stand_in = Interrupting(script.replies)
        assert stand_in.config == original
        session = ChatSession(scripted_engine(stand_in), TOKENIZER, COLD)
    chat_loop(session, lines("hello", "go on"), write)
    assert "".join(out) == "abc\n(stopped)\nnext\n\nGoodbye.\n"
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 2
    assert session.messages[1]["content"][0]["text"] == ("abcd" if where == "write" else "abc")

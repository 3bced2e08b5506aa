"""What is visible of a stream: laws over any tokens, cut anywhere."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanochat_ray.engine.stream_text import Piece, StreamText
from nanochat_ray.text.conversation import Part, parse_reply
from nanochat_ray.text.tokenizer import Tokenizer

# The bytes, and tokens that hold several characters, parts of characters, and both.
MERGED = ["ab", "abc", "é", "a€", "ü!", "🍎"]
PARTIAL = ["é".encode() + "€".encode()[:2], b"\x82\xac!", "🍎".encode()[:3], b"\x8eb", b"\xff\xc3", b"\xed\xa0"]
TOKENIZER = Tokenizer.from_tokens(
    [bytes([byte]) for byte in range(256)] + [text.encode() for text in MERGED] + PARTIAL
)
SPECIAL = TOKENIZER.special
END, BOS = SPECIAL["<|assistant_end|>"], SPECIAL["<|bos|>"]
MARKERS = [SPECIAL[f"<|{block}_{edge}|>"] for block in ("python", "output") for edge in ("start", "end")]
laws = settings(max_examples=600, deadline=None, derandomize=True)

plain = st.one_of(st.sampled_from(sorted(b"abc!\n")), st.integers(0, 267), st.sampled_from(list("é€🍎".encode())))
tokens = st.one_of(plain, plain, plain, st.sampled_from(MARKERS), st.sampled_from(sorted(SPECIAL.values())))
streams = st.lists(tokens, max_size=40)
stop_texts = st.lists(
    st.one_of(st.text("abc!é€🍎\ufffd", min_size=1, max_size=4), st.sampled_from(["\n", "abc", "aab", "b", "<|bos|>"])),
    max_size=3,
)


def pieces_of(ids: list[int], stop: list[str] | None = None) -> tuple[list[Piece], bool]:
    text = StreamText(TOKENIZER, stop or [])
    pieces = [piece for token in ids for piece in text.feed(token)]
    return pieces + text.finish(), text.stopped


def joined(pieces: list[Piece]) -> list[Part]:
    """Parts as a conversation has them: text that follows on text is one part."""
    parts: list[Part] = []
    for kind, group in groupby(pieces, key=lambda piece: piece.kind):
        texts = [piece.text for piece in group]
        parts += [{"type": kind, "text": text} for text in (["".join(texts)] if kind == "text" else texts)]
    return parts


def expected(ids: list[int], stop: list[str]) -> tuple[list[Part], bool]:
    """The definition: whole parts, cut by looking at every prefix of each text for a stop text that ends there."""
    parts: list[Part] = []
    for part in parse_reply(TOKENIZER, ids):
        if part["type"] != "text":
            parts.append(part)
            continue
        text = part["text"]
        for end in range(1, len(text) + 1):
            met = [s for s in stop if text[:end].endswith(s)]
            if met:
                visible = text[: end - max(map(len, met))]
                return parts + ([{"type": "text", "text": visible}] if visible else []), True
        parts.append(part)
    return parts, False


@laws
@given(streams, stop_texts)
@example([*b"a", MARKERS[0], *b"b"], ["ab"])
@example([*"é".encode()[:1], MARKERS[0]], ["\ufffd"])
@example([*b"ab", MARKERS[0], *b"ab", MARKERS[1], *b"abc"], ["abc"])
def test_pieces_are_the_parts_of_the_reply_up_to_the_first_stop_text(ids: list[int], stop: list[str]) -> None:
    end = next((at for at, token in enumerate(ids) if token in (END, BOS)), len(ids))
    ids = [*ids[:end], ord("~"), *ids[end:]]  # a whole character stands at the end
    pieces, stopped = pieces_of(ids, stop)
    assert (joined(pieces), stopped) == expected(ids, stop)
    assert all(piece.text for piece in pieces if piece.kind == "text")


@laws
@given(streams)
def test_an_incomplete_character_at_the_end_is_left_out(ids: list[int]) -> None:
    parts, whole = joined(pieces_of(ids)[0]), parse_reply(TOKENIZER, ids)
    text, wanted = ("".join(f"[{part['type']}]{part['text']}" for part in found) for found in (parts, whole))
    lost = wanted.removeprefix(text).removeprefix("[text]")
    assert wanted.startswith(text) and lost in ("", "\ufffd", "\ufffd\ufffd")  # two: the start of a surrogate


@laws
@given(st.text("abcé€🍎\x00\u0301\ud7ff\ue000", max_size=30), st.integers(0, 120))
def test_text_of_any_tokens_comes_out_as_it_is(text: str, n_bytes: int) -> None:
    for ids in (TOKENIZER.encode(text), list(text.encode())):
        pieces, _ = pieces_of(ids)
        assert "".join(piece.text for piece in pieces) == text
    cut = text.encode()[:n_bytes]
    pieces, _ = pieces_of(list(cut))
    assert "".join(piece.text for piece in pieces) == cut.decode(errors="ignore"), "no half characters"


@laws
@given(st.text("abc\n", max_size=30), stop_texts, st.data())
def test_token_borders_do_not_matter(text: str, stop: list[str], data: st.DataObject) -> None:
    by_bytes = pieces_of(list(text.encode()), stop)
    by_tokens = pieces_of(TOKENIZER.encode(text), stop)
    assert (joined(by_bytes[0]), by_bytes[1]) == (joined(by_tokens[0]), by_tokens[1])


@laws
@given(streams, stop_texts)
def test_nothing_is_held_back_that_can_no_longer_be_a_stop_text(ids: list[int], stop: list[str]) -> None:
    longest = max(map(len, stop), default=1)
    text = StreamText(TOKENIZER, stop)
    ids = [token for token in ids if token not in MARKERS]
    seen = 0
    for at, token in enumerate(ids):
        seen += sum(len(piece.text) for piece in text.feed(token))
        whole = "".join(part["text"] for part in parse_reply(TOKENIZER, ids[: at + 1]))
        if not text.stopped:
            assert seen >= len(whole.rstrip("\ufffd")) - (longest - 1)


def feed_one_by_one(ids: list[int], stop: list[str]) -> list[str]:
    text = StreamText(TOKENIZER, stop)
    return ["".join(piece.text for piece in text.feed(token)) for token in ids] + [
        "".join(piece.text for piece in text.finish())
    ]


@pytest.mark.parametrize(
    ("ids", "stop", "shown"),
    [
        (list("né€".encode()), [], ["n", "", "é", "", "", "€", ""]),
        (list(b"aXbXYc"), ["XY"], ["a", "", "Xb", "", "", "", ""]),
        (list(b"aX"), ["XY"], ["a", "", "X"]),
        (list(b"aabaac"), ["aac"], ["", "", "aab", "", "", "", ""]),
        ([*b"x", MARKERS[0], *b"1+1", MARKERS[1], *b"y"], ["1"], ["x", "", "", "", "", "1+1", "y", ""]),
        ([*b"x", END, *b"y"], [], ["x", "", "", ""]),
        ([*b"x", SPECIAL["<|user_end|>"], *b"y", MARKERS[1]], [], ["x", "", "y", "", ""]),
        ([MARKERS[0], *b"1+", END], [], ["", "", "", "", "1+"]),
    ],
)
def test_when_a_piece_becomes_visible(ids: list[int], stop: list[str], shown: list[str]) -> None:
    assert feed_one_by_one(ids, stop) == shown


def test_after_a_stop_text_nothing_is_visible() -> None:
    text = StreamText(TOKENIZER, ["b"])
    assert text.feed(257) == [Piece("text", "a")] and text.stopped  # abc
    assert text.feed(ord("z")) == [] and text.feed(MARKERS[0]) == [] and text.finish() == []


def test_an_empty_stop_text_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StreamText(TOKENIZER, ["a", ""])
    with pytest.raises(KeyError):
        StreamText(TOKENIZER).feed(TOKENIZER.vocab_size)

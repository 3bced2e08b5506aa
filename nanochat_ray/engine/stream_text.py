"""From the tokens of a stream to what a person or a client sees of it, as it comes: text, tool calls, their results."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nanochat_ray.text.tokenizer import Tokenizer

Kind = Literal["text", "python", "python_output"]


@dataclass(frozen=True)
class Piece:
    """A stretch of plain text, or one whole tool call: its expression, or its result."""

    kind: Kind
    text: str


class StreamText:
    """Tokens in, pieces out: whole characters only, no markers, nothing from a stop text on.

    Put together, with neighbouring text joined, the pieces are what `parse_reply` makes of the same tokens, except that
    a character that is incomplete when the stream ends is left out. The terminal token may be fed like any other.

    Of several stop texts the one that is complete first counts, of those complete at once the longest; so where the
    text ends does not depend on where its tokens do. A stop text lies within one stretch of plain text: tool calls
    neither contain nor continue it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        """ValueError for an empty stop text."""
        if not all(stop):
            raise ValueError(f"stop texts {list(stop)!r}: an empty one would end every stream at once; leave it out")
        self.stopped = False  # a stop text was met; the visible text ends before it
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        special = tokenizer.special
        self._ends = {tokenizer.bos_id, special["<|assistant_end|>"]}
        self._openings: dict[int, Kind] = {
            special["<|python_start|>"]: "python",
            special["<|output_start|>"]: "python_output",
        }
        self._closings: dict[int, Kind] = {
            special["<|python_end|>"]: "python",
            special["<|output_end|>"]: "python_output",
        }
        self._markers = frozenset(special.values())
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._kind: Kind = "text"
        self._held = ""  # of a tool call all of it so far; of plain text an end that may become a stop text
        self._ended = False

    def feed(self, token: int) -> list[Piece]:
        """What the next token makes visible, often nothing. KeyError for an id beyond the vocabulary."""
        if self._ended:
            return []
        if token in self._ends:
            self._ended = True
            return []
        if token not in self._markers:
            return self._add(self._decoder.decode(self._tokenizer.decode_bytes([token])))
        if token in self._openings or self._closings.get(token) == self._kind:
            pieces = self._close_part()
            self._kind = self._openings.get(token, "text")
            return pieces
        return []  # a marker out of place

    def finish(self) -> list[Piece]:
        """What is still held back when the stream is over; an unclosed tool call is given as far as it got."""
        pieces = [] if self.stopped else self._rest()
        self._ended = True
        return pieces

    def _add(self, text: str) -> list[Piece]:
        self._held += text
        if self._kind != "text":
            return []
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = self._ended = True
            visible, self._held = self._held[: min(found)[1]], ""
        else:
            cut = len(self._held) - self._n_undecided()
            visible, self._held = self._held[:cut], self._held[cut:]
        return [Piece("text", visible)] if visible else []

    def _n_undecided(self) -> int:
        """Length of the longest end of the held text that begins a stop text."""
        longest = min(len(self._held), max(map(len, self._stop), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(self._held[-n:]) for s in self._stop)), 0)

    def _close_part(self) -> list[Piece]:
        # A character that a marker cuts is not going to be completed.
        pieces = self._add(self._decoder.decode(b"", final=True))
        return pieces if self.stopped else pieces + self._rest()

    def _rest(self) -> list[Piece]:
        text, self._held = self._held, ""
        kind, self._kind = self._kind, "text"
        return [Piece(kind, text)] if text or kind != "text" else []


class Brackets:
    """Pieces as one text: a tool call as `[12*7 = 84]`, one without a result as `[12*7]`."""

    def __init__(self) -> None:
        self._call: str | None = None  # an expression whose result may follow

    def feed(self, pieces: Sequence[Piece]) -> str:
        """The text that these make visible. A call waits for its result."""
        return "".join(self._show(piece) for piece in pieces)

    def finish(self) -> str:
        call, self._call = self._call, None
        return "" if call is None else f"[{call}]"

    def _show(self, piece: Piece) -> str:
        if piece.kind == "python_output":
            call, self._call = self._call, None
            return f"[{piece.text}]" if call is None else f"[{call} = {piece.text}]"
        before = self.finish()
        if piece.kind == "python":
            self._call = piece.text
            return before
        return before + piece.text

"""What every kind of answer has in common: samples that grow with the engine's events, and what is counted of them."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from nanochat_ray.engine.stream_text import Piece, StreamText
from nanochat_ray.messages import FinishReason, TokenEvent
from nanochat_ray.serve.errors import ApiError, json_bytes
from nanochat_ray.serve.plan import Plan
from nanochat_ray.text.tokenizer import Tokenizer


class Writer(Protocol):
    """Makes bytes or an object of the events of one HTTP request, whose prompts have numbers from 0."""

    def feed(self, prompt: int, events: Sequence[TokenEvent]) -> bytes:
        """Server-sent events for these, often none."""
        ...

    def last(self) -> bytes:
        """What ends the stream."""
        ...

    def whole(self) -> dict[str, Any]:
        """The answer in one piece, when all events were fed."""
        ...

    def error(self, error: ApiError) -> bytes:
        """The event that says that nothing more comes, and why."""
        ...

    @property
    def counts(self) -> dict[str, int]:
        """Tokens so far, for the log."""
        ...

    def text(self) -> str:
        """All answers so far, for a log of conversations."""
        ...


def sse(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json_bytes(value) + b"\n\n"


class Sample:
    """One answer while it grows."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._text = StreamText(tokenizer, stops)
        self._ends = {tokenizer.bos_id, tokenizer.encode_special("<|assistant_end|>")}
        self.parts: list[dict[str, str]] = []  # neighbouring text joined
        self.n_tokens = 0  # without the terminal
        self.n_forced = 0
        self.cached_tokens = 0  # of the prompt
        self.finish_reason: FinishReason | None = None

    def feed(self, event: TokenEvent) -> list[Piece]:
        """What the event makes visible."""
        pieces: list[Piece] = []
        self.cached_tokens += event.cached_tokens
        if not self.is_end(event):
            self.n_tokens += 1
            self.n_forced += event.forced
            pieces = self._text.feed(event.token)
        if event.finish_reason is not None:
            self.finish_reason = event.finish_reason
            pieces = pieces + self._text.finish()
        for piece in pieces:
            if piece.kind == "text" and self.parts and self.parts[-1]["type"] == "text":
                self.parts[-1]["text"] += piece.text
            else:
                self.parts.append({"type": piece.kind, "text": piece.text})
        return pieces

    def is_end(self, event: TokenEvent) -> bool:
        """Whether this is the token that ends an answer, which is no part of it."""
        return event.finish_reason == "stop" and event.token in self._ends

    @property
    def content(self) -> str:
        """The plain text alone."""
        return "".join(part["text"] for part in self.parts if part["type"] == "text")


def token_text(tokenizer: Tokenizer, token: int) -> tuple[str, bytes]:
    """A token as OpenAI writes it: its text, or `bytes:\\xe2\\x82` if its bytes are no whole characters."""
    raw = tokenizer.decode_bytes([token])
    try:
        return raw.decode(), raw
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw


class Answers(ABC):
    """What chats and completions share: samples, identity, usage, beginning and end of a stream."""

    prefix: str  # of the answer's id
    kind: str  # `object` of a whole answer
    chunk_kind: str  # and of a chunk

    def __init__(self, plan: Plan, with_usage: bool) -> None:
        self._plan, self._with_usage = plan, with_usage
        self._tokenizer = plan.model.tokenizer
        self.samples = [Sample(self._tokenizer, plan.stops) for _ in range(len(plan.prompts) * plan.samples)]
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        # A chunk: this, the choice, and _after.
        same = json_bytes(self._named(self.chunk_kind)).decode()[:-1]
        self._before = f'data: {same},"choices":['
        self._after = ('],"usage":null}' if with_usage else "]}") + "\n\n"

    def _named(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._plan.model.name}

    def usage(self) -> dict[str, Any]:
        prompt = self._plan.prompt_tokens
        completion = sum(sample.n_tokens for sample in self.samples)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {
                "cached_tokens": sum(first.cached_tokens for first in self.samples[:: self._plan.samples])
            },
            "completion_tokens_details": {"forced_tokens": sum(sample.n_forced for sample in self.samples)},
        }

    @property
    def counts(self) -> dict[str, int]:
        usage = self.usage()
        return {"prompt_tokens": usage["prompt_tokens"], "completion_tokens": usage["completion_tokens"]}

    def text(self) -> str:
        return "\n".join(part["text"] for sample in self.samples for part in sample.parts)

    def last(self) -> bytes:
        usage = {**self._named(self.chunk_kind), "choices": [], "usage": self.usage()}
        return (sse(usage) if self._with_usage else b"") + b"data: [DONE]\n\n"

    def error(self, error: ApiError) -> bytes:
        return sse(error.body())

    def whole(self) -> dict[str, Any]:
        choices = [self.choice(index, sample) for index, sample in enumerate(self.samples)]
        return {**self._named(self.kind), "choices": choices, "usage": self.usage()}

    @abstractmethod
    def choice(self, index: int, sample: Sample) -> dict[str, Any]:
        """Of a whole answer."""

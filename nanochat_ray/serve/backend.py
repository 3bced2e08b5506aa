"""What the HTTP side asks of the engine side, so that each can be read and tested without the other."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from nanochat_ray.messages import SamplingParams, TokenEvent
from nanochat_ray.text.tokenizer import Tokenizer


class Overloaded(Exception):
    """The queue is full; the caller may try again."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineFailed(Exception):
    """The engine stopped in the middle of a request, which is not the request's fault."""


@dataclass(frozen=True)
class ServedModel:
    """A model that requests can name."""

    name: str  # what a request's `model` says, such as d12-sft
    tokenizer: Tokenizer
    context: int  # positions of prompt and answer together, in tokens
    created: int  # Unix time of its checkpoint
    chat: bool  # False: a base model, which continues text and knows no conversations
    defaults: SamplingParams  # for what a request leaves out
    lineage: dict[str, Any] = field(default_factory=dict)  # run, source, step, SHA-256 of weights, tokenizer, config


class Backend(Protocol):
    """Models behind engines. The first of `models` answers a request that names none."""

    @property
    def models(self) -> Sequence[ServedModel]: ...

    def generate(
        self, model: ServedModel, prompt: Sequence[int], params: SamplingParams
    ) -> AsyncGenerator[list[TokenEvent], None]:
        """Events of one request as they come, several at a time; the first without delay.

        Ends when all samples have ended. Closing it, or cancelling its reader, frees the request's place at the next
        engine step. Before the first event it raises ValueError (a request that cannot be served) or Overloaded; at
        any time EngineFailed.
        """
        ...

    def stats(self) -> dict[str, Any]:
        """Numbers for /stats and /health: running, waiting, ..., JSON types only."""
        ...

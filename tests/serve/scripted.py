"""A backend that says what a test wrote down, and a server around it."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from nanochat_ray.messages import FinishReason, SamplingParams, TokenEvent
from nanochat_ray.serve.backend import ServedModel
from tests.engine.tiny import CONTEXT, byte_tokenizer

TOKENIZER = byte_tokenizer()
END = TOKENIZER.encode_special("<|assistant_end|>")
Reply = str | Sequence[int]


def served(name: str = "tiny-sft", chat: bool = True, context: int = CONTEXT, **defaults: Any) -> ServedModel:
    params = SamplingParams(**{"temperature": 0.8, "top_k": 50, "max_tokens": 64, **defaults})
    lineage = {"run": "tiny", "step": 7, "weights_sha256": "0" * 64}
    return ServedModel(name, TOKENIZER, context, created=1_700_000_000, chat=chat, defaults=params, lineage=lineage)


def call_tokens(expression: str, result: str) -> list[int]:
    """A tool call and what the tool makes of it."""
    parts = (("python", expression), ("output", result))
    return [
        token
        for kind, text in parts
        for token in TOKENIZER.encode(text, prepend=f"<|{kind}_start|>", append=f"<|{kind}_end|>")
    ]


class Scripted:
    """Streams the tokens of `reply` (text, ids, or a function of prompt and params), one per step, then the end.

    `opened`, `closed` and `steps` count; `asked` holds what was asked for. `fail_at` raises `failure` before that step.
    """

    def __init__(
        self,
        reply: Reply | Callable[[Sequence[int], SamplingParams], Reply] = "Hello there.",
        models: Sequence[ServedModel] | None = None,
        step_s: float = 0.0,
        failure: Exception | None = None,
        fail_at: int = 0,
        per_step: int = 1,
    ) -> None:
        self.models = [served()] if models is None else list(models)
        self.reply, self.step_s, self.failure, self.fail_at, self.per_step = reply, step_s, failure, fail_at, per_step
        self.asked: list[tuple[ServedModel, list[int], SamplingParams]] = []
        self.opened = self.closed = self.steps = 0
        self.extra_stats: dict[str, Any] = {}

    def stats(self) -> dict[str, Any]:
        return {"running": self.opened - self.closed, "waiting": 0, **self.extra_stats}

    async def generate(
        self, model: ServedModel, prompt: Sequence[int], params: SamplingParams
    ) -> AsyncGenerator[list[TokenEvent], None]:
        self.asked.append((model, list(prompt), params))
        self.opened += 1
        try:
            reply = self.reply(prompt, params) if callable(self.reply) else self.reply
            tokens = list(TOKENIZER.encode(reply) if isinstance(reply, str) else reply)
            rows = [self._events(tokens, sample, params) for sample in range(params.num_samples)]
            for step, events in enumerate(zip(*rows, strict=True)):
                if self.failure and step == self.fail_at:
                    raise self.failure
                await asyncio.sleep(self.step_s)
                self.steps += 1
                yield list(events)
        finally:
            self.closed += 1

    def _events(self, tokens: list[int], sample: int, params: SamplingParams) -> Iterator[TokenEvent]:
        start, end = (TOKENIZER.encode_special(f"<|output_{edge}|>") for edge in ("start", "end"))
        stops = [stop.encode() for stop in params.stop]
        said = b""
        tokens = [*tokens, END][: params.max_tokens]
        forced = False
        for n, token in enumerate(tokens):
            forced = forced or token == start
            said += TOKENIZER.decode_bytes([token])
            stopped = any(stop in said for stop in stops)
            reason: FinishReason | None = "stop" if token == END or stopped else None
            if reason is None and n + 1 == len(tokens):
                reason = "length"
            logprob = None if params.logprobs is None else -0.5 - n / 100
            top = tuple((65 + k, -1.0 - k) for k in range(params.logprobs or 0))
            yield TokenEvent(0, sample, token, forced, reason, logprob, top)
            forced = forced and token != end
            if stopped:
                return


@contextmanager
def running(app: FastAPI, host: str = "127.0.0.1") -> Iterator[str]:
    """The app under uvicorn in a thread; gives its address."""
    listener = socket.socket()
    listener.bind((host, 0))
    config = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://{host}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether it became true in time."""
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return condition()

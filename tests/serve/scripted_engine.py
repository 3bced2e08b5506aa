"""An engine without a network: the interface that EngineLoop drives, each stream a given number of tokens."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanochat_ray.messages import SamplingParams, TokenEvent
from nanochat_ray.serve.backend import ServedModel
from tests.engine.tiny import byte_tokenizer


@dataclass(frozen=True)
class Stats:
    running: int
    waiting: int
    version: int


class Clock:
    """A clock that moves when it is told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class ScriptedEngine:
    """Stream s of a request with prompt [first, ...] gives the tokens first, first+1, ... ; `max_rows` run at a time.

    `gate`, while cleared, holds a step up at its start. `broken` makes the next step raise. `threads` collects who
    called, `ran` which requests each step ran. A step moves `clock` by `step_s`, without one it takes so long.
    """

    def __init__(self, max_rows: int = 4, step_s: float = 0.0, clock: Clock | None = None) -> None:
        self.max_rows, self.step_s, self.clock = max_rows, step_s, clock
        self.running: dict[int, tuple[int, SamplingParams, int]] = {}
        self.waiting: dict[int, tuple[int, SamplingParams, int]] = {}
        self.version = 0
        self.ran: list[set[int]] = []
        self.at_gate = False
        self.broken: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.threads: set[str] = set()
        self._numbers = 0

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> int:
        self.threads.add(threading.current_thread().name)
        if not prompt:
            raise ValueError("an empty prompt")
        self._numbers += 1
        self.waiting[self._numbers] = (prompt[0], params, 0)
        return self._numbers

    def cancel(self, number: int) -> None:
        self.threads.add(threading.current_thread().name)
        self.running.pop(number, None)
        self.waiting.pop(number, None)

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    def update(self, model: Any) -> int:
        self.threads.add(threading.current_thread().name)
        if model is None:
            raise ValueError("no weights")
        self.version += 1
        return self.version

    def step(self) -> list[TokenEvent]:
        self.threads.add(threading.current_thread().name)
        self.at_gate = not self.gate.is_set()
        self.gate.wait()
        if self.clock:
            self.clock.now += self.step_s
        else:
            time.sleep(self.step_s)
        if self.broken:
            raise self.broken
        while self.waiting and len(self.running) < self.max_rows:
            number = next(iter(self.waiting))
            self.running[number] = self.waiting.pop(number)
        self.ran.append(set(self.running))
        events = []
        for number, (first, params, given) in list(self.running.items()):
            ended = given + 1 == params.max_tokens
            for sample in range(params.num_samples):
                events.append(TokenEvent(number, sample, first + given, False, "length" if ended else None))
            self.running[number] = (first, params, given + 1)
            if ended:
                del self.running[number]
        return events

    def stats(self) -> Stats:
        return Stats(len(self.running), len(self.waiting), self.version)


def served(name: str = "d1-sft", chat: bool = True) -> ServedModel:
    return ServedModel(name, byte_tokenizer(), 192, 0, chat, SamplingParams())

"""How long programs have waited for their turn: time that no clock of a caller should count."""

from __future__ import annotations

import contextvars
import threading
import time


class Queueing:
    """The time during which at least one program waits for its turn. Safe on any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting, self._before_s, self._since_s = 0, 0.0, 0.0

    def enter(self) -> None:
        with self._lock:
            if not self._waiting:
                self._since_s = time.monotonic()
            self._waiting += 1

    def leave(self) -> None:
        with self._lock:
            self._waiting -= 1
            if not self._waiting:
                self._before_s += time.monotonic() - self._since_s

    def seconds(self) -> float:
        with self._lock:
            return self._before_s + (time.monotonic() - self._since_s if self._waiting else 0.0)


# What the programs of a task wait is told to the Queueing that stands here; a coroutine's tasks inherit it.
QUEUEING: contextvars.ContextVar[Queueing | None] = contextvars.ContextVar("queueing", default=None)

"""A rank that hangs ends itself, after it has written down where it stood."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

EXIT_HUNG = 86
STACKS = "stacks"  # below the stage's folder: stacks/rank<k>.txt


class Watchdog:
    """Ends this process when nobody calls `beat` for `limit_s` seconds; the stacks of all threads go to a file first.

    A thread of its own watches, which also works while the loop waits in a collective. Ray sees the process die, and
    the launch starts the group again.
    """

    def __init__(self, stage_folder: Path, rank: int, limit_s: float):
        self.path, self.rank, self.limit_s = stage_folder / STACKS / f"rank{rank}.txt", rank, limit_s
        self._last_s = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        self._last_s = time.monotonic()

    def watched(self, items: Iterator[Item]) -> Iterator[Item]:
        """The same items, with a beat before and after each."""
        for item in items:
            self.beat()
            yield item
            self.beat()

    def _watch(self) -> None:
        while not self._closed.wait(min(5.0, self.limit_s / 4)):
            if time.monotonic() - self._last_s > self.limit_s:
                self._end()

    def _end(self) -> None:
        line = f"rank {self.rank}: no sign of life for {self.limit_s:.0f} s; stacks in {self.path}"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {line}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            logger.error(line)
            sys.stderr.flush()
        finally:
            os._exit(EXIT_HUNG)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed.set()

"""A rank that hangs ends itself, after it has written down where it stood."""

from __future__ import annotations

import faulthandler
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")

STACKS = "stacks"  # below the stage's folder: stacks/rank<k>.txt
REARM_S = 1.0
TELL_S = 10.0


class Pulse:
    """Remembers when a rank was last heard of, in a process of its own that outlives them."""

    def __init__(self) -> None:
        self._heard_s = time.monotonic()

    def note_life(self) -> None:
        self._heard_s = time.monotonic()

    def silent_s(self) -> float:
        """Seconds since a rank was last heard of."""
        return time.monotonic() - self._heard_s


class Watchdog:
    """Ends this process when nobody calls `beat` for `limit_s` seconds; the stacks of all threads go to a file first.

    Python's faulthandler watches, in a thread that needs no lock of the interpreter. Ray sees the process die, and the
    launch starts the group again. One per process. `tell` hears of the beats, every ten seconds at most.
    """

    def __init__(self, stage_folder: Path, rank: int, limit_s: float, tell: Callable[[], object] = lambda: None):
        self.path, self.limit_s, self._tell = stage_folder / STACKS / f"rank{rank}.txt", limit_s, tell
        self._armed_s = self._told_s = float("-inf")

    def beat(self) -> None:
        """This process lives. Cheap: arms again once a second at most."""
        if time.monotonic() - self._armed_s >= min(REARM_S, self.limit_s / 4):
            self._armed_s = time.monotonic()
            faulthandler.dump_traceback_later(self.limit_s, exit=True, file=self._file)
        if time.monotonic() - self._told_s >= TELL_S:
            self._told_s = time.monotonic()
            self._tell()

    def watched(self, items: Iterator[Item]) -> Iterator[Item]:
        """The same items, with a beat before and after each."""
        for item in items:
            self.beat()
            yield item
            self.beat()

    def __enter__(self) -> Watchdog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a")
        self.beat()
        return self

    def __exit__(self, *exc: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if not self.path.stat().st_size:
            self.path.unlink()

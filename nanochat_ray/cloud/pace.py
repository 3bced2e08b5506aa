"""Keeping to the limits of an API that counts requests per key, among all processes of a machine that use the key."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path

from nanochat_ray.run_dir import locked, read_json, write_json


@dataclass(frozen=True)
class Times:
    """How long things take and may take. The two gaps are Lambda's limits and a little more, for the way there."""

    request_gap_s: float = 1.05
    launch_gap_s: float = 12.3
    listing_s: float = 5.0  # how old a list of instances may be
    settle_s: float = 15.0  # until a launch that may have happened would be seen in a list
    backoff_s: float = 1.0  # the first wait after a failure; it doubles
    backoff_most_s: float = 30.0
    patience_s: float = 120.0  # how long a request is tried again
    end_s: float = 300.0  # how long we try to end what a failed `ray up` began
    unhealthy_s: float = 120.0  # how long a worker may be unhealthy before another takes its place
    boot_s: float = 2400.0  # how long a head may boot
    appear_s: float = 120.0  # how long an instance that was launched may be missing from the list

    def scaled(self, factor: float) -> Times:
        return Times(*(getattr(self, name) * factor for name in self.__dataclass_fields__))


class Pace:
    """Lets one request pass at a time: each takes the next free place in time, and waits for it.

    The last places taken lie in a file with a lock, which all commands on this machine share. Without a folder, or if
    it cannot be written, only this process keeps the pace. Other machines that use the key are not seen: for them the
    API's 429 is borne by whoever asks.
    """

    def __init__(self, folder: Path | None, times: Times) -> None:
        self.times = times
        self._path = folder / "pace.json" if folder else None
        self._lock = threading.Lock()
        self._taken: dict[str, float] = {}  # kind of request -> when the last one was to be sent, s since 1970

    def wait(self, launch: bool = False) -> None:
        """Return when a request may be sent."""
        while True:
            with self._lock:
                at, taken = self._take_shared(launch)
            time.sleep(max(0.0, at - time.time()))
            if taken:
                return

    def _take_shared(self, launch: bool) -> tuple[float, bool]:
        if self._path is None:
            return self._take(launch)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with locked(self._path.with_suffix(".lock"), wait_s=10.0):
                try:
                    others = read_json(self._path)
                    self._taken = {kind: max(float(s), self._taken.get(kind, 0.0)) for kind, s in others.items()}
                except (FileNotFoundError, ValueError, TypeError, AttributeError):
                    pass  # nobody's yet, or torn: the limit itself is kept by the API
                place = self._take(launch)
                write_json(self._path, self._taken)
                return place
        except (OSError, TimeoutError):
            return self._take(launch)

    def _take(self, launch: bool) -> tuple[float, bool]:
        """The next place, and whether it is ours. A launch that must wait holds no place: others go before it."""
        now = time.time()
        at = max(now, self._free("request", self.times.request_gap_s, now))
        if launch and (later := self._free("launch", self.times.launch_gap_s, now)) > at:
            return later, False
        self._taken.update(dict.fromkeys(("request", "launch") if launch else ("request",), at))
        return at, True

    def _free(self, kind: str, gap_s: float, now: float) -> float:
        last = self._taken.get(kind, 0.0)
        # Far in the future is what a clock that was set back leaves behind, not a place that somebody took.
        return last + gap_s if last - now < 100 * gap_s else now

"""A stage's numbers as gauges of Ray's metrics agent, from where Prometheus and Ray's dashboard read them."""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from ray.util.metrics import Gauge

MIN_INTERVAL_S = 1.0  # the agent exports every ten seconds or so
TAGS = ("stage", "run")


def gauge_name(metric: str) -> str:
    """The gauge of a tracker's name: `train/loss` is `nanochat_train_loss`, which Ray exports as `ray_nanochat_...`."""
    return "nanochat_" + re.sub(r"[^a-zA-Z0-9]+", "_", metric).strip("_").lower()


class RayGauges:
    """Shows the newest numbers of one stage; for rank 0 only, in the process of a Ray worker.

    `run` is the model tag. Gauges are made as names come up. Values wait until MIN_INTERVAL_S after the last time they
    were set, the newest of each name counts. A failure warns once and never stops training.
    """

    def __init__(self, stage: str, run: str, clock: Callable[[], float] = time.monotonic):
        self._tags = {"stage": stage, "run": run}
        self._clock = clock
        self._gauges: dict[str, Gauge] = {}
        self._waiting: dict[str, float] = {}
        self._set_s = -math.inf
        self._off = False

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take the finite numbers among `metrics`, by the tracker's names; the rest is left aside."""
        if self._off:
            return
        self._waiting |= {"step": step}
        self._waiting |= {
            name: float(value) for name, value in metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        }  # fmt: skip
        if self._clock() - self._set_s >= MIN_INTERVAL_S:
            self.flush()

    def flush(self) -> None:
        """Set the gauges to the newest values."""
        self._set_s = self._clock()
        try:
            for metric, value in self._waiting.items():
                if metric not in self._gauges:
                    self._gauges[metric] = Gauge(gauge_name(metric), f"{metric} of a training stage", tag_keys=TAGS)
                self._gauges[metric].set(value, tags=self._tags)
        except Exception as error:  # a metrics back-end of any kind may not end a training run
            self._off = True
            warnings.warn(f"Ray's metrics are off: {error}", RuntimeWarning, stacklevel=2)
        self._waiting.clear()

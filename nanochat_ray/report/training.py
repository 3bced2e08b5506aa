"""What a training stage's metrics.jsonl says as a whole: how fast it was, what it waited for, how often it started."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from nanochat_ray.report.metrics_log import is_train_step, without_undone

WARM_UP_STEPS = 10  # of each start, left out of times and rates


@dataclass(frozen=True)
class TrainingSummary:
    """None where the records do not say. The shares are of the steps' own time, once warm."""

    steps: int
    tok_per_sec: float | None  # median
    mfu: float | None  # median, percent
    data_wait_frac: float | None
    checkpoint_stall_frac: float | None
    grad_norm: float | None  # median
    grad_norm_max: float | None
    waste_frac: float | None  # of the tokens read; the last that was reported
    starts: int
    steps_again: int  # that a later start had to do again


def summarise(written: Sequence[Mapping[str, Any]]) -> TrainingSummary | None:
    """The summary of all records of a stage, as written; None if there is no training step among them."""
    kept = [record for record in without_undone(map(dict, written)) if is_train_step(record)]
    done = [record for record in written if is_train_step(record)]
    if not kept:
        return None
    warm = warm_steps(written) or kept
    norms = numbers(kept, "train/grad_norm")
    waste = numbers(written, "data/waste_frac")
    return TrainingSummary(
        steps=len(kept),
        tok_per_sec=middle(numbers(warm, "train/tok_per_sec")),
        mfu=middle(numbers(warm, "train/mfu")),
        data_wait_frac=share(warm, "train/data_wait_s"),
        checkpoint_stall_frac=share(warm, "train/checkpoint_stall_s"),
        grad_norm=middle(norms),
        grad_norm_max=max(norms, default=None),
        waste_frac=waste[-1] if waste else None,
        starts=1 + sum(record.get("event") == "start" for record in written),
        steps_again=len(done) - len(kept),
    )


def warm_steps(written: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The training steps of all starts without the first WARM_UP_STEPS of each."""
    warm, since_start = [], 0
    for record in written:
        if record.get("event") == "start":
            since_start = 0
        elif is_train_step(record):
            since_start += 1
            if since_start > WARM_UP_STEPS:
                warm.append(record)
    return warm


def numbers(records: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """The finite values of a name, in order."""
    values = [record.get(name) for record in records]
    return [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]


def middle(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def share(records: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The seconds of a name over the seconds of the steps that have it."""
    having = [record for record in records if numbers([record], name) and numbers([record], "train/dt")]
    time_s = sum(record["train/dt"] for record in having)
    return sum(record[name] for record in having) / time_s if time_s > 0 else None

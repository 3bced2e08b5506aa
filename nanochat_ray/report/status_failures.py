"""failures.jsonl of a stage: what went wrong and when, written by the job's driver, read by `jobs/status.py`.

What ended a job between two stages stands in the file of the run's own folder.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_ray.remote import Remote
from nanochat_ray.report.metrics_log import MetricsLog, read_lines

FAILURES_FILE = "failures.jsonl"
MAX_CHARS = 2000


@dataclass(frozen=True)
class Failure:
    """One thing that went wrong in a stage."""

    stage: str  # or the run, for what went wrong outside of its stages
    at_s: float  # seconds since 1970
    error: str
    epoch: int  # of the lease whose holder met it
    step: int | None  # from which the stage goes on, where that is known
    final: bool  # whether the job ended with it; else the stage was launched again


def note_failure(
    folder: Path, error: BaseException | str, epoch: int, step: int | None = None, final: bool = False
) -> None:
    """Append a failure to the stage's file. Never raises OSError: the failure itself is what counts, not its note."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    if len(text) > MAX_CHARS:
        text = f"{text[: MAX_CHARS // 2]} ... {text[-MAX_CHARS // 2 :]}"
    record = {"time": round(time.time(), 3), "error": text, "epoch": epoch, "step": step, "final": final}
    with contextlib.suppress(OSError):
        log = MetricsLog(folder / FAILURES_FILE)
        try:
            log.append(record)
        finally:
            log.close()
        if (remote := Remote.of(folder)) is not None:
            remote.push_log(folder / FAILURES_FILE)


def read_failures(folder: Path) -> list[Failure]:
    """The failures of a stage in the order of writing; lines that are no such records are left out."""
    found = [_failure(folder.name, record) for record in read_lines(folder / FAILURES_FILE)]
    return [failure for failure in found if failure is not None]


def _failure(stage: str, record: Mapping[str, Any]) -> Failure | None:
    try:
        step = record.get("step")
        return Failure(
            stage, float(record["time"]), str(record["error"]), int(record["epoch"]),
            None if step is None else int(step), bool(record.get("final")),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError):
        return None

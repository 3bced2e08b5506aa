"""metrics.jsonl: one JSON object per line, appended as a stage runs, read back without what a restart undid."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanochat_ray.report.records import plain


class MetricsLog:
    """Appends records to a file. A line is one write, so a crash tears at most the last line."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._fd).st_size
        self._torn = size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"

    def append(self, record: dict[str, Any]) -> None:
        """Write one record; NaN and infinities become null. Raises OSError, for instance on a full disk."""
        line = json.dumps(plain(record), separators=(",", ":"), allow_nan=False) + "\n"
        data = (("\n" if self._torn else "") + line).encode()
        self._torn = True  # until the whole line is in the file
        self._torn = os.write(self._fd, data) != len(data)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records that count, in the order of writing; an empty list if there is no file.

    Torn lines are left out. Where a series (the training steps, or records with the same names) does not go on in its
    steps, the stage was restarted from an older checkpoint: all that was recorded from that step on before is dropped.
    """
    kept: list[dict[str, Any]] = []
    last_step: dict[frozenset[str], int] = {}  # by series
    if not path.exists():
        return kept
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if not isinstance(record, dict):
            continue
        step = record.get("step")
        if isinstance(step, int):
            series = frozenset(["train"]) if is_train_step(record) else frozenset(record)
            if step <= last_step.get(series, -1):
                kept = [old for old in kept if not _from_step(old, step)]
                last_step = {name: min(last, step - 1) for name, last in last_step.items()}
            last_step[series] = step
        kept.append(record)
    return kept


def is_train_step(record: Mapping[str, Any]) -> bool:
    """Whether a record is of a training step; it may repeat the last evaluation's numbers."""
    return "train/loss" in record


def _from_step(record: dict[str, Any], step: int) -> bool:
    return isinstance(record.get("step"), int) and record["step"] >= step

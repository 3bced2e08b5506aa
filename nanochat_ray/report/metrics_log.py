"""metrics.jsonl: one JSON object per line, appended as a stage runs, read back without what a restart undid."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nanochat_ray.report.records import plain

WATCH_FILE = "watch.jsonl"  # beside metrics.jsonl: evaluations of checkpoints by a job of its own
CHUNK_BYTES = 2**20


class MetricsLog:
    """Appends records to a file. A line is one write, so a crash tears at most the last line."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._fd).st_size
        self.goes_on = size > 0  # others wrote here before
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
    return without_undone(read_lines(path))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All records of a file in the order of writing, also those that a restart undid."""
    return _parse(path.read_text(errors="replace")) if path.exists() else []


def without_undone(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records that count of all that were written; see `read_metrics`."""
    kept: list[dict[str, Any]] = []
    last_step: dict[str, int] = {}  # by series
    for record in records:
        step = record.get("step")
        if isinstance(step, int):
            series = series_of(record)
            if step <= last_step.get(series, -1):
                kept = [old for old in kept if not _from_step(old, step)]
                last_step = {name: min(last, step - 1) for name, last in last_step.items()}
            last_step[series] = step
        kept.append(record)
    return kept


class LineReader:
    """Reads a JSONL file that others append to. `position` is the byte behind the last whole line that was read."""

    def __init__(self, path: Path, position: int = 0):
        self.path = path
        self.position = position

    def read(self) -> list[dict[str, Any]]:
        """The next records, about CHUNK_BYTES of them; torn lines are left out. Empty if there is nothing new."""
        try:
            file = open(self.path, "rb")
        except FileNotFoundError:
            return []
        with file:
            if os.fstat(file.fileno()).st_size < self.position:  # the file was made anew
                self.position = 0
            file.seek(self.position)
            data = file.read(CHUNK_BYTES)
            if b"\n" not in data:
                data += file.readline()
        whole = data[: data.rfind(b"\n") + 1]
        self.position += len(whole)
        return _parse(whole.decode(errors="replace"))


def read_watch(path: Path) -> list[dict[str, Any]]:
    """The evaluations of a watching job by step; the last one counts where a step was evaluated twice."""
    by_step = {record["step"]: record for record in read_lines(path) if isinstance(record.get("step"), int)}
    return [by_step[step] for step in sorted(by_step)]


def _parse(text: str) -> list[dict[str, Any]]:
    """The JSON objects among the lines of a text."""
    records = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def series_of(record: Mapping[str, Any]) -> str:
    """Which series a record goes on: the training steps, or records with the same names."""
    return "train" if is_train_step(record) else ",".join(sorted(record))


def is_train_step(record: Mapping[str, Any]) -> bool:
    """Whether a record is of a training step; it may repeat the last evaluation's numbers."""
    return "train/loss" in record


def _from_step(record: dict[str, Any], step: int) -> bool:
    return isinstance(record.get("step"), int) and record["step"] >= step

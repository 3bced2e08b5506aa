"""A stage's result as typed data in `<run>/<stage>/result.json`; the report is made of these and of nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from nanochat_ray.run_dir import RESULT_FILE, read_json, write_json

Scalar = float | int | str | bool | None


@dataclass(frozen=True)
class Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[Scalar]]


@dataclass(frozen=True)
class Sample:
    prompt: str
    text: str  # without the prompt


@dataclass(frozen=True)
class Skipped:
    """Something that a stage left out, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class StageRecord:
    """What a stage did. `seconds` counts all starts of it together."""

    stage: str
    started_at: str  # ISO 8601, of the first start
    seconds: float
    metrics: Mapping[str, Scalar] = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)  # by title
    samples: Sequence[Sample] = ()
    skipped: Sequence[Skipped] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)  # of its inputs: data, tokenizer, bundle


def plain(value: Any) -> Any:
    """The value in JSON's own types: numpy and torch scalars unwrapped, NaN and infinities as None, paths as text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no place in a JSON record: {value!r}")


def write_result(folder: Path, record: StageRecord) -> Path:
    """Write the record into the stage's folder, whole or not at all."""
    path = folder / RESULT_FILE
    write_json(path, plain(record))
    return path


def read_result(folder: Path) -> StageRecord:
    """Read a stage's record. Raises FileNotFoundError, or ValueError naming the file if it is not such a record.

    Keys of later versions are left aside.
    """
    path = folder / RESULT_FILE
    try:
        raw = read_json(path)
        return StageRecord(
            stage=str(raw["stage"]),
            started_at=str(raw["started_at"]),
            seconds=float(raw["seconds"]),
            metrics=dict(raw.get("metrics", {})),
            tables={name: Table(table["columns"], table["rows"]) for name, table in raw.get("tables", {}).items()},
            samples=[Sample(sample["prompt"], sample["text"]) for sample in raw.get("samples", [])],
            skipped=[Skipped(item["name"], item["reason"]) for item in raw.get("skipped", [])],
            config=dict(raw.get("config", {})),
            hashes=dict(raw.get("hashes", {})),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a stage's record ({type(error).__name__}: {error})") from error

"""Reads what wandb writes offline: protobuf records in blocks of 32 KiB, framed as LevelDB does it."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER_BYTES, BLOCK_BYTES, FRAME_BYTES = 7, 32 * 1024, 7
WHOLE, LAST = 1, 4


def records(path: Path) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    data, position, parts = path.read_bytes(), HEADER_BYTES, b""
    while position + FRAME_BYTES <= len(data):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < FRAME_BYTES:
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + FRAME_BYTES : position + FRAME_BYTES + size]
        position += FRAME_BYTES + size
        if kind in (WHOLE, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def runs(folder: Path) -> list[tuple[str, list[dict[str, Any]]]]:
    """(id, rows) of each offline file below a stage's folder, in the order of their start."""
    found = []
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        ids, rows = set(), []
        for record in records(path):
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            elif record.WhichOneof("record_type") == "history":
                rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json)
                             for item in record.history.item})  # fmt: skip
        (run_id,) = ids
        found.append((run_id, rows))
    return found

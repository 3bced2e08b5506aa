"""The newest checkpoint of a stage by its manifest and metadata, in the folder or in the store behind it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nanochat_ray.remote import Remote
from nanochat_ray.run_dir import MANIFEST_FILE

META_FILE = "meta.json"
STEP_FOLDER = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint as its manifest has it; its files are not hashed here."""

    step: int
    age_s: float
    bytes: int
    steps: int | None  # of the whole stage, where its metadata says


def newest_checkpoint(root: Path, now_s: float, problems: list[str]) -> SavedCheckpoint | None:
    """The newest checkpoint whose manifest can be read; those that cannot are named in `problems`."""
    remote = Remote.of(root)
    if remote is None:
        names = [path.name for path in root.iterdir()] if root.is_dir() else []
    else:
        names = list(remote.listing(root))
    steps = {int(found[1]): name for name in names if (found := STEP_FOLDER.fullmatch(name))}
    for step in sorted(steps, reverse=True):
        try:
            found_one = _read(root / steps[step], step, remote, now_s)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{root.parent.name}/{root.name}/{steps[step]}: {type(error).__name__}: {error}")
            continue
        if found_one is not None:
            return found_one
    return None


def _read(folder: Path, step: int, remote: Remote | None, now_s: float) -> SavedCheckpoint | None:
    """None for one without a manifest: it is being written, or removed."""
    path = folder / MANIFEST_FILE
    if remote is None:
        if not path.exists():
            return None
        text, modified_s = path.read_text(), path.stat().st_mtime
    else:
        entry, data = remote.find(path), remote.read(path)
        if entry is None or data is None:
            return None
        text, modified_s = data.decode(), entry.modified_s
    manifest = json.loads(text)
    size = sum(int(file["bytes"]) for file in manifest["files"].values())
    mark = str(manifest.get("mark") or "")
    meta = folder / Path(f"{mark}{META_FILE}").name
    steps = _steps_of(lambda: meta.read_bytes() if remote is None else remote.read(meta))
    return SavedCheckpoint(step, max(0.0, now_s - modified_s), size, steps)


def _steps_of(read: Callable[[], bytes | None]) -> int | None:
    try:
        found = json.loads(read() or b"{}").get("num_iterations")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, int) else None

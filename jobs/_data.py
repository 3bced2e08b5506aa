"""Which data a run trains on: found or fetched once, then pinned by name in the run's folder."""

from __future__ import annotations

import logging
from pathlib import Path

from nanochat_ray.config import RunSettings
from nanochat_ray.corpus.reader import DataManifest, scan_data
from nanochat_ray.corpus.shards import PUBLISHED, download_shards
from nanochat_ray.corpus.world import write_world
from nanochat_ray.run_dir import DATA_FILE, RunDir, differences, read_json, storage_path, write_json

logger = logging.getLogger("nanochat_ray")

WORLD_SEED = 42
DEFAULT_SHARDS = 8


def world_folder(storage: str | None) -> Path:
    """Where the embedded corpus lies; generated on first use."""
    folder = storage_path(storage) / f"embedded_world_{WORLD_SEED}"
    write_world(folder, WORLD_SEED)
    return folder


def pinned_world(run_dir: RunDir, storage: str | None) -> Path | None:
    """The embedded corpus' folder if the run was begun with it, else None."""
    path = run_dir.root / DATA_FILE
    source = DataManifest.from_json(read_json(path)).source if path.exists() else None
    return world_folder(storage) if source and Path(source).name == f"embedded_world_{WORLD_SEED}" else None


def data_name(settings: RunSettings, device: str) -> str:
    """The data to take: what was asked for, else the embedded corpus without a GPU and climbmix with one."""
    return settings.data or ("climbmix" if device.startswith("cuda") else "embedded")


def pin_data(settings: RunSettings, run_dir: RunDir, device: str, n_shards: int | None = None) -> DataManifest:
    """The run's data: as pinned at its first stage, or found now and pinned.

    Raises ValueError if other data is asked for than what the run was begun with.
    """
    path = run_dir.root / DATA_FILE
    if path.exists():
        pinned = DataManifest.from_json(read_json(path))
        if settings.data is None and settings.val_shard is None and settings.max_shards is None:
            return pinned
    manifest = find_data(settings, data_name(settings, device), n_shards)
    if path.exists():
        if pinned.hash != manifest.hash:
            changed = differences(pinned.to_json(), manifest.to_json())
            raise ValueError(
                "this run was begun with other data:\n  " + "\n  ".join(changed[:10])
                + f"\nGive the same data, another --model-tag, or delete {run_dir.root}."
            )
    write_json(path, manifest.to_json())
    return manifest


def find_data(settings: RunSettings, name: str, n_shards: int | None) -> DataManifest:
    """Scan a folder or URI, generate the embedded corpus, or fetch a published set."""
    val_shard = settings.val_shard
    max_shards = settings.max_shards
    if name == "embedded":
        source = str(world_folder(settings.storage))
    elif name in PUBLISHED:
        n_train = max_shards or n_shards or DEFAULT_SHARDS
        source = str(download_shards(name, n_train, storage_path(settings.storage)))
        val_shard = val_shard or PUBLISHED[name].val_shard
        max_shards = n_train  # whatever else lies in the folder
    else:
        source = name
    return scan_data(source, settings.text_column, val_shard, settings.skip_corrupt, max_shards)

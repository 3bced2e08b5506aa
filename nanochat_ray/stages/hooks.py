"""What a training loop tells the outside: metrics, checkpoints, and whether it was asked to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from nanochat_ray.messages import Cursor, PackedBatch, World
from nanochat_ray.model.checkpoint import save_checkpoint
from nanochat_ray.report.tracker import Tracker
from nanochat_ray.run_dir import CHECKPOINTS, STOP_FILE, check_writer, writing_as

Metrics = dict[str, Any]
OpenBatches = Callable[[Cursor, int], Iterator[PackedBatch]]  # (cursor, first step) -> this rank's batches from there

SAVE_INTERVAL_S = 600.0


@dataclass(frozen=True)
class TrainingState:
    """All that a checkpoint holds. Tensors are on the CPU and only on rank 0."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    meta: dict[str, Any]


class Hooks(Protocol):
    """The loop's way out. `save` is called on every rank, the others on rank 0 only."""

    def report(self, step: int, metrics: Metrics) -> None: ...

    def save(self, step: int, state: TrainingState) -> None: ...

    def stop_requested(self) -> bool: ...

    def save_due(self) -> bool:
        """Whether the time-based checkpoint is due; only asked when no `save_every` is set."""
        ...


class FolderHooks:
    """Hooks that write into the stage's folder: metrics (and wandb), and checkpoints guarded by the run's lease."""

    def __init__(self, stage_folder: Path, lease_epoch: int, world: World, tracker: Tracker | None):
        self.folder = stage_folder
        self.lease_epoch = lease_epoch
        self.world = world
        self.tracker = tracker
        self._last_save_s = time.monotonic()

    def report(self, step: int, metrics: Metrics) -> None:
        if self.tracker is not None:
            self.tracker.log(step, metrics)

    def save(self, step: int, state: TrainingState) -> None:
        if self.world.rank == 0:
            run_root = self.folder.parent
            save_checkpoint(
                self.folder / CHECKPOINTS, step, state.model, state.optimizer, state.meta,
                guard=lambda: writing_as(run_root, self.lease_epoch),
            )
        self._last_save_s = time.monotonic()

    def stop_requested(self) -> bool:
        check_writer(self.folder.parent, self.lease_epoch)  # an orphan of a job that was followed by another ends here
        return (self.folder / STOP_FILE).exists()

    def save_due(self) -> bool:
        return time.monotonic() - self._last_save_s > SAVE_INTERVAL_S

"""What pretraining and SFT share around an optimizer step: sums over ranks, bits per byte, loop state, checkpoints."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat_ray.messages import Cursor, PackCounts, PackedBatch, PackedRows, World
from nanochat_ray.metrics.bits_per_byte import bits_per_byte, evaluate_bpb
from nanochat_ray.model.checkpoint import Checkpoint, latest_checkpoint, open_checkpoint
from nanochat_ray.model.gpt import GPT
from nanochat_ray.stages.hooks import Hooks, TrainingState
from nanochat_ray.stages.ranks import sum_over_ranks
from nanochat_ray.stages.staging import micro_batches
from nanochat_ray.stages.strategy import Strategy
from nanochat_ray.text.packing import rank_part

EMA_DECAY = 0.9
UNTIMED_STEPS = 10  # steps left out of the training time: allocation, compilation, cold caches
GC_INTERVAL_STEPS = 5000


@dataclass
class LoopState:
    """Where a training loop stands; saved in every checkpoint as JSON."""

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    progress: float = 0.0
    loss_ema: float = 0.0
    training_time_s: float = 0.0
    val_bpb: float | None = None
    min_val_bpb: float | None = None
    counts: PackCounts = field(default_factory=PackCounts)  # of all rows trained on

    def to_json(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_json(values: dict) -> LoopState:
        parts = {"cursor": Cursor.from_json(values["cursor"]), "counts": PackCounts(**values["counts"])}
        return LoopState(**{**values, **parts})

    def take(self, batch: PackedBatch) -> None:
        """A step on this batch is done."""
        self.cursor, self.progress = batch.cursor, batch.progress
        self.step += 1

    def smooth(self, loss: float) -> float:
        """Fold a loss in; returns the debiased moving average as it stands after this step.

        An infinite loss, whose step float16's scaler skips, is left out.
        """
        loss = loss if math.isfinite(loss) else self.loss_ema
        self.loss_ema = EMA_DECAY * self.loss_ema + (1 - EMA_DECAY) * loss
        return self.loss_ema / (1 - EMA_DECAY ** (self.step + 1))

    def note_bpb(self, bpb: float | None) -> None:
        self.val_bpb = bpb
        if bpb is not None:
            self.min_val_bpb = bpb if self.min_val_bpb is None else min(bpb, self.min_val_bpb)


def count_targets(batch: PackedBatch) -> int:
    return int(batch.mask[:, 1:].sum()) if batch.mask is not None else batch.tokens[:, 1:].size


def agree(batch_targets: int, hooks: Hooks, world: World, timed_saves: bool) -> tuple[int, bool, bool]:
    """The step's target count over all ranks, and rank 0's word on stopping and on a time-based checkpoint."""
    stop = save = False
    if world.rank == 0:
        stop = hooks.stop_requested()
        save = timed_saves and hooks.save_due()
    counts = sum_over_ranks([batch_targets, stop, save], world)
    return int(counts[0]), counts[1] > 0, counts[2] > 0


@torch.inference_mode()
def validation_bpb(
    model: GPT, rows: PackedRows, token_bytes: Tensor, device_batch_size: int, world: World
) -> float | None:
    """Bits per byte over a fixed set of rows, dealt over the ranks; None if no target has a byte."""
    part = rank_part(len(rows), world.rank, world.world_size)
    own = PackedRows(rows.tokens[part], None if rows.mask is None else rows.mask[part])
    nats, total_bytes = evaluate_bpb(model, micro_batches(own, device_batch_size, world.device), token_bytes)
    sums = sum_over_ranks([nats, total_bytes], world)
    return bits_per_byte(sums[0], int(sums[1])) if sums[1] else None


def synchronize(device: str) -> None:
    """Wait for the device, so that a clock read next is true."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def mfu(flops_per_s: float, peak_flops_per_s: float) -> float | None:
    """Percent of the hardware's bf16 peak, None where that is not known."""
    return 100 * flops_per_s / peak_flops_per_s if math.isfinite(peak_flops_per_s) else None


def checkpoint_to_go_on_from(root: Path, world: World, hooks: Hooks) -> Checkpoint | None:
    """The newest checkpoint that verifies on rank 0, for every rank: another node's view of a folder may lag behind."""
    found = latest_checkpoint(root, hooks.beat) if world.rank == 0 else None
    step = int(sum_over_ranks([found.step + 1 if found else 0], world)[0]) - 1
    if step < 0:
        return None
    return found or open_checkpoint(root, step, hooks.beat)


def check_loss(loss: float, step: int, dtype: torch.dtype) -> None:
    """Raise FloatingPointError where training has diverged, before that gets into the weights or a checkpoint.

    In float16 the loss scaler has the last word.
    """
    if not math.isfinite(loss) and dtype != torch.float16:
        raise FloatingPointError(
            f"the loss at step {step} is {loss}: training has diverged. Lower the learning rates, or go back with "
            "--resume-from-step; the checkpoints before are kept"
        )


@contextmanager
def evaluating(strategy: Strategy, hooks: Hooks) -> Iterator[GPT]:
    """The network with its whole weights; each of its passes is a sign of life, since evaluations may take long."""
    with strategy.full_weights() as model:
        handle = model.register_forward_hook(lambda *_: hooks.beat())
        try:
            yield model
        finally:
            handle.remove()


class Batches:
    """A rank's batches, and how long the loop waited for them."""

    def __init__(self, batches: Iterator[PackedBatch]):
        self._batches = batches
        self.wait_s = 0.0  # for the last one

    def next(self) -> PackedBatch | None:
        """The next batch, None behind the last."""
        begun = time.perf_counter()
        batch = next(self._batches, None)
        self.wait_s = time.perf_counter() - begun
        return batch


class Saver:
    """Hands checkpoints to the hooks and adds up how long training stood still for them. For all ranks."""

    def __init__(self, strategy: Strategy, hooks: Hooks, resumed_at: int | None):
        self._strategy, self._hooks = strategy, hooks
        self.saved_at = resumed_at
        self._stall_s = 0.0

    def save(self, step: int, meta: dict[str, Any]) -> None:
        begun = time.perf_counter()
        weights, moments = self._strategy.model_tensors(), self._strategy.optimizer_tensors()
        meta = meta | {"optimizer": self._strategy.optimizer_name, "strategy": self._strategy.extra_state()}
        self._hooks.save(step, TrainingState(weights, moments, meta))
        self.saved_at = step
        self._stall_s += time.perf_counter() - begun

    def take_stall_s(self) -> float:
        """Seconds that training stood still since this was asked last."""
        stall_s, self._stall_s = self._stall_s, 0.0
        return stall_s


def load_checkpoint(strategy: Strategy, checkpoint: Checkpoint) -> LoopState:
    """Take over a checkpoint of the same stage; ValueError if another optimizer wrote it."""
    written_by = checkpoint.meta["optimizer"]
    if written_by != strategy.optimizer_name:
        raise ValueError(
            f"{checkpoint.folder} was trained with the optimizer {written_by}, --parallel {strategy.name} has "
            f"{strategy.optimizer_name}; give the same --parallel, or another --model-tag"
        )
    strategy.load(checkpoint.model_tensors(), checkpoint.optimizer_tensors() or {})
    strategy.load_extra_state(checkpoint.meta["strategy"])
    return LoopState.from_json(checkpoint.meta["loop"])


class Clock:
    """Seconds of one step, device included."""

    def __init__(self, device: str):
        self.device = device
        synchronize(device)
        self.start = time.perf_counter()

    def seconds(self) -> float:
        synchronize(self.device)
        return time.perf_counter() - self.start


class QuietGarbageCollector:
    """Collector pauses moved out of the steps: freeze after the first one, then collect at long intervals."""

    def __enter__(self) -> QuietGarbageCollector:
        self.steps = 0
        return self

    def after_step(self) -> None:
        self.steps += 1
        if self.steps == 1:
            gc.collect()
            gc.freeze()
            gc.disable()
        elif self.steps % GC_INTERVAL_STEPS == 0:
            gc.collect()

    def __exit__(self, *exc: object) -> None:
        gc.enable()
        gc.unfreeze()

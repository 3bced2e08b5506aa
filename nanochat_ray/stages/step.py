"""What pretraining and SFT share: the gradient of one optimizer step, sums over ranks, bits per byte, loop state."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nanochat_ray.messages import Cursor, PackedBatch, PackedRows, World
from nanochat_ray.metrics.bits_per_byte import bits_per_byte, evaluate_bpb
from nanochat_ray.model.gpt import GPT
from nanochat_ray.stages.hooks import Hooks
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

    def to_json(self) -> dict:
        return {**asdict(self), "cursor": self.cursor.to_json()}

    @staticmethod
    def from_json(values: dict) -> LoopState:
        return LoopState(**{**values, "cursor": Cursor.from_json(values["cursor"])})

    def smooth(self, loss: float) -> float:
        """Fold a loss in; returns the debiased moving average as it stands after this step."""
        self.loss_ema = EMA_DECAY * self.loss_ema + (1 - EMA_DECAY) * loss
        return self.loss_ema / (1 - EMA_DECAY ** (self.step + 1))

    def note_bpb(self, bpb: float | None) -> None:
        self.val_bpb = bpb
        if bpb is not None:
            self.min_val_bpb = bpb if self.min_val_bpb is None else min(bpb, self.min_val_bpb)


def micro_batches(
    rows: PackedBatch | PackedRows, device_batch_size: int, device: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs (b, T) int32 and targets (b, T) int64 with -1 where unsupervised, `device_batch_size` rows at a time."""
    for start in range(0, len(rows.tokens), device_batch_size):
        chunk = slice(start, start + device_batch_size)
        tokens = torch.from_numpy(rows.tokens[chunk].astype(np.int32))  # (b, T+1); a fresh buffer each time
        targets = tokens[:, 1:].long()
        if rows.mask is not None:
            targets[torch.from_numpy(~rows.mask[chunk, 1:])] = -1
        inputs = tokens[:, :-1].contiguous()
        if device.startswith("cuda"):
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        yield inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)


def count_targets(batch: PackedBatch) -> int:
    return int(batch.mask[:, 1:].sum()) if batch.mask is not None else batch.tokens[:, 1:].size


def sum_over_ranks(values: list[float], world: World) -> list[float]:
    """Element-wise sum over all ranks, in double precision."""
    if world.world_size == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(total)
    return total.tolist()


def accumulate_gradients(model, batch: PackedBatch, n_targets: int, device_batch_size: int, world: World) -> float:
    """Add the gradient of the step's mean loss; returns the mean loss over the targets of all ranks.

    Every target counts 1 / n_targets whatever its micro-batch or rank. The optimizer averages gradients over ranks,
    so each rank's share is multiplied by the number of ranks.
    """
    total = torch.zeros((), device=world.device)
    for inputs, targets in micro_batches(batch, device_batch_size, world.device):
        loss = model(inputs, targets, reduction="sum")
        (loss * (world.world_size / n_targets)).backward()
        total += loss.detach()
    return sum_over_ranks([float(total)], world)[0] / n_targets


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

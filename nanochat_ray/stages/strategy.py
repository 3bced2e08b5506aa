"""What a training loop needs of its ranks: gradients, updates and state behind one object (kinds: parallel.py)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from nanochat_ray.messages import PackedBatch, World
from nanochat_ray.model.checkpoint import model_tensors
from nanochat_ray.model.gpt import GPT
from nanochat_ray.stages.ranks import sum_over_ranks
from nanochat_ray.stages.staging import micro_batches

DEEPSPEED_OPTIMIZER = "DeepSpeed MuonWithAuxAdam"
Objective = Callable[[Tensor], Tensor]  # from -log p (B, T) of a micro-batch's targets to the sum to minimise


class Strategy(ABC):
    """Gradients and updates of one run. All ranks call each method together; once a step `set_schedule`, `accumulate`
    and `update`, in this order, since DeepSpeed runs Muon at the end of the last backward pass."""

    name: str
    optimizer_name: str
    warnings: tuple[str, ...] = ()  # what the log should say once
    notes: tuple[str, ...] = ()  # what else a reader of the report should know

    def __init__(self, model: GPT, world: World) -> None:
        self.model, self.world = model, world

    @abstractmethod
    def set_schedule(self, lr_multiplier: float, momentum: float, weight_decay: float) -> None:
        """Set this step's learning rates, as multiples of the initial ones, and Muon's momentum and decay."""

    def accumulate(self, batch: PackedBatch, n_targets: int, device_batch_size: int) -> float:
        """Add the gradient of the step's mean loss; returns that loss over the targets of all ranks.

        `n_targets` counts the targets of all ranks, at least 1. Each counts the same, whatever its micro-batch or rank.
        A rank may have one row less than others, or none.
        """
        total = torch.zeros((), device=self.world.device)
        n_steps = self.micro_steps(-(-len(batch.tokens) // device_batch_size))
        # Gradients are averaged over ranks, so each rank's share is multiplied by their number.
        weight = self.world.world_size / n_targets
        steps = padded_micro_batches(batch, device_batch_size, self.world.device, n_steps)
        for i, (inputs, targets) in enumerate(steps):
            total += self.backward(inputs, targets, weight, last=i == n_steps - 1)
        return sum_over_ranks([float(total)], self.world)[0] / n_targets

    def accumulate_objectives(
        self, micro: Sequence[tuple[Tensor, Tensor, Objective]], n_targets: int
    ) -> float:
        """Add the gradient of objectives, summed over this rank's micro-batches and all ranks and divided by
        `n_targets`, at least 1; returns that value. Each is inputs and targets (B, T) with its objective."""
        total = torch.zeros((), device=self.world.device)
        n_steps = self.micro_steps(len(micro))
        idle = torch.zeros(1, 1, dtype=torch.int64, device=self.world.device)
        weight = self.world.world_size / n_targets
        for i in range(n_steps):
            inputs, targets, objective = micro[i] if i < len(micro) else (idle, idle - 1, torch.sum)
            total += self.backward(inputs, targets, weight, last=i == n_steps - 1, objective=objective)
        return sum_over_ranks([float(total)], self.world)[0] / n_targets

    def micro_steps(self, n_own: int) -> int:
        """How many micro-batches this rank runs that has rows for `n_own`; the others are empty."""
        return n_own

    @abstractmethod
    def backward(
        self, inputs: Tensor, targets: Tensor, weight: float, last: bool, objective: Objective | None = None
    ) -> Tensor:
        """Add `weight` times the gradient of one micro-batch's summed loss or objective; returns that, detached."""

    @abstractmethod
    def scale_initial_lr(self, frac: float) -> None:
        """Multiply all initial learning rates."""

    @abstractmethod
    def update(self) -> float:
        """Average gradients over ranks, apply the optimizer, drop gradients; returns the norm of the average.

        In float16 the update is skipped where a gradient is not finite, and the norm is inf.
        """

    def full_weights(self) -> AbstractContextManager[GPT]:
        """The plain network with this step's weights, for evaluation and sampling on each rank for itself."""
        return nullcontext(self.model)

    def model_tensors(self) -> dict[str, Tensor]:
        """Copies of all weights by name on rank 0's CPU; empty elsewhere."""
        if self.world.rank != 0:
            return {}
        return model_tensors(self.model)

    @abstractmethod
    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state by "<parameter>.<slot>" on rank 0's CPU; empty elsewhere. Free of the world size."""

    @abstractmethod
    def load(self, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor] | None) -> None:
        """Take over what `model_tensors` and `optimizer_tensors` gave on rank 0, on every rank; None: weights only.

        ValueError if names or shapes do not fit.
        """

    def extra_state(self) -> dict[str, Any]:
        """What else to save, as JSON."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `extra_state` gave; {} changes nothing."""
        return None

    def describe(self) -> dict[str, Any]:
        """For the report."""
        notes = [*self.warnings, *self.notes]
        return {"parallel": self.name, "optimizer": self.optimizer_name, "optimizer_notes": notes}

    def close(self) -> None:
        """Give back what the strategy holds besides memory; it is of no use afterwards."""
        return None


def summed_loss(
    network: Callable[..., Tensor], inputs: Tensor, targets: Tensor, objective: Objective | None
) -> Tensor:
    """A micro-batch's cross-entropy, summed, or what its objective makes of that of each target."""
    if objective is None:
        return network(inputs, targets, reduction="sum")
    return objective(network(inputs, targets, reduction="none"))


def padded_micro_batches(
    batch: PackedBatch, device_batch_size: int, device: str, n_steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The micro-batches of `staging.micro_batches`, then empty ones up to `n_steps`: one row without a target."""
    yield from micro_batches(batch, device_batch_size, device)
    n_rows, T = batch.tokens.shape[0], batch.tokens.shape[1] - 1
    for _ in range(n_steps - -(-n_rows // device_batch_size)):
        yield (
            torch.zeros(1, T, dtype=torch.int32, device=device),
            torch.full((1, T), -1, dtype=torch.int64, device=device),
        )

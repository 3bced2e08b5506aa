"""What several ranks share of one training step: gradients and updates behind one object, a way each for `--parallel`.

| name | network | gradients | optimizer state |
| --- | --- | --- | --- |
| sharded | whole on each rank | whole, reduced once per step | each rank owns a part, as ZeRO 1 (arXiv:1910.02054) |
| ddp | whole | whole, reduced during the last backward pass | whole on each rank |
| zero1, zero2, zero3 | zero3: cut up | from zero2 on: cut up | cut up; DeepSpeed's own Muon (stages/zero.py) |

`sharded` and `ddp` compute the same, and the same as one process.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from nanochat_ray.messages import World
from nanochat_ray.model.checkpoint import load_weights
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.optim import MuonAdamW, Rates, build_optimizer
from nanochat_ray.stages.strategy import Objective, Strategy, summed_loss

STRATEGIES = ("sharded", "ddp", "zero1", "zero2", "zero3")
INSTALL_DEEPSPEED = "pip install -e '.[deepspeed]'"
LEAST_LOSS_SCALE = 2.0**-16  # no sound gradient overflows at this one


def check_strategy(name: str, dtype: torch.dtype | None = None) -> None:
    """Whether a strategy can run here; cheap, imports nothing large.

    ValueError for an unknown name, a missing package, or a compute dtype that the strategy cannot train in.
    """
    if name not in STRATEGIES:
        raise ValueError(f"parallel {name!r}; choose from {', '.join(STRATEGIES)}")
    if not name.startswith("zero"):
        return
    missing = [package for package in ("deepspeed", "ninja") if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(
            f"--parallel {name} needs {' and '.join(missing)}, not installed here: {INSTALL_DEEPSPEED}; "
            "or take --parallel sharded, which needs nothing"
        )
    if dtype == torch.float16:
        raise ValueError(f"--parallel {name} does not train in float16; use bfloat16 or float32, or --parallel sharded")


def build_strategy(
    name: str, model: GPT, world: World, rates: Rates, *, dtype: torch.dtype = torch.float32, compiled: bool = False
) -> Strategy:
    """The strategy of that name around a network, which must be the same on every rank.

    `dtype` is the compute dtype; `compiled`: forward passes of training go through torch.compile. With more than one
    rank torch.distributed must be running. ValueError as `check_strategy`.
    """
    check_strategy(name, dtype)
    if name == "sharded":
        return Sharded(model, world, rates, dtype, compiled)
    if name == "ddp":
        return DDP(model, world, rates, dtype, compiled)
    from nanochat_ray.stages.zero import Zero

    return Zero(name, model, world, rates, compiled)


@dataclass
class LossScaler:
    """Dynamic loss scaling for float16 (arXiv:1710.03740): halve after an overflow, double after a calm stretch."""

    scale: float = 65536.0
    good_steps: int = 0
    growth_interval: int = 2000

    def note(self, finite: bool) -> None:
        """Take in whether a step's gradients were finite, the same on every rank.

        Raises FloatingPointError when they never are.
        """
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale *= 0.5
            if self.scale < LEAST_LOSS_SCALE:
                raise FloatingPointError("gradients are not finite at any loss scale: training has diverged")
        elif self.good_steps == self.growth_interval:
            self.scale, self.good_steps = self.scale * 2, 0


class Replicated(Strategy):
    """The whole network on each rank, and our own optimizer."""

    optimizer_name = "MuonAdamW"
    optimizer: MuonAdamW
    forward: Callable[..., Tensor]

    def __init__(self, model: GPT, world: World, dtype: torch.dtype) -> None:
        super().__init__(model, world)
        self.scaler = LossScaler() if dtype == torch.float16 else None

    def backward(
        self, inputs: Tensor, targets: Tensor, weight: float, last: bool, objective: Objective | None = None
    ) -> Tensor:
        loss = summed_loss(self.forward, inputs, targets, objective)
        (loss * (weight * (self.scaler.scale if self.scaler else 1))).backward()
        return loss.detach()

    def set_schedule(self, lr_multiplier: float, momentum: float, weight_decay: float) -> None:
        self.optimizer.set_schedule(lr_multiplier, momentum, weight_decay)

    def scale_initial_lr(self, frac: float) -> None:
        self.optimizer.scale_initial_lr(frac)

    def update(self) -> float:
        norm = self.optimizer.step(loss_scale=self.scaler.scale if self.scaler else None)
        if self.scaler:
            self.scaler.note(math.isfinite(norm))
        self.optimizer.zero_grad()
        return norm

    def optimizer_tensors(self) -> dict[str, Tensor]:
        return self.optimizer.state_by_name() if self.optimizer.ranks.world_size > 1 or self.world.rank == 0 else {}

    def load(self, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor] | None) -> None:
        load_weights(self.model, dict(model))
        if optimizer is not None:
            self.optimizer.load_state_by_name(optimizer)

    def extra_state(self) -> dict[str, Any]:
        return {"loss_scaler": asdict(self.scaler)} if self.scaler else {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        if self.scaler and "loss_scaler" in state:
            self.scaler = LossScaler(**state["loss_scaler"])


class Sharded(Replicated):
    """Gradients reduced, state kept and Muon run in shares (model/optim.py); with one rank, a plain process.

    Reduction starts after the backward pass. A Muon group holds matrices of all layers and is complete only with the
    first layer's gradients, and a compiled network gives all gradients at once, so hooks in the backward pass would
    have nothing to overlap with; parts of the optimizer's step do overlap with each other.
    """

    name = "sharded"

    def __init__(self, model: GPT, world: World, rates: Rates, dtype: torch.dtype, compiled: bool) -> None:
        super().__init__(model, world, dtype)
        self.optimizer = build_optimizer(model, **asdict(rates), rank=world.rank, world_size=world.world_size)
        self.forward = torch.compile(model, dynamic=False) if compiled else model


class DDP(Replicated):
    """torch's DistributedDataParallel, and the whole optimizer on each rank."""

    name = "ddp"

    def __init__(self, model: GPT, world: World, rates: Rates, dtype: torch.dtype, compiled: bool) -> None:
        super().__init__(model, world, dtype)
        self.optimizer = build_optimizer(model, **asdict(rates))
        self.wrapped = None
        if world.world_size > 1:
            from torch.nn.parallel import DistributedDataParallel

            self.wrapped = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        network = self.wrapped or model
        self.forward = torch.compile(network, dynamic=False) if compiled else network

    def micro_steps(self, n_own: int) -> int:
        return max(1, n_own)  # every rank takes part in the reduction of its last backward pass

    def backward(
        self, inputs: Tensor, targets: Tensor, weight: float, last: bool, objective: Objective | None = None
    ) -> Tensor:
        with nullcontext() if last or self.wrapped is None else self.wrapped.no_sync():
            return super().backward(inputs, targets, weight, last, objective)

"""The optimizer: AdamW for tables and scalars, Muon for the matrices of the blocks, on 1 to W ranks with one code.

Each rank owns a part of the optimizer state: rows of the big tables, whole matrices of a Muon group; small tensors are
on every rank. A step averages the gradients while it hands them out, updates the owned parts and gathers the parameters
(ZeRO stage 1 and 2 in the words of arXiv:1910.02054; gradients and parameters themselves are full on each rank).
Nothing needs `torch.compile`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from nanochat_ray.model.checkpoint import snapshot
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.optim_shards import AdamWShard, MuonShard, OptimShard, ParamGroup, Pending, Ranks

SMALL_NUMEL = 1024  # AdamW tensors below this are not worth cutting up
SMEAR_LR = 0.2  # of smear and backout, whatever the width or the batch
REFERENCE_WIDTH = 768  # where the AdamW learning rates were tuned


@dataclass(frozen=True)
class Rates:
    """Learning rates at the reference width and batch, Muon's weight decay, and its two switches."""

    unembedding_lr: float
    embedding_lr: float
    matrix_lr: float
    scalar_lr: float
    weight_decay: float
    batch_lr_scale: float = 1.0
    muon_eq: bool = True
    muon_plus: bool = True


def parameter_groups(model: GPT, rates: Rates) -> list[ParamGroup]:
    """All parameters of a network, grouped by role, with their own learning rates."""
    named = dict(model.named_parameters())
    width_scale = (model.config.n_embd / REFERENCE_WIDTH) ** -0.5
    table_scale = width_scale * rates.batch_lr_scale
    scalar_lr = rates.scalar_lr * rates.batch_lr_scale
    groups: list[ParamGroup] = []

    def adamw(names: list[str], lr: float, betas: tuple[float, float], decay: float) -> None:
        groups.append(ParamGroup("adamw", names, [named[name] for name in names], lr, decay, betas))

    adamw(["lm_head.weight"], rates.unembedding_lr * table_scale, (0.8, 0.96), 0.01)
    adamw(["transformer.wte.weight"], rates.embedding_lr * table_scale, (0.8, 0.995), 0.001)
    tables = [name for name in named if name.startswith("value_embeds.")]
    adamw(tables, 0.5 * rates.embedding_lr * table_scale, (0.8, 0.995), 0.01)
    adamw(["resid_lambdas"], 0.01 * scalar_lr, (0.8, 0.95), 0.05)
    adamw(["x0_lambdas"], scalar_lr, (0.96, 0.95), 0.0)
    adamw(["smear_gate.weight", "smear_lambda", "backout_lambda"], SMEAR_LR, (0.8, 0.95), 0.0)

    matrices = [name for name in named if name.startswith("transformer.h.")]
    for shape in sorted({tuple(named[name].shape) for name in matrices}):
        names = [name for name in matrices if tuple(named[name].shape) == shape]
        params = [named[name] for name in names]
        groups.append(ParamGroup("muon", names, params, rates.matrix_lr * rates.batch_lr_scale, rates.weight_decay))

    grouped = [name for group in groups for name in group.names]
    assert sorted(grouped) == sorted(named), set(grouped) ^ set(named)
    return groups


def build_optimizer(model: GPT, *, rank: int = 0, world_size: int = 1, **rates: Any) -> MuonAdamW:
    """The optimizer of a network; `rates` are the fields of `Rates`.

    With world_size > 1 torch.distributed must be running.
    """
    chosen = Rates(**rates)
    return MuonAdamW(
        parameter_groups(model, chosen), rank=rank, world_size=world_size, muon_eq=chosen.muon_eq,
        muon_plus=chosen.muon_plus,
        orthogonalize_dtype=torch.bfloat16 if model.compute_dtype == torch.bfloat16 else torch.float32,
    )


class MuonAdamW:
    """AdamW and Muon over parameter groups, on this rank of `world_size`.

    Gradients are averaged over ranks; one that is missing counts as zero. All ranks call `step` and `state_by_name`
    together.
    """

    def __init__(
        self,
        groups: list[ParamGroup],
        *,
        rank: int = 0,
        world_size: int = 1,
        muon_eq: bool = True,
        muon_plus: bool = True,
        orthogonalize_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.groups, self.ranks = groups, Ranks(rank, world_size)
        self.shards: list[OptimShard] = []
        for group in groups:
            if group.kind == "muon":
                self.shards.append(MuonShard(group, self.ranks, muon_eq, muon_plus, orthogonalize_dtype))
                continue
            for name, param in zip(group.names, group.params, strict=True):
                self.shards.append(AdamWShard(group, name, param, self.ranks, cut=param.numel() >= SMALL_NUMEL))

    def set_schedule(self, lr_multiplier: float, momentum: float, weight_decay: float) -> None:
        """Set every group's learning rate to a multiple of its initial one, and the Muon groups' momentum and decay."""
        for group in self.groups:
            group.lr = group.initial_lr * lr_multiplier
            if group.kind == "muon":
                group.momentum, group.weight_decay = momentum, weight_decay

    def scale_initial_lr(self, frac: float) -> None:
        """Multiply the initial and the current learning rate of every group."""
        for group in self.groups:
            group.lr = group.initial_lr = group.initial_lr * frac

    @torch.no_grad()
    def step(self, loss_scale: float | None = None) -> float:
        """One update from the gradients, with communication and arithmetic of different parts overlapping.

        Returns the norm of the averaged gradient, all parameters taken together. With a `loss_scale` gradients are
        divided by it first, and if their norm is not finite nothing is updated, on any rank.
        """
        for shard in self.shards:
            shard.reduce()
        if loss_scale is not None:
            squared_norm = self._squared_norm([shard.receive(loss_scale) for shard in self.shards])
            if not math.isfinite(float(squared_norm.wait())):
                for shard in self.shards:
                    shard.take_gradient()
                return math.inf
            for shard in self.shards:
                shard.update()
        else:
            squares = []
            for shard in self.shards:
                squares.append(shard.receive())
                shard.update()
            squared_norm = self._squared_norm(squares)
        for shard in self.shards:
            shard.finish()
        return float(squared_norm.wait()) ** 0.5

    def _squared_norm(self, squares: list[Tensor]) -> Pending:
        """The squared norm under way to all ranks."""
        return self.ranks.sum(torch.stack(squares).sum())

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for group in self.groups:
            for param in group.params:
                param.grad = None

    @torch.no_grad()
    def state_by_name(self) -> dict[str, Tensor]:
        """Copies of the full state on the CPU by "<parameter>.<slot>", on rank 0; empty elsewhere. A collective.

        The result does not depend on the number of ranks.
        """
        full = chain.from_iterable(shard.full_state() for shard in self.shards)
        if self.ranks.rank == 0:
            return snapshot(full)
        deque(full, maxlen=0)  # takes part in the collectives
        return {}

    @torch.no_grad()
    def load_state_by_name(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the state that `state_by_name` gave, on each rank its own part; hyper-parameters stay as they are.

        Raises ValueError if a tensor is missing, unknown or of another shape; then nothing has changed.
        """
        shapes = {name: shape for shard in self.shards for name, shape in shard.state_shapes().items()}
        missing, unknown = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
        if missing or unknown:
            raise ValueError(
                f"optimizer state does not fit the model: {len(missing)} missing {missing[:3]}, "
                f"{len(unknown)} unknown {unknown[:3]} of {len(shapes)} tensors; was it saved with another model?"
            )
        for name, shape in shapes.items():
            found = tuple(tensors[name].shape)
            if found != shape:
                raise ValueError(f"optimizer state {name} has shape {found}, the model needs {shape}")
        for shard in self.shards:
            shard.load(tensors)

"""Sums over the ranks of a training run."""

from __future__ import annotations

import torch
import torch.distributed as dist

from nanochat_ray.messages import World


def sum_over_ranks(values: list[float], world: World) -> list[float]:
    """Element-wise sum over all ranks, in double precision."""
    if world.world_size == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(total)
    return total.tolist()

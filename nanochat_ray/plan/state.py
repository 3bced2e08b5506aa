"""Bytes of parameters, gradients, optimizer state and the optimizer's own step on one rank, by what ranks share.

For `sharded` and `ddp` nothing is estimated: the network and its optimizer are built without memory (torch's meta
device) and their tensors are counted. For DeepSpeed's stages the numbers follow its source (0.19.8, stage_1_and_2.py
and stage3.py) and are modelled.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat_ray.config import ModelConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.optim import MuonAdamW, build_optimizer
from nanochat_ray.model.optim_shards import AdamWShard, MuonShard, OptimShard

FP32_BYTES = 4
DEEPSPEED_BUCKET_ELEMENTS = 500_000_000  # its default for reduce_bucket_size; one such buffer is there while training
DEEPSPEED_PREFETCH_ELEMENTS = 50_000_000  # parameters that stage 3 gathers ahead
ANY_RATES = {"unembedding_lr": 1.0, "embedding_lr": 1.0, "matrix_lr": 1.0, "scalar_lr": 1.0, "weight_decay": 0.0}


@dataclass(frozen=True)
class StateBytes:
    """What a rank holds; on rank 0, which has the most of everything."""

    weights: int  # parameters and rotary tables
    gradients: int
    optimizer: int  # between two steps
    buffers: int  # for communication, while the network runs
    update: int  # besides the above, at the greatest during the optimizer's step
    exact: bool  # whether weights, gradients and optimizer are counted, not modelled


class Shapes:
    """A network without memory, for counting. Building one takes a tenth of a second."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        with torch.device("meta"):
            self.model = GPT(config, dtype)
        # As `init_weights` leaves them.
        for table in self.model.tables:
            table.to(torch.float32 if dtype == torch.float16 else dtype)

    @property
    def weight_bytes(self) -> int:
        return n_bytes([*self.model.parameters(), *self.model.buffers()])

    @property
    def gradient_bytes(self) -> int:
        return n_bytes(self.model.parameters())

    @property
    def n_parameters(self) -> int:
        return sum(param.numel() for param in self.model.parameters())

    def optimizer(self, world_size: int) -> MuonAdamW:
        """Rank 0's optimizer."""
        return build_optimizer(self.model, rank=0, world_size=world_size, **ANY_RATES)


def state_bytes(shapes: Shapes, parallel: str, world_size: int) -> StateBytes:
    """What rank 0 of `world_size` holds with a strategy of stages/parallel.py."""
    if parallel.startswith("zero"):
        return _deepspeed(shapes, int(parallel.removeprefix("zero")), world_size)
    optimizer = shapes.optimizer(world_size if parallel == "sharded" else 1)
    state = sum(n_bytes(state_tensors(shard)) for shard in optimizer.shards)
    return StateBytes(
        shapes.weight_bytes, shapes.gradient_bytes, state, 0, _update_bytes(optimizer), exact=True
    )


def state_tensors(shard: OptimShard) -> list[Tensor]:
    """The state that a part of the optimizer keeps between steps."""
    if isinstance(shard, MuonShard):
        return [shard.momentum_buffer, shard.second_moment]
    assert isinstance(shard, AdamWShard)
    return [shard.exp_avg, shard.exp_avg_sq, shard.steps]


def n_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _update_bytes(optimizer: MuonAdamW) -> int:
    """The most that `MuonAdamW.step` takes besides state and gradients.

    All parts start to reduce first: Muon's gradients are stacked, and with several ranks each part gets its slice. Then
    part by part a stack goes, Muon's arithmetic comes and goes, and the gathered parameters come.
    """
    before = [_reducing(shard) for shard in optimizer.shards]
    most = now = sum(before)
    for shard, bytes_before in zip(optimizer.shards, before, strict=True):
        arithmetic, after = _updating(shard)
        slice_bytes = min(bytes_before, _slice_bytes(shard))
        most = max(most, now - bytes_before + slice_bytes + max(arithmetic, after - slice_bytes))
        now += after - bytes_before
    return max(most, now)


def _slice_bytes(shard: OptimShard) -> int:
    """The averaged gradient that this rank gets."""
    if isinstance(shard, MuonShard):
        return shard.slice_rows * n_bytes(shard.group.params[:1])
    assert isinstance(shard, AdamWShard)
    cut = shard.ranks.world_size > 1
    return shard.slice_rows * _row_bytes(shard) if cut else 0


def _row_bytes(shard: AdamWShard) -> int:
    return n_bytes([shard.param]) // max(1, len(shard.param))


def _reducing(shard: OptimShard) -> int:
    """Bytes between `reduce` and `receive`."""
    world_size = shard.ranks.world_size
    if isinstance(shard, MuonShard):
        stack = _slice_bytes(shard) * world_size
        return stack + (_slice_bytes(shard) if world_size > 1 else 0)
    assert isinstance(shard, AdamWShard)
    return _slice_bytes(shard) + _padding_copy(shard)


def _padding_copy(shard: AdamWShard) -> int:
    """A copy of a table whose rows do not divide by the ranks, padded."""
    n_rows = shard.slice_rows * shard.ranks.world_size
    return n_rows * _row_bytes(shard) if shard.ranks.world_size > 1 and n_rows != len(shard.param) else 0


def _updating(shard: OptimShard) -> tuple[int, int]:
    """Bytes of the arithmetic, and those that stay until `finish`."""
    world_size = shard.ranks.world_size
    if isinstance(shard, AdamWShard):
        own = _slice_bytes(shard)
        return own, own + _padding_copy(shard)
    assert isinstance(shard, MuonShard)
    own = len(shard.own) * n_bytes(shard.group.params[:1])
    m, n = shard.group.params[0].shape
    if shard.dtype == torch.float32:  # two rounds' matrices, and the Gram matrix with its polynomial
        arithmetic = 2 * own + 2 * own * min(m, n) // max(m, n)
    else:  # the direction, its square, and what went in, in half the bytes
        arithmetic = 5 * own // 2
    gathered = _slice_bytes(shard) * world_size + _slice_bytes(shard) if world_size > 1 else 0
    return arithmetic, gathered


def _deepspeed(shapes: Shapes, stage: int, world_size: int) -> StateBytes:
    """All parameters are fp32. Stages 1 and 2 keep a second copy of a rank's part; moments are of the part."""
    whole = FP32_BYTES * shapes.n_parameters
    part = -(-whole // world_size)
    rotary = n_bytes(shapes.model.buffers())
    muon = sum(p.numel() for name, p in shapes.model.named_parameters() if name.startswith("transformer.h."))
    moments = -(-FP32_BYTES * (muon + 2 * (shapes.n_parameters - muon)) // world_size)
    bucket = FP32_BYTES * DEEPSPEED_BUCKET_ELEMENTS
    if stage == 3:
        largest = max(FP32_BYTES * param.numel() for param in shapes.model.parameters())
        live = FP32_BYTES * DEEPSPEED_PREFETCH_ELEMENTS + largest
        return StateBytes(part + rotary, part, moments, bucket + live, whole // 2, exact=False)
    gradients = whole if stage == 1 else part + whole // max(1, shapes.model.config.n_layer)
    return StateBytes(whole + rotary, gradients, part + moments, bucket, part + bucket, exact=False)

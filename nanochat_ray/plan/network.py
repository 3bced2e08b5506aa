"""What ranks send each other in a step, and how long that takes."""

from __future__ import annotations

from dataclasses import dataclass

from nanochat_ray.model.optim_shards import AdamWShard, MuonShard
from nanochat_ray.plan.hardware import Machines
from nanochat_ray.plan.state import FP32_BYTES, Shapes, n_bytes

EFFICIENCY = 0.8  # of a link's rate that collectives reach
NODE_COUNTS = (1, 2, 4, 8, 16, 32, 64)
INTERCONNECTS_GBIT = (100.0, 400.0, 800.0, 3200.0)  # per node: Ethernet, one NIC, two, eight
BACKWARD_FRAC = 2 / 3  # of a micro-step
OVERLAP = {
    "sharded": "nothing hidden: it begins after the backward pass",
    "ddp": "hidden behind the backward pass of the last micro-step",
    "zero1": "nothing hidden", "zero2": "nothing hidden", "zero3": "nothing hidden",
}


@dataclass(frozen=True)
class Traffic:
    """Of one optimizer step."""

    sent_bytes: int  # by one rank
    seconds: float | None  # on the wire; None: unknown link
    exposed_s: float | None  # of these, while nothing is computed


def sent_bytes(shapes: Shapes, parallel: str, ranks: int, micro_steps: int) -> int:
    """Bytes that a rank sends in one optimizer step, by ring collectives: (W - 1)/W of a tensor for each gather or
    reduce-scatter, twice that for an all-reduce. Exact for `sharded` and `ddp`, paddings included."""
    if ranks == 1:
        return 0
    if parallel == "ddp":
        return 2 * _ring(shapes.gradient_bytes, ranks)
    if parallel == "sharded":
        total = 0
        for shard in shapes.optimizer(ranks).shards:
            if isinstance(shard, MuonShard):
                total += shard.slice_rows * ranks * n_bytes(shard.group.params[:1])
                continue
            assert isinstance(shard, AdamWShard)
            rows = shard.slice_rows * ranks if shard.cut else len(shard.param)
            total += rows * n_bytes([shard.param]) // len(shard.param)
        return 2 * _ring(total, ranks)
    whole = _ring(FP32_BYTES * shapes.n_parameters, ranks)
    if parallel == "zero1":
        return 2 * whole
    if parallel == "zero2":
        return (micro_steps + 1) * whole
    return 4 * micro_steps * whole  # weights for both passes, gradients by all-reduce


def _ring(n: int, ranks: int) -> int:
    return n * (ranks - 1) // ranks


def bus(machines: Machines, between_gbit: float | None) -> float | None:
    """Bytes per second of a ring over all ranks: the links inside a machine, or between machines what a node has."""
    inside = machines.device.link if machines.per_node > 1 else None
    across = between_gbit * 1e9 / 8 if machines.nodes > 1 and between_gbit else None
    if machines.nodes > 1 and across is None:
        return None
    known = [rate for rate in (inside, across) if rate]
    return EFFICIENCY * min(known) if known else None


def traffic(
    shapes: Shapes, parallel: str, machines: Machines, micro_steps: int, micro_s: float | None,
    between_gbit: float | None,
) -> Traffic:
    """Communication of one optimizer step; `micro_s` are the seconds of one micro-step."""
    n = sent_bytes(shapes, parallel, machines.ranks, micro_steps)
    if not n:
        return Traffic(0, 0.0, 0.0)
    rate = bus(machines, between_gbit)
    if rate is None:
        return Traffic(n, None, None)
    seconds = n / rate
    hidden = BACKWARD_FRAC * micro_s if parallel == "ddp" and micro_s else 0.0
    return Traffic(n, seconds, max(0.0, seconds - hidden))

"""The plan in a few lines, before the main job starts, and the reason to refuse what cannot fit."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, replace

from nanochat_ray.plan.memory import Memory
from nanochat_ray.plan.stages import total_s
from nanochat_ray.plan.text import NO_FP8, money, price_per_hour, span
from nanochat_ray.plan.whole import Planner, RunPlan
from nanochat_ray.report.text import size

# torch.compile computes cheap things again instead of keeping them, so a run is refused only where it would not fit
# with this share of the activations that plain autograd keeps.
KEPT_AT_LEAST_FRAC = 0.5
PUBLISHED_SIZE_FRAC = 0.8  # shards may be smaller than the mean


@dataclass(frozen=True)
class LogRun:
    """A whole run that was measured."""

    seconds: float
    where: str


def short_lines(plan: RunPlan, free_disk_bytes: int | None, measured: LogRun | None = None) -> list[str]:
    """Five lines: size, memory, speed, time and cost, disk."""
    t, memory, device = plan.training, plan.own_memory, plan.machines.device
    known = f" of {size(device.memory_bytes)}" if device.memory_bytes else ""
    largest = plan.largest_rows[plan.parallel]
    room = "" if largest is None else f"; the largest device batch size that fits: {largest or 'none does'}"
    room += "; may not fit" if plan.fits is False else ""
    speed = "speed not known here" if plan.tok_per_s is None else (
        f"{plan.tok_per_s:,.0f} tokens/s, {plan.mfu or 0:.0%} of the peak ({plan.speed.mark}: {plan.speed.source})"
    )
    price, source = price_per_hour(plan)
    seconds = measured.seconds if measured else total_s(plan.stages)
    time = f"{span(seconds)} for all stages (modelled)" if measured is None else (
        f"about {span(seconds)} for all stages (measured on {measured.where})"
    )
    cost = f", {money(price, seconds)} at ${price:,.2f} an hour ({source})" if price is not None and seconds else ""
    free = "what is free is not known (object storage, or a file system that does not say)"
    if free_disk_bytes is not None:
        free = f"{size(free_disk_bytes)} free"
    return [
        f"plan: {t.param_counts['total']:,} parameters, {t.total_tokens:,} tokens in {t.num_iterations:,} steps, "
        f"{t.total_flops:.3g} FLOPs on {plan.machines.name}",
        f"  memory: {size(memory.peak)}{known} each with --pretrain.device-batch-size {memory.rows} (modelled){room}",
        f"  speed: {speed}",
        f"  time: {time}{cost}",
        f"  disk: {size(plan.disk.total)}, of it {plan.disk.shards} shards to have; {free}",
    ]


def refusal(planner: Planner, plan: RunPlan, free_disk_bytes: int | None, there_bytes: int = 0) -> str | None:
    """Why the run cannot work and which flag makes it work; None if it may. `there_bytes` of what it leaves on the
    disk are there already."""
    if plan.lacks_fp8:
        return NO_FP8.format(plan.machines.name)
    memory_bytes = plan.machines.device.memory_bytes
    if memory_bytes is not None and least_bytes(plan.own_memory, plan.machines.device.on_cpu) > memory_bytes:
        return (
            f"this cannot fit: each rank needs {size(plan.own_memory.peak)} and has {size(memory_bytes)} "
            f"({plan.machines.name}). {_what_fits(planner, plan, memory_bytes)}"
        )
    # The best checkpoint is mostly one of the newest, which are kept anyway.
    needed = plan.disk.data * PUBLISHED_SIZE_FRAC + plan.disk.checkpoints - plan.disk.checkpoint
    if free_disk_bytes is not None and needed > free_disk_bytes + there_bytes:
        keep = " --keep-checkpoints 1 takes less," if plan.settings.run.keep_checkpoints > 1 else ""
        return (
            f"the disk is too small: about {size(plan.disk.total)} are needed ({size(plan.disk.data)} of data, "
            f"{size(plan.disk.checkpoints)} of checkpoints), {size(free_disk_bytes)} are free.{keep} --storage names "
            "another folder or object storage"
        )
    return None


def least_bytes(memory: Memory, on_cpu: bool) -> int:
    """What a rank needs in any case. On a CPU nothing is compiled, so that is the plan's own figure."""
    if on_cpu:
        return memory.peak
    held = memory.state.weights + memory.state.optimizer
    return held + max(memory.state.gradients, int(KEPT_AT_LEAST_FRAC * memory.step.activations))


def _what_fits(planner: Planner, plan: RunPlan, memory_bytes: int) -> str:
    on_cpu, ranks = plan.machines.device.on_cpu, plan.machines.ranks
    if on_cpu:
        host_bytes = memory_bytes * ranks  # which workers share
        fewer = _most(ranks - 1, lambda n: _at_ranks(planner, plan, n).fits(host_bytes // n))
        if fewer:
            return f"--workers {fewer} fits"
    rows = plan.largest_rows[plan.parallel]
    if rows:
        return f"--pretrain.device-batch-size {rows} fits"
    for name, most in plan.largest_rows.items():
        if most and not on_cpu:
            return f"--parallel {name} --pretrain.device-batch-size {most} fits"
    def rows_at(depth: int) -> int:
        smaller = plan.settings.pretrain.model_copy(update={"depth": depth})
        return planner.memory(smaller, plan.training.config.vocab_size).largest_rows(plan.parallel, memory_bytes)

    depth = _most(plan.training.config.n_layer - 1, lambda n: rows_at(n) > 0)
    if depth:
        return f"--pretrain.depth {depth} --pretrain.device-batch-size {rows_at(depth)} fits"
    return "Take a machine with more memory"


def _at_ranks(planner: Planner, plan: RunPlan, ranks: int) -> Memory:
    other = Planner(replace(planner.machines, ranks=ranks), planner.dtype)
    memory = other.memory(plan.settings.pretrain, plan.training.config.vocab_size)
    return memory.at(plan.parallel, plan.settings.pretrain.device_batch_size)


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `limit` that fits, 0 if none does; a larger one needs more."""
    return bisect.bisect_left(range(1, limit + 1), True, key=lambda n: not fits(n))

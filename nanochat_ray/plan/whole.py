"""A whole run as numbers: everything that jobs/plan.py prints, and what cannot work."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from nanochat_ray.config import PretrainSettings, SpeedrunSettings
from nanochat_ray.model.fp8 import check_numbers
from nanochat_ray.model.scaling import Plan, plan_training
from nanochat_ray.plan.activations import Compute
from nanochat_ray.plan.compute import Speed, expected_speed, optimizer_flops
from nanochat_ray.plan.hardware import Machines
from nanochat_ray.plan.memory import Memory, MemoryPlan
from nanochat_ray.plan.network import INTERCONNECTS_GBIT, NODE_COUNTS, Traffic, traffic
from nanochat_ray.plan.serving import MAX_ROWS, Serving, serving
from nanochat_ray.plan.stages import Disk, StageCost, disk, shards_to_have, stage_costs
from nanochat_ray.plan.state import Shapes
from nanochat_ray.presets import NO_FP8_GPUS
from nanochat_ray.stages.parallel import STRATEGIES

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DEFAULT_BETWEEN_GBIT = 400.0


@dataclass(frozen=True)
class NodeRow:
    """A run on some nodes: what its ranks send each other, by the rate between nodes."""

    nodes: int
    ranks: int
    sent_bytes: int
    compute_s: float | None
    exposed_s: dict[float, float | None]  # by Gb/s per node

    def share(self, gbit: float) -> float | None:
        """Of the step's time that goes to communication."""
        exposed = self.exposed_s[gbit]
        if exposed is None or self.compute_s is None:
            return None
        return exposed / (exposed + self.compute_s)


@dataclass(frozen=True)
class RunPlan:
    """What a run takes on some machines."""

    settings: SpeedrunSettings
    machines: Machines
    training: Plan
    dtype: str
    fp8: str | None
    memory: dict[str, Memory]  # by strategy
    largest_rows: dict[str, int | None]  # that fit; None: the device's memory is not known
    speed: Speed
    traffic: dict[str, Traffic]
    between_gbit: float | None
    compute_s: float | None  # of an optimizer step
    step_s: float | None  # with the communication of the chosen strategy
    by_nodes: list[NodeRow]
    disk: Disk
    stages: list[StageCost]
    serving: Serving

    @property
    def parallel(self) -> str:
        return self.settings.run.parallel

    @property
    def own_memory(self) -> Memory:
        """Of the strategy and the device batch size that the settings name."""
        return self.memory[self.parallel]

    @property
    def fits(self) -> bool | None:
        """By the plan's own figure; None if the device's memory is not known."""
        memory_bytes = self.machines.device.memory_bytes
        return None if memory_bytes is None else self.own_memory.fits(memory_bytes)

    @property
    def lacks_fp8(self) -> bool:
        """Whether fp8 was asked for and the device is known to have none that `check_fp8` would take."""
        device = self.machines.device
        return self.fp8 is not None and (device.on_cpu or bool(re.search(NO_FP8_GPUS, device.name.lower())))

    @property
    def tok_per_s(self) -> float | None:
        return self.training.total_batch_size / self.step_s if self.step_s else None

    @property
    def mfu(self) -> float | None:
        """Of all ranks, communication included."""
        if self.tok_per_s is None or self.speed.peak_flops is None:
            return None
        return self.tok_per_s * self.training.flops_per_token / (self.speed.peak_flops * self.machines.ranks)


class Planner:
    """Plans of runs on some machines; keeps what several depths and strategies have in common."""

    def __init__(
        self, machines: Machines, dtype: str, mfu_percent: float | None = None, between_gbit: float | None = None
    ) -> None:
        self.machines, self.dtype, self.mfu_percent = machines, dtype, mfu_percent
        self.between_gbit = between_gbit or (DEFAULT_BETWEEN_GBIT if machines.nodes > 1 else None)

    def compute(self, pretrain: PretrainSettings) -> Compute:
        fp8 = pretrain.fp8_recipe if pretrain.fp8 else None
        return Compute(DTYPES[self.dtype].itemsize, fp8, self.machines.device.on_cpu)

    def memory(self, pretrain: PretrainSettings, vocab_size: int) -> MemoryPlan:
        """Memory of pretraining."""
        training = plan_training(pretrain, vocab_size)
        shapes = Shapes(training.config, DTYPES[self.dtype])
        return MemoryPlan(training.config, self.compute(pretrain), shapes, self.machines.ranks, training.rows_per_step)

    def plan(self, settings: SpeedrunSettings, context: int | None = None) -> RunPlan:
        """The whole plan. `context` is that of a stream when serving.

        ValueError as `plan_training`, and for fp8 in another compute dtype than bfloat16.
        """
        pretrain, machines, device = settings.pretrain, self.machines, self.machines.device
        if pretrain.fp8:
            check_numbers(DTYPES[self.dtype], pretrain.max_seq_len)
        training = plan_training(pretrain, settings.tokenizer.vocab_size)
        config, compute = training.config, self.compute(pretrain)
        shapes = Shapes(config, DTYPES[self.dtype])
        memory = MemoryPlan(config, compute, shapes, machines.ranks, training.rows_per_step)
        rows = pretrain.device_batch_size
        speed = expected_speed(config, device, compute.dtype_bytes, pretrain.fp8, self.mfu_percent)
        parallel = settings.run.parallel
        compute_s = self._compute_s(training, speed, machines.ranks, parallel)
        sent = {}
        for name in STRATEGIES:
            micro_steps = training.grad_accum_steps(rows, machines.ranks)
            seconds = self._compute_s(training, speed, machines.ranks, name)
            sent[name] = traffic(
                shapes, name, machines, micro_steps, seconds / micro_steps if seconds else None, self.between_gbit
            )
        exposed = sent[parallel].exposed_s
        step_s = None if compute_s is None else compute_s + (exposed or 0.0)
        shards = shards_to_have(settings, training, device.on_cpu)

        def serve(tokens: int, max_rows: int = MAX_ROWS) -> Serving:
            return serving(config, shapes, device, compute.dtype_bytes, tokens, max_rows)

        costs = stage_costs(
            settings, training, machines.ranks, speed.flops, step_s, serve, shards, device.on_cpu
        )
        return RunPlan(
            settings, machines, training, self.dtype, compute.fp8,
            {name: memory.at(name, rows) for name in STRATEGIES},
            {name: memory.largest_rows(name, device.memory_bytes) if device.memory_bytes else None
             for name in STRATEGIES},
            speed, sent, self.between_gbit, compute_s, step_s, self._by_nodes(training, shapes, speed, parallel, rows),
            disk(settings, training, shapes, shards, costs), costs, serve(context or config.sequence_len),
        )

    def _compute_s(self, training: Plan, speed: Speed, ranks: int, parallel: str) -> float | None:
        """Of the rank with the most rows; Muon's products are shared except with `ddp`."""
        if not speed.flops:
            return None
        tokens = -(-training.rows_per_step // ranks) * training.config.sequence_len
        muon = optimizer_flops(training.config) / (1 if parallel == "ddp" else ranks)
        return (tokens * training.flops_per_token + muon) / speed.flops

    def _by_nodes(
        self, training: Plan, shapes: Shapes, speed: Speed, parallel: str, device_rows: int
    ) -> list[NodeRow]:
        if self.machines.device.on_cpu:
            return []
        found = []
        for nodes in NODE_COUNTS:
            ranks = nodes * self.machines.per_node
            if ranks > training.rows_per_step:  # ranks without a row
                break
            machines = Machines(self.machines.device, ranks, nodes)
            seconds = self._compute_s(training, speed, ranks, parallel)
            micro_steps = training.grad_accum_steps(device_rows, ranks)
            micro_s = seconds / micro_steps if seconds else None
            each = {
                gbit: traffic(shapes, parallel, machines, micro_steps, micro_s, gbit) for gbit in INTERCONNECTS_GBIT
            }
            sent = next(iter(each.values())).sent_bytes
            found.append(NodeRow(nodes, ranks, sent, seconds, {gbit: one.exposed_s for gbit, one in each.items()}))
        return found

"""What jobs need to plan: the machines as the plan wants them, and the short form before the main job starts."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from _runtime import connect

from nanochat_ray.config import RunSettings, SpeedrunSettings
from nanochat_ray.model.precision import pick_dtype
from nanochat_ray.plan.compute import measured_product_flops
from nanochat_ray.plan.hardware import Device, Machines, cpu, free_disk_bytes, gpu
from nanochat_ray.plan.short import LogRun, refusal, short_lines
from nanochat_ray.plan.whole import DTYPES, Planner
from nanochat_ray.presets import Machine, preset
from nanochat_ray.remote import Remote
from nanochat_ray.run_dir import RunDir, storage_path

logger = logging.getLogger("nanochat_ray")

GPUS_PER_NODE = 8  # of machines that nobody described
# Whole runs as dev/LOG.md has them (2 CPUs of an AMD EPYC with AVX512-BF16).
MEASURED = {"cpu": LogRun(404.0, "2 CPUs, dev/LOG.md"), "smoke": LogRun(120.0, "2 CPUs, at most, README.md")}


def planner_for(
    machine: Machine, run: RunSettings, mfu_percent: float | None = None, between_gbit: float | None = None,
    nodes: int | None = None, memory_bytes: int | None = None, ranks: int | None = None,
) -> Planner:
    """A planner for what there is or is asked for; `ranks` unset: one per GPU, on CPUs the settings' workers."""
    in_cluster = machine.where == "in the cluster"
    if machine.gpus and run.device_type != "cpu":
        device = gpu(machine.gpu_name or "unknown GPU", memory_bytes or _local_memory(machine))
        asked = run.dtype or os.environ.get("NANOCHAT_DTYPE")
        dtype = asked or ("bfloat16" if device.bf16 else "float32")
        ranks = ranks or machine.gpus
        found = nodes or (_gpu_nodes() if in_cluster else _nodes_of(machine, ranks))
    else:
        torch_dtype, _ = pick_dtype("cpu", run.dtype)
        dtype = next(name for name, one in DTYPES.items() if one == torch_dtype)
        ranks, found = ranks or run.worker_range[1], 1
        device = _cpus_of(machine, ranks, dtype, in_cluster)
    if dtype not in DTYPES:
        raise ValueError(f"compute dtype {dtype!r} is unknown; choose from {', '.join(DTYPES)}")
    return Planner(Machines(device, ranks, min(found, ranks), machine.where), dtype, mfu_percent, between_gbit)


def _cpus_of(machine: Machine, ranks: int, dtype: str, in_cluster: bool) -> Device:
    """CPU workers: this machine's products as measured now; of a cluster nothing is known."""
    if in_cluster:
        return Device("CPU", None, None, None, None, on_cpu=True)
    return cpu(ranks, measured_product_flops(DTYPES[dtype]), dtype == "bfloat16")


def _nodes_of(machine: Machine, ranks: int) -> int:
    return 1 if machine.where == "here" else -(-ranks // GPUS_PER_NODE)


def _local_memory(machine: Machine) -> int | None:
    """Memory of this machine's first GPU, as torch sees it; None for GPUs that are only asked for."""
    import torch

    if machine.where != "here" or not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(0).total_memory)


def _gpu_nodes() -> int:
    connect()
    import ray

    return max(1, sum(node["Alive"] and node["Resources"].get("GPU", 0) > 0 for node in ray.nodes()))


def announce(settings: SpeedrunSettings, machine: Machine) -> None:
    """Say in a few lines what the main job will take, unless pretraining is done.

    ValueError, with the flag that helps, for what cannot fit into memory or on the disk.
    """
    tag = settings.run.model_tag or f"d{settings.pretrain.depth}"
    run_dir = RunDir.of(settings.run.storage, tag)
    if run_dir.is_done("pretrain"):
        return
    planner = planner_for(machine, settings.run, ranks=settings.run.worker_range[1])
    plan = planner.plan(settings)
    free = None if Remote.of(run_dir.root) else free_disk_bytes(run_dir.root)
    short_of_disk = free is not None and plan.disk.total > free
    there = _there_bytes(storage_path(settings.run.storage), run_dir.root) if short_of_disk else 0
    for line in short_lines(plan, free, _measured(settings, machine)):
        print(line, flush=True)
    reason = refusal(planner, plan, free, there)
    if reason:
        raise ValueError(reason)


def _measured(settings: SpeedrunSettings, machine: Machine) -> LogRun | None:
    """A whole run of the same preset, if nothing of its pretraining was changed."""
    found = MEASURED.get(settings.preset or "")
    same = found and settings.pretrain == preset(str(settings.preset), machine).pretrain
    return found if same else None


def _there_bytes(storage: Path, run_folder: Path) -> int:
    """Bytes of this run and of published sets that are there already."""
    folders = [run_folder, *storage.glob("base_data*")]
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())

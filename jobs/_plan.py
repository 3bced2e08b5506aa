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
MEASURED = {"cpu": LogRun(404.0, "2 CPUs, dev/LOG.md")}
SAME_TIME = ("storage", "model_tag", "run", "keep_checkpoints", "price_per_hour", "task_data")  # settings of no weight


def planner_for(
    machine: Machine, run: RunSettings, mfu_percent: float | None = None, between_gbit: float | None = None,
    nodes: int | None = None, memory_bytes: int | None = None, ranks: int | None = None,
) -> Planner:
    """A planner for what there is or is asked for; `ranks` unset: as many as the settings' workers will be there."""
    in_cluster = machine.where == "in the cluster"
    ranks = ranks or ranks_of(machine, run)
    if on_gpus(machine, run):
        device = gpu(machine.gpu_name or "unknown GPU", memory_bytes or _local_memory(machine))
        dtype = run.dtype or os.environ.get("NANOCHAT_DTYPE") or ("bfloat16" if device.bf16 else "float32")
        if _is_here(machine):
            dtype = _dtype_of("cuda", run)
        found = nodes or (_gpu_nodes() if in_cluster and machine.gpus else _nodes_of(machine, ranks))
    else:
        dtype, found = _dtype_of("cpu", run), 1
        device = _cpus_of(machine, ranks, dtype, in_cluster)
    if dtype not in DTYPES:
        raise ValueError(f"compute dtype {dtype!r} is unknown; choose from {', '.join(DTYPES)}")
    return Planner(Machines(device, ranks, min(found, ranks), machine.where), dtype, mfu_percent, between_gbit)


def on_gpus(machine: Machine, run: RunSettings) -> bool:
    """Whether ranks will have GPUs: those that are there, or those that a cluster gets when they are asked for."""
    return bool(machine.gpus and run.device_type != "cpu") or (
        machine.where == "in the cluster" and run.device_type == "cuda"
    )


def ranks_of(machine: Machine, run: RunSettings) -> int:
    """Of MIN:MAX workers as many as there are GPUs or, in a cluster without, CPUs for, and at least MIN, which are
    waited for. This machine's own CPUs have room for any number."""
    least, most = run.worker_range
    if not run.ray:
        return 1
    if on_gpus(machine, run):
        return max(least, min(most, machine.gpus or most))
    return max(least, min(most, machine.cpus)) if machine.where == "in the cluster" else most


def _dtype_of(device: str, run: RunSettings) -> str:
    torch_dtype, _ = pick_dtype(device, run.dtype)
    return next(name for name, one in DTYPES.items() if one == torch_dtype)


def _is_here(machine: Machine) -> bool:
    """Whether the GPUs are this process' own."""
    import torch

    return machine.where == "here" and torch.cuda.is_available()


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

    if not _is_here(machine):
        return None
    return int(torch.cuda.get_device_properties(0).total_memory)


def _gpu_nodes() -> int:
    connect()
    import ray

    return max(1, sum(node["Alive"] and node["Resources"].get("GPU", 0) > 0 for node in ray.nodes()))


def announce(settings: SpeedrunSettings, machine: Machine) -> None:
    """Say in a few lines what the main job will take, unless pretraining is done.

    ValueError, with the flag that helps, for what cannot fit into memory or on the disk, for fp8 where there is none,
    and for object storage that cannot be written.
    """
    tag = settings.run.model_tag or f"d{settings.pretrain.depth}"
    run_dir = RunDir.of(settings.run.storage, tag)
    remote = Remote.of(run_dir.root)
    if remote is not None:
        remote.probe()
    if run_dir.fetch().is_done("pretrain"):
        return
    planner = planner_for(machine, settings.run)
    plan = planner.plan(settings)
    free = None if remote else free_disk_bytes(run_dir.root)
    short_of_disk = free is not None and plan.disk.total > free
    there = _there_bytes(storage_path(settings.run.storage), run_dir.root) if short_of_disk else 0
    for line in short_lines(plan, free, _measured(settings, machine)):
        print(line, flush=True)
    reason, least = refusal(planner, plan, free, there), settings.run.worker_range[0]
    if reason and least < planner.machines.ranks:  # fewer workers may be all that come
        planner = planner_for(machine, settings.run, ranks=least)
        reason = refusal(planner, planner.plan(settings), free, there) and reason
    if reason:
        raise ValueError(reason)


def _measured(settings: SpeedrunSettings, machine: Machine) -> LogRun | None:
    """A whole run of the same preset on CPUs, if nothing that takes time was changed."""
    found = MEASURED.get(settings.preset or "")
    if found is None or machine.gpus or machine.where != "here":
        return None
    base = preset(str(settings.preset), machine)
    run = base.run.model_copy(update={name: getattr(settings.run, name) for name in SAME_TIME})
    return found if settings == base.model_copy(update={"run": run}) else None


def _there_bytes(storage: Path, run_folder: Path) -> int:
    """Bytes of this run and of published sets that are there already."""
    folders = [run_folder, *storage.glob("base_data*")]
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())

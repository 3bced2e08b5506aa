"""What base_eval and chat_eval share: the model to evaluate, and running units on Ray's actors or in this process."""

from __future__ import annotations

from collections.abc import Sequence

from _runtime import Job, available_cpus

from nanochat_ray.model.checkpoint import Checkpoint, resolve_checkpoint
from nanochat_ray.run_dir import STAGE_OF_SOURCE
from nanochat_ray.stages.evaluation import EvalSpec, Record, Unit, run_units_here


def checkpoint_of(job: Job, source: str, step: int | None) -> Checkpoint:
    """The checkpoint of base, sft or rl in this run."""
    stage = STAGE_OF_SOURCE[source]
    job.run_dir.require_stage(stage, f"{stage}.py")
    return resolve_checkpoint(job.run_dir.checkpoints(stage), step)


def run_units(job: Job, spec: EvalSpec, units: Sequence[Unit]) -> list[list[Record]]:
    """Evaluate the units where the job's settings say. The records are the same for any number of actors."""
    if not units:
        return []
    if not job.use_ray():
        return run_units_here(spec, units)
    from nanochat_ray.evals.pool import run_units as on_actors

    if job.settings.eval_workers is not None:
        actors = job.settings.eval_workers
    elif job.device.startswith("cuda"):
        actors = job.settings.worker_range[0]
    else:
        actors = available_cpus()
    threads = max(1, available_cpus() // actors)
    return on_actors(spec, units, actors, threads)

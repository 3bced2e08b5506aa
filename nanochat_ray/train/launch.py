"""Run a training stage through Ray Train: one worker per rank, each calling the same plain stage function."""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch
from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import FailureConfig, RunConfig
from ray.train.v2.api.exceptions import WorkerGroupError

from nanochat_ray.config import THREADS_ENV
from nanochat_ray.data.dealer import DealerHandle, batches_from, start_dealer
from nanochat_ray.messages import ClusterError, Cursor, World
from nanochat_ray.report.tracker import Tracker
from nanochat_ray.run_dir import StaleWriterError
from nanochat_ray.stages.hooks import FolderHooks, OpenBatches, TrainingState
from nanochat_ray.stages.pretrain import PretrainJob, pretrain
from nanochat_ray.stages.rows import RowSource
from nanochat_ray.stages.sft import SFTJob, finetune

logger = logging.getLogger(__name__)

MAX_WORKER_FAILURES = 3
GROUP_TIMEOUT_S = 1800
RAY_FOLDER = "ray"  # below the stage's folder: what Ray Train keeps for itself while it runs
USER_ERRORS = (ValueError, OSError, StaleWriterError)  # what a person, a disk or another job caused
STAGES: dict[type, Callable[..., dict[str, Any]]] = {PretrainJob: pretrain, SFTJob: finetune}


@dataclass(frozen=True)
class Workers:
    """The machines' share of a training stage. Changes how fast it runs, not its result."""

    count: int = 1
    use_gpu: bool = False
    cpus_each: float = 1.0
    threads_each: int | None = None  # torch threads of a CPU worker; None: as Ray sets them
    data_actors: int = 1  # processes that read, tokenize and pack


class RayHooks(FolderHooks):
    """The folder's hooks, plus a report to Ray Train at checkpoints, which is a barrier of all ranks."""

    def save(self, step: int, state: TrainingState) -> None:
        super().save(step, state)
        ray.train.report({"step": step, "val_bpb": state.meta.get("val_bpb")})


def fit(
    job: PretrainJob | SFTJob, source: RowSource, rows_per_step: int, workers: Workers, lease_epoch: int,
    tracker_run: str = "dummy",
) -> dict[str, Any]:
    """Train a stage on Ray's workers and return rank 0's result. Blocks; call it from any thread.

    A worker that dies is replaced together with its group, which goes on from the newest checkpoint that verifies.
    """
    preflight(workers)
    dealer = start_dealer(source, rows_per_step, workers.count, workers.data_actors)
    env = {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0", "RAY_CHDIR_TO_TRIAL_DIR": "0", **THREADS_ENV}
    if workers.threads_each:
        env["OMP_NUM_THREADS"] = str(workers.threads_each)
    resources = {"CPU": workers.cpus_each} | ({"GPU": 1.0} if workers.use_gpu else {})
    run_config: Any = RunConfig(
        name=f"{job.stage_folder.name}-{uuid.uuid4().hex[:8]}",  # fresh: our manifest is the truth, not Ray's
        storage_path=str(job.stage_folder / RAY_FOLDER),
        failure_config=FailureConfig(max_failures=MAX_WORKER_FAILURES, controller_failure_limit=3),
        worker_runtime_env={"env_vars": env},
    )
    trainer: Any = TorchTrainer(
        train_worker,
        train_loop_config={"job": job, "dealer": dealer, "lease_epoch": lease_epoch, "tracker_run": tracker_run},
        torch_config=TorchConfig(backend="nccl" if workers.use_gpu else "gloo", timeout_s=GROUP_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=workers.count, use_gpu=workers.use_gpu, resources_per_worker=resources
        ),
        run_config=run_config,
    )
    try:
        result = trainer.fit().return_value
    except WorkerGroupError as error:
        causes = list(error.worker_failures.values())
        known: list[Exception] = [cause for cause in causes if isinstance(cause, USER_ERRORS)]
        known.append(ClusterError(f"training failed {MAX_WORKER_FAILURES + 1} times: {causes[0]}"))
        raise known[0] from error
    finally:
        ray.kill(dealer)
        shutil.rmtree(job.stage_folder / RAY_FOLDER, ignore_errors=True)
    if isinstance(result, Exception):
        raise result
    return result


def train_worker(config: dict[str, Any]) -> Any:
    """What each Ray Train worker runs."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    context = ray.train.get_context()
    world = World(
        context.get_world_rank(), context.get_local_rank(), context.get_world_size(),
        str(ray.train.torch.get_device()),
    )
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    job = config["job"]
    tracker = None
    if world.rank == 0:
        tracker = Tracker(job.stage_folder, config["tracker_run"], job.settings.model_dump(mode="json"))
    hooks = RayHooks(job.stage_folder, config["lease_epoch"], world, tracker)
    try:
        return STAGES[type(job)](job, world, open_from(config["dealer"], world), hooks)
    except USER_ERRORS as error:
        if world.world_size > 1:  # the other ranks must not wait for this one
            raise
        return error  # trying again would not help
    finally:
        if tracker is not None:
            tracker.finish()


def open_from(dealer: DealerHandle, world: World) -> OpenBatches:
    """Batches of this rank from the dealer, which rank 0 sets to the cursor for the whole group."""

    def open_batches(cursor: Cursor, step: int):
        stream = uuid.uuid4().hex if world.rank == 0 else ""
        stream = ray.train.collective.broadcast_from_rank_zero(stream)
        if world.rank == 0:
            ray.get(dealer.open.remote(stream, cursor, step, world.world_size))
        ray.train.collective.barrier()
        return batches_from(dealer, stream, step, world.rank)

    return open_batches


def preflight(workers: Workers) -> None:
    """Raise ClusterError with the numbers if the cluster cannot ever hold the workers and the data processes."""
    have = ray.cluster_resources()
    need = {"CPU": workers.count * workers.cpus_each + workers.data_actors}
    if workers.use_gpu:
        need["GPU"] = float(workers.count)
    short = {name: amount for name, amount in need.items() if have.get(name, 0) < amount}
    if short:
        wanted = ", ".join(f"{amount:g} {name}" for name, amount in need.items())
        there = ", ".join(f"{have.get(name, 0):g} {name}" for name in need)
        raise ClusterError(
            f"training needs {wanted} ({workers.count} workers with {workers.cpus_each:g} CPU each, "
            f"{workers.data_actors} for data), the cluster has {there}. Lower --workers, or start Ray with more "
            "(ray start --head --num-cpus N)."
        )

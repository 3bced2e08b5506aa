"""Run a training stage through Ray Train: one worker per rank, each calling the same plain stage function.

Whatever dies (a worker, a data process, Ray Train's controller, a node), the answer is one and the same: the launch is
over, and `fit` waits for room and launches again. Every launch goes on from the newest checkpoint that verifies.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import FailureConfig, RunConfig
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from nanochat_ray.config import THREADS_ENV
from nanochat_ray.data.dealer import DealerHandle, batches_from, start_dealer
from nanochat_ray.messages import ClusterError, Cursor, PassedOn, World
from nanochat_ray.model.checkpoint import newest_whole_step
from nanochat_ray.observe.metrics import RayGauges
from nanochat_ray.report.metrics_log import read_lines
from nanochat_ray.report.status_failures import note_failure
from nanochat_ray.report.tracker import Tracker
from nanochat_ray.run_dir import (
    CHECKPOINTS,
    METRICS_FILE,
    STOP_FILE,
    Lease,
    StaleWriterError,
    clear_stop,
    pull_records,
    request_stop,
)
from nanochat_ray.stages.hooks import FolderHooks, Metrics, OpenBatches, TrainingState
from nanochat_ray.stages.pretrain import PretrainJob, pretrain
from nanochat_ray.stages.rl import RLJob, reinforce
from nanochat_ray.stages.rows import RowSource
from nanochat_ray.stages.sft import SFTJob, finetune
from nanochat_ray.train.rollouts import open_rollouts
from nanochat_ray.train.room import Workers, give_back, groups_of_this_job, room_for_more, wait_for_room
from nanochat_ray.train.watchdog import Pulse, Watchdog

logger = logging.getLogger(__name__)

T = TypeVar("T")

RAY_FOLDER = "ray"  # below the stage's folder: what Ray Train keeps for itself while it runs
LOOK_EVERY_S = 2.0
OPEN_S = 60.0
GROW_EVERY_S = 60.0
STORE_LOOK_S = 30.0
# What a person, a disk, another job or the numbers caused, so that trying again would end in the same way; but for
USER_ERRORS = (ValueError, OSError, StaleWriterError, FloatingPointError, torch.OutOfMemoryError)
PASSING_ERRORS = (ConnectionError, TimeoutError)  # which are OSErrors too
StageJob: TypeAlias = PretrainJob | SFTJob | RLJob
STAGES: dict[type, Callable[..., dict[str, Any]]] = {PretrainJob: pretrain, SFTJob: finetune}


@dataclass(frozen=True)
class Patience:
    """How long, and how often, a stage is tried."""

    max_restarts: int = 5  # launches in a row that end without a new checkpoint
    wait_s: float = 1800.0  # for room on the cluster
    hang_s: float = 1800.0  # without a sign of life from a rank
    can_grow: bool = True  # whether nodes may join the cluster, so that waiting makes sense


class RayHooks(FolderHooks):
    """The folder's hooks, with the numbers as Ray's gauges too, and a report to Ray Train at checkpoints.

    That report is a barrier of all ranks.
    """

    def __init__(
        self, stage_folder: Path, lease_epoch: int, world: World, tracker: Tracker | None, keep_last: int,
        beat: Callable[[], None],
    ):
        super().__init__(stage_folder, lease_epoch, world, tracker, keep_last, background=True, beat=beat)
        self.gauges = RayGauges(stage_folder.name, stage_folder.parent.name)
        written = read_lines(stage_folder / METRICS_FILE) if world.rank == 0 else []
        self.restarts = sum(record.get("event") == "start" for record in written)

    def report(self, step: int, metrics: Metrics) -> None:
        super().report(step, metrics)
        self.gauges.log(step, {**metrics, "train/restarts": self.restarts})

    def save(self, step: int, state: TrainingState) -> float:
        stall_s = super().save(step, state)
        ray.train.report({"step": step, "val_bpb": state.meta.get("val_bpb")})
        return stall_s


@dataclass
class Launch:
    """One group of workers from its start to its end, seen from the driver."""

    job: StageJob
    pulse: ray.actor.ActorHandle  # the dealer, or a Pulse
    count: int
    look_every_s: float  # for room to grow
    outcome: dict[str, Any] = field(default_factory=dict)

    def start(self, trainer: Any) -> None:
        self.thread = threading.Thread(target=self._run, args=(trainer,), name="fit", daemon=True)
        self.thread.start()

    def _run(self, trainer: Any) -> None:
        try:
            result = trainer.fit().return_value
            if isinstance(result, Exception):
                raise result
            self.outcome["value"] = result
        except BaseException as error:
            self.outcome["error"] = error

    def wait(self, workers: Workers, hang_s: float) -> dict[str, Any]:
        """The ranks' result, or what they failed of. Asks for a stop when there is room for more workers.

        The ranks watch themselves; should Ray Train's controller hang, the end comes twice as long after their last
        sign of life.
        """
        looked = time.monotonic()
        stop_file = self.job.stage_folder / STOP_FILE
        while self.thread.is_alive():
            self.thread.join(LOOK_EVERY_S)
            if time.monotonic() - looked < min(self.look_every_s, hang_s):
                continue
            looked = time.monotonic()
            if not stop_file.exists() and stop_file.parent.is_dir() and room_for_more(workers, self.count):
                logger.warning("%s: room for more than %d workers; saving to go on with them",
                               self.job.stage_folder.name, self.count)
                request_stop(self.job.stage_folder)
            try:
                silent_s: Any = ray.get(self.pulse.silent_s.remote(), timeout=LOOK_EVERY_S)
            except (ray.exceptions.RayError, TimeoutError):
                continue  # a dead dealer is the ranks' error, which ends the launch
            if silent_s > 2 * hang_s:
                raise ClusterError(f"no rank was heard of for {silent_s:.0f} s, and Ray Train does not answer")
        if "error" in self.outcome:
            raise self.outcome["error"]
        return self.outcome["value"]


def fit(
    job: StageJob, source: RowSource | None, rows_per_step: int, workers: Workers, lease: Lease,
    tracker_run: str = "dummy", patience: Patience = Patience(), keep_last: int = 3,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train a stage on Ray's workers and return rank 0's result. Blocks; call it from any thread.

    `source` are the rows to train on; RL has none, its workers open rollouts themselves.
    Launches again after every failure that is nobody's mistake. Raises what a person got wrong as it is, and
    ClusterError when there is no room, or when `max_restarts` launches in a row have reached no new checkpoint.
    """
    stage = job.stage_folder.name
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(min(600.0, patience.hang_s)))

    def stored(call: Callable[[], T]) -> T:
        return patiently(call, stage, patience.wait_s)

    launches = failures = 0
    grow_every_s, wanted_more_than = GROW_EVERY_S, 0
    while True:
        saved = stored(lambda: newest_step(job))
        count = wait_for_room(workers, stage, patience.wait_s, patience.can_grow, asked_to_stop)
        if count is None:
            return {"status": "stopped", "step": saved, "metrics": {}}
        launches += 1
        if wanted_more_than and count <= wanted_more_than:  # others were faster: ask less and less often
            grow_every_s *= 2
        wanted_more_than = 0
        epoch = stored(lease.advance) if launches > 1 else lease.epoch
        try:
            settings = {"job": job, "lease_epoch": epoch, "tracker_run": tracker_run, "hang_s": patience.hang_s,
                        "wait_s": patience.wait_s, "keep_last": keep_last, "grow_every_s": grow_every_s}  # fmt: skip
            result = launch(job, source, rows_per_step, workers, count, settings)
        except Exception as error:
            if no_use_to_retry(error):
                raise
            if not asked_to_stop():
                stored(lambda: clear_stop(job.stage_folder))  # the request of a launch that died before it grew
            reached = stored(lambda: newest_step(job))
            failures = 0 if reached > saved else failures + 1
            if failures > patience.max_restarts:
                raise ClusterError(
                    f"{stage} failed {failures} times in a row without a new checkpoint (--max-restarts "
                    f"{patience.max_restarts}), the last time with: {error}"
                ) from error
            note_failure(job.stage_folder, _in_short(error), epoch, reached)
            logger.warning("%s: %s; goes on from step %d (%d of %d restarts without a new checkpoint)",
                           stage, _in_short(error), reached, failures, patience.max_restarts)
            continue
        if result["status"] == "stopped" and not asked_to_stop():  # but by this launch, to grow
            stored(lambda: clear_stop(job.stage_folder))
            if asked_to_stop():  # meanwhile
                request_stop(job.stage_folder)
            wanted_more_than = count
            continue
        return result | {"metrics": result["metrics"] | {"launches": launches}}


def launch(
    job: StageJob, source: RowSource | None, rows_per_step: int, workers: Workers, count: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """One group of `count` workers, from the newest checkpoint to its result or its failure."""
    tag, stage, hang_s = job.stage_folder.parent.name, job.stage_folder.name, settings["hang_s"]
    if source is None:
        remote: Any = ray.remote(Pulse)
        feed = remote.options(num_cpus=0, name=f"pulse {tag} {stage} {settings['lease_epoch']}").remote()
    else:
        feed = start_dealer(source, rows_per_step, count, workers.data_actors(count), f"{tag} {stage}")
    run_config: Any = RunConfig(
        name=f"{tag}-{stage}-{settings['lease_epoch']}",  # fresh: our manifest is the truth
        storage_path=str(job.stage_folder / RAY_FOLDER),
        failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        worker_runtime_env={"env_vars": worker_environment(workers)},
    )
    trainer: Any = TorchTrainer(
        train_worker,
        train_loop_config=settings | {
            "feed": feed, "rollout_workers": workers.rollout_workers, "passed_on": PassedOn.here()
        },
        torch_config=TorchConfig(backend="nccl" if workers.use_gpu else "gloo", timeout_s=int(hang_s) + 1),
        scaling_config=ScalingConfig(
            num_workers=count, use_gpu=workers.use_gpu, resources_per_worker=workers.resources_each
        ),
        run_config=run_config,
    )
    running, groups_before = Launch(job, feed, count, settings["grow_every_s"]), groups_of_this_job()
    try:
        running.start(trainer)
        return running.wait(workers, hang_s)
    except WorkerGroupError as error:
        known = [cause for cause in error.worker_failures.values() if no_use_to_retry(cause)]
        if not known:
            raise
        raise known[0] from error
    finally:
        ray.kill(feed)
        give_back(groups_of_this_job() - groups_before)
        shutil.rmtree(job.stage_folder / RAY_FOLDER, ignore_errors=True)


def no_use_to_retry(error: BaseException) -> bool:
    return isinstance(error, USER_ERRORS) and not isinstance(error, PASSING_ERRORS)


def newest_step(job: StageJob) -> int:
    """The step of the newest whole checkpoint, 0 without one."""
    return newest_whole_step(job.stage_folder / CHECKPOINTS)


def patiently(call: Callable[[], T], what: str, wait_s: float) -> T:
    """What `call` returns, also if the run's store is away for some time, at most `wait_s`."""
    begun = time.monotonic()
    while True:
        try:
            return call()
        except ConnectionError as error:
            if time.monotonic() - begun > wait_s:
                raise
            logger.warning("%s: waiting for the run's store: %s", what, error)
            time.sleep(STORE_LOOK_S)


def worker_environment(workers: Workers) -> dict[str, str]:
    """What must stand in the training workers' environment before they start: threads, and Ray's own."""
    env = {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0", "RAY_CHDIR_TO_TRIAL_DIR": "0", **THREADS_ENV}
    if workers.threads_each:
        env["OMP_NUM_THREADS"] = str(workers.threads_each)
    return env


def train_worker(config: dict[str, Any]) -> Any:
    """What each Ray Train worker runs."""
    config["passed_on"].take()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    context = ray.train.get_context()
    world = World(
        context.get_world_rank(), context.get_local_rank(), context.get_world_size(),
        str(ray.train.torch.get_device()),
    )
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    job = config["job"]
    stream = f"{job.stage_folder.name}-{config['lease_epoch']}"
    tracker = hooks = None
    tell = config["feed"].note_life.remote
    with Watchdog(job.stage_folder, world.rank, config["hang_s"], tell) as watchdog:
        try:
            if world.rank == 0:
                pull_records(job.stage_folder)
                tracker = Tracker(job.stage_folder, config["tracker_run"], job.settings.model_dump(mode="json"))
            hooks = RayHooks(
                job.stage_folder, config["lease_epoch"], world, tracker, config["keep_last"], watchdog.beat
            )
            if isinstance(job, RLJob):
                source = open_rollouts(
                    job, world, config["rollout_workers"], config["passed_on"], config["wait_s"], watchdog.beat
                )
                with contextlib.closing(source):
                    return reinforce(job, world, source, hooks)
            batches = open_from(config["feed"], world, stream, watchdog)
            return STAGES[type(job)](job, world, batches, hooks)
        except USER_ERRORS as error:
            if world.world_size > 1 or not no_use_to_retry(error):  # the other ranks must not wait for this one
                raise
            return error
        finally:
            if hooks is not None:
                hooks.close()
            if tracker is not None:
                tracker.finish()


def open_from(dealer: DealerHandle, world: World, stream: str, watchdog: Watchdog) -> OpenBatches:
    """Batches of this rank from the dealer; rank 0 opens the stream for everybody."""

    def open_batches(cursor: Cursor, step: int):
        if world.rank == 0:
            ray.get(dealer.open.remote(stream, cursor, step, world.world_size), timeout=OPEN_S)
        if world.world_size > 1:
            dist.barrier()
        return watchdog.watched(batches_from(dealer, stream, step, world.rank))

    return open_batches


def _in_short(error: Exception) -> str:
    """One line of a failure that may carry many tracebacks."""
    if isinstance(error, WorkerGroupError):
        causes = {f"rank {rank}: {_last_line(cause)}" for rank, cause in error.worker_failures.items()}
        return "; ".join(sorted(causes))
    if isinstance(error, ControllerError):
        return f"Ray Train's controller failed: {_last_line(error.controller_failure)}"
    return f"{type(error).__name__}: {_last_line(error)}"


def _last_line(error: BaseException) -> str:
    if isinstance(error, ray.exceptions.RayActorError):
        return "its process died"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].split(" Worker exit type")[0][:200] if lines else type(error).__name__

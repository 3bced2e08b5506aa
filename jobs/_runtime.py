"""What every job file shares: the run's folder and lease, Ray if wanted, signals, and the frame around a stage."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat_ray.config import THREADS_ENV, RunSettings
from nanochat_ray.messages import ClusterError
from nanochat_ray.presets import Machine
from nanochat_ray.report.progress import Progress
from nanochat_ray.report.records import Sample, Skipped, StageRecord, Table, read_result, write_result
from nanochat_ray.report.status_failures import note_failure
from nanochat_ray.run_dir import (
    HEARTBEAT_S,
    HEARTBEAT_STALE_S,
    METRICS_FILE,
    RESULT_FILE,
    Lease,
    RunBusyError,
    RunDir,
    StaleWriterError,
    clear_stop,
    host_identity,
    push_records,
    request_stop,
    storage_path,
    stored_lease,
)
from nanochat_ray.tasks.rows import TaskSources

logger = logging.getLogger("nanochat_ray")
for name, value in THREADS_ENV.items():
    os.environ.setdefault(name, value)

EXIT_STOPPED = 130  # stopped on request with the state saved; the same command goes on
FOLLOW_INTERVAL_S = 0.2
LOOK_FOR_LIFE_S = 1.0


class Stopped(Exception):
    """A stage was asked to stop and has saved its state."""


def main(job: Callable[[], None]) -> None:
    """Run a job's main function: what a person got wrong becomes one clear message instead of a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logger.setLevel(logging.INFO)
    try:
        job()
    except Stopped as stop:
        print(stop)
        sys.exit(EXIT_STOPPED)
    except (ValueError, OSError, RunBusyError, StaleWriterError, ClusterError) as error:
        if os.environ.get("NANOCHAT_RAY_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


@dataclass
class Notes:
    """What a stage has to tell the report, filled in while it runs."""

    metrics: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)

    def skip(self, name: str, reason: str) -> None:
        logger.info("skipped %s: %s", name, reason.split(": ")[0])  # the report has it whole
        self.skipped.append(Skipped(name, reason))


@dataclass
class Job:
    """One driver process at work on one run."""

    settings: RunSettings
    run_dir: RunDir
    lease: Lease
    device: str
    threads: int  # torch threads of one training worker on this machine
    resources: contextlib.ExitStack  # closed when the job ends
    beside: int = 1  # Ray actors beside training workers and packing that a private cluster must have room for
    stop: threading.Event = field(default_factory=threading.Event)
    noted: BaseException | None = None  # the error that stands among a stage's failures already
    _has_ray: bool = False

    def use_ray(self) -> bool:
        """Whether stages run on Ray; the cluster is joined or started when the first stage asks."""
        if self.settings.ray and not self._has_ray:
            self.resources.enter_context(ray_cluster(self.settings.worker_range[1], self.beside))
            self._has_ray = True
        return self.settings.ray

    def task_sources(self) -> TaskSources:
        """Where task data lies."""
        given = self.settings.task_data
        return TaskSources(Path(given).expanduser().absolute() if given else None, storage_path(self.settings.storage))

    @contextlib.contextmanager
    def stage(self, name: str, config: dict[str, Any]) -> Iterator[Notes | None]:
        """The frame of a stage: yields None if it is done already, else the notes to fill; marks it done at the end.

        The record is written also when the stage stops half-way, so that its seconds add up over all starts.
        """
        if self.stop.is_set():  # asked for when the stage before was at its very end
            raise Stopped(f"stopped before {name}; the same command goes on from there")
        self.lease.check()
        state = self.run_dir.begin_stage(name, config)
        folder = self.run_dir.stage(name)
        if state == "done":
            logger.info("%s: done before, skipped", name)
            yield None
            return
        clear_stop(folder)
        logger.info("%s: %s", name, "goes on" if state == "interrupted" else "starts")
        before = read_result(folder) if (folder / RESULT_FILE).exists() else None
        started_at = before.started_at if before else time.strftime("%Y-%m-%dT%H:%M:%S%z")
        notes, begun = Notes(), time.monotonic()

        def record() -> StageRecord:
            seconds = (before.seconds if before else 0.0) + time.monotonic() - begun
            return StageRecord(name, started_at, seconds, config=config, **vars(notes))

        try:
            yield notes
        except BaseException as error:
            with contextlib.suppress(OSError, StaleWriterError):
                self.lease.check()
                if isinstance(error, Exception) and not isinstance(error, Stopped):
                    note_failure(folder, error, self.lease.epoch, final=True)
                    self.noted = error
                write_result(folder, record())
                push_records(folder)
            raise
        self.lease.check()
        write_result(folder, record())
        self.run_dir.finish_stage(name)
        logger.info("%s: done in %.0f s", name, record().seconds)

    def wait_for(
        self, stage: str, work: Callable[[], dict[str, Any]], total_steps: int | None, epochs: float = 1.0
    ) -> dict[str, Any]:
        """Run a training stage in a thread while this one shows progress and turns signals into a request to stop."""
        folder = self.run_dir.stage(stage)
        outcome: dict[str, Any] = {}

        def run() -> None:
            try:
                outcome["value"] = work()
            except BaseException as error:
                outcome["error"] = error

        thread = threading.Thread(target=run, name=f"stage-{stage}", daemon=True)
        progress = Progress(total_steps, stage, epochs)
        with self.signals_request_stop(folder), self.run_dir.following(stage):
            thread.start()
            for record in follow(folder / METRICS_FILE, thread.is_alive):
                progress.update(record.pop("step"), record)
        progress.close()
        thread.join()
        if "error" in outcome:
            raise outcome["error"]
        result = outcome["value"]
        if result["status"] == "stopped":
            raise Stopped(f"{stage}: stopped at step {result['step']}, saved; the same command goes on from there")
        return result

    @contextlib.contextmanager
    def signals_request_stop(self, folder: Path) -> Iterator[None]:
        """SIGINT and SIGTERM ask the stage to save and stop; a second one ends the process at once."""

        def on_signal(number: int, frame: object) -> None:
            if self.stop.is_set():
                os._exit(128 + number)
            self.stop.set()
            request_stop(folder)
            print(f"\n{signal.Signals(number).name}: saving; once more to leave at once", flush=True)

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def available_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_machine(on_ray: bool = True) -> Machine:
    """What there is to train on: the cluster that RAY_ADDRESS names, else this machine."""
    import torch

    if on_ray and os.environ.get("RAY_ADDRESS"):
        connect()
        import ray

        resources = ray.cluster_resources()
        prefix = "accelerator_type:"
        kinds = sorted(name.removeprefix(prefix) for name in resources if name.startswith(prefix))
        return Machine(int(resources.get("GPU", 0)), ", ".join(kinds), int(resources.get("CPU", 0)), "in the cluster")
    gpus = torch.cuda.device_count()
    return Machine(gpus, torch.cuda.get_device_name() if gpus else "", available_cpus(), "here")


@contextlib.contextmanager
def open_job(settings: RunSettings, model_tag: str, beside: int = 1) -> Iterator[Job]:
    """Take the run's lease; it and the Ray cluster, if a stage wanted one, are given back at the end."""
    from nanochat_ray.model.precision import pick_device

    run_dir = RunDir.of(settings.storage, model_tag)
    if settings.ray and os.environ.get("RAY_ADDRESS"):  # this machine's own devices do not matter then
        device: str = settings.device_type or ("cuda" if find_machine().gpus else "cpu")
    else:
        device = pick_device(settings.device_type)
    with take(run_dir) as lease, contextlib.ExitStack() as stack:
        threads = max(1, available_cpus() // settings.worker_range[1])
        job = Job(settings, run_dir, lease, device, threads, stack, beside)
        try:
            yield job
        except Exception as error:  # a download, a cluster that cannot be joined: what no stage has noted
            if error is not job.noted and not isinstance(error, Stopped):
                with contextlib.suppress(OSError, StaleWriterError):
                    lease.check()
                    note_failure(run_dir.root, error, lease.epoch, final=True)
            raise


def take(run_dir: RunDir) -> Lease:
    """The run's lease. RunBusyError if its holder is alive.

    Of a holder on another machine only its heartbeat can be seen, and that counts for some time after its death: so one
    that does not beat is waited for. A job that Slurm, Kubernetes or a person starts again elsewhere needs that.
    """
    begun, first = time.monotonic(), None
    while True:
        try:
            return run_dir.open()
        except RunBusyError as error:
            held = stored_lease(run_dir.root)
            if held is None or held["host"] == host_identity():
                raise
            beat = (held["epoch"], held["heartbeat"])
            if beat != (first or beat) or time.monotonic() - begun > HEARTBEAT_STALE_S + 2 * HEARTBEAT_S:
                raise
            if first is None:
                logger.warning("%s, or it is dead; looking for signs of life for at most %.0f s",
                               str(error).partition(";")[0], HEARTBEAT_STALE_S)
            first = beat
            time.sleep(LOOK_FOR_LIFE_S)


@contextlib.contextmanager
def ray_cluster(workers: int, beside: int = 1) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS (or the submitted job) names; without one start a private local cluster.

    A cluster that merely runs on this machine is somebody else's and is never joined.
    """
    if os.environ.get("RAY_ADDRESS"):
        connect()
    else:
        set_ray_defaults()  # before the import, which reads the authentication mode
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # of this cluster alone; nothing is left in ~/.ray
        import ray

        cpus = max(available_cpus(), 2 * workers + beside)  # each worker, packing for it, and what samples or scores
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False,
                 logging_level=logging.WARNING)
        logger.info("Ray: private local cluster with %d logical CPUs", cpus)
    try:
        yield
    finally:
        import ray

        ray.shutdown()


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names, once."""
    set_ray_defaults()
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # the dashboard's Train tab
    if "RAY_AUTH_MODE" not in os.environ and has_ray_token():
        os.environ["RAY_AUTH_MODE"] = "token"
    import ray

    if ray.is_initialized():
        return
    ray.init(log_to_driver=False, logging_level=logging.WARNING)
    resources = ray.cluster_resources()
    logger.info("Ray: joined %s with %g CPUs, %g GPUs", os.environ["RAY_ADDRESS"],
                resources.get("CPU", 0), resources.get("GPU", 0))


def set_ray_defaults() -> None:
    """Ray's own settings, where the person has not set them; they must stand before Ray starts or is joined."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # also the poll for reports, which are barriers
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def follow(path: Path, alive: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """New records of a JSONL file as they are written, until `alive` says no and the file is read to its end."""
    position = path.stat().st_size if path.exists() else 0
    rest = b""
    while True:
        ending = not alive()
        if path.exists():
            with open(path, "rb") as file:
                file.seek(position)
                rest += file.read()
                position = file.tell()
        *lines, rest = rest.split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if "step" in record:
                    yield record
        if ending:
            return
        time.sleep(FOLLOW_INTERVAL_S)


def has_ray_token() -> bool:
    """Whether a Ray auth token is there: environment, the file it names, or the home folder's."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or Path(path).expanduser().exists()

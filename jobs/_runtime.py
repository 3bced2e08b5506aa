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

from nanochat_ray.config import RunSettings
from nanochat_ray.report.metrics_log import follow_metrics
from nanochat_ray.report.progress import Progress
from nanochat_ray.report.records import StageRecord, read_result, write_result
from nanochat_ray.run_dir import METRICS_FILE, RESULT_FILE, STOP_FILE, Lease, RunBusyError, RunDir, StaleWriterError

logger = logging.getLogger("nanochat_ray")

EXIT_STOPPED = 130  # stopped on request with the state saved; the same command goes on
SPARE_CPUS = 2  # logical CPUs of a private cluster beside the training workers: data and evaluation


class Stopped(Exception):
    """A stage was asked to stop and has saved its state."""


def main(job: Callable[[], None]) -> None:
    """Run a job's main function: what a person got wrong becomes one clear message instead of a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        job()
    except Stopped as stop:
        print(stop)
        sys.exit(EXIT_STOPPED)
    except (ValueError, FileNotFoundError, RunBusyError, StaleWriterError, OSError) as error:
        if os.environ.get("NANOCHAT_RAY_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


@dataclass
class Job:
    """One driver process at work on one run."""

    settings: RunSettings
    run_dir: RunDir
    lease: Lease
    device: str
    threads: int  # torch threads that training may use on this machine
    started: float = field(default_factory=time.time)
    stop: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def stage(self, name: str, config: dict[str, Any]) -> Iterator[StageRecord | None]:
        """The frame of a stage: yields None if it is done already, else the record to fill; marks it done at the end."""
        self.lease.check()
        state = self.run_dir.begin_stage(name, config)
        folder = self.run_dir.stage(name)
        if state == "done":
            logger.info("%s: done before, skipped", name)
            yield None
            return
        (folder / STOP_FILE).unlink(missing_ok=True)
        logger.info("%s: %s", name, "continues" if state == "interrupted" else "starts")
        record = StageRecord(stage=name, started_at=time.strftime("%Y-%m-%dT%H:%M:%S%z"), config=config)
        before = read_result(folder).seconds if (folder / RESULT_FILE).exists() else 0.0
        begun = time.monotonic()
        try:
            yield record
        finally:
            record.seconds = before + time.monotonic() - begun  # over all attempts
            with contextlib.suppress(OSError):
                write_result(folder, record)
        self.lease.check()
        self.run_dir.finish_stage(name)
        logger.info("%s: done in %.0f s", name, record.seconds)

    def wait_for(self, stage: str, work: Callable[[], dict[str, Any]], total: int | None) -> dict[str, Any]:
        """Run a training stage in a thread while this one shows progress and turns signals into a request to stop."""
        folder = self.run_dir.stage(stage)
        outcome: dict[str, Any] = {}

        def run() -> None:
            try:
                outcome["value"] = work()
            except BaseException as error:
                outcome["error"] = error

        thread = threading.Thread(target=run, name=f"stage-{stage}", daemon=True)
        progress = Progress(total, desc=stage)
        with self.signals_request_stop(folder):
            thread.start()
            for record in follow_metrics(folder / METRICS_FILE, until=lambda: not thread.is_alive()):
                progress.update(record)
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
            (folder / STOP_FILE).touch()
            print(f"\n{signal.Signals(number).name}: saving; once more to leave at once", flush=True)

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def open_job(settings: RunSettings, model_tag: str, needs_ray: bool = True) -> Iterator[Job]:
    """Take the run's lease and, unless told otherwise, a Ray cluster; both are given back at the end."""
    from nanochat_ray.model.precision import pick_device

    run_dir = RunDir.of(settings.storage, model_tag)
    device = pick_device(settings.device_type)
    with Lease.acquire(run_dir.root) as lease, contextlib.ExitStack() as stack:
        if settings.ray and needs_ray:
            stack.enter_context(ray_cluster(settings.workers))
        threads = max(1, (os.cpu_count() or 1) // settings.workers)
        yield Job(settings, run_dir, lease, device, threads)


@contextlib.contextmanager
def ray_cluster(workers: int) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS (or the submitted job) names; without one start a private local cluster.

    A cluster that merely runs on this machine is somebody else's and is never joined.
    """
    import ray

    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # also the poll for reports, which are barriers
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    if os.environ.get("RAY_ADDRESS"):
        if "RAY_AUTH_MODE" not in os.environ and has_ray_token():
            os.environ["RAY_AUTH_MODE"] = "token"
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
        resources = ray.cluster_resources()
        logger.info("Ray: joined %s with %g CPUs, %g GPUs", os.environ["RAY_ADDRESS"],
                    resources.get("CPU", 0), resources.get("GPU", 0))
    else:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # of this cluster alone; nothing is left in ~/.ray
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        cpus = max(os.cpu_count() or 1, workers + SPARE_CPUS)
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False,
                 logging_level=logging.WARNING)
        logger.info("Ray: private local cluster with %d logical CPUs", cpus)
    try:
        yield
    finally:
        ray.shutdown()


def has_ray_token() -> bool:
    """Whether a Ray auth token is there: environment, the file it names, or the home folder's."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or Path(path).expanduser().exists()


def load_record(folder: Path) -> StageRecord | None:
    """A finished stage's record, None if there is none."""
    return read_result(folder) if (folder / RESULT_FILE).exists() else None


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))

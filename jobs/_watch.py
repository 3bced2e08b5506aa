"""`base_eval.py --watch RUN`: evaluate the checkpoints of a run's pretraining as they appear, in a job of its own.

It takes no lease and writes `<run>/pretrain/watch.jsonl` only, one line for each checkpoint. Whatever happens to it
costs the training nothing, and started again it goes on with what is not evaluated yet.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _evaluate import base_units, core_bundle, note_scores, run_units
from _runtime import EXIT_STOPPED, Notes, find_machine, ray_cluster

from nanochat_ray.config import BaseEvalSettings, RunSettings
from nanochat_ray.corpus.reader import DataManifest
from nanochat_ray.messages import ClusterError
from nanochat_ray.model.checkpoint import MODEL_FILE, open_checkpoint, saved_steps, step_folder
from nanochat_ray.model.precision import pick_device
from nanochat_ray.remote import Remote
from nanochat_ray.report.metrics_log import WATCH_FILE, MetricsLog, read_watch
from nanochat_ray.report.tracker import NO_WANDB, project_of
from nanochat_ray.report.uploader import Uploader
from nanochat_ray.run_dir import (
    CONFIG_FILE,
    DATA_FILE,
    DONE_FILE,
    LEASE_FILE,
    MANIFEST_FILE,
    RunDir,
    read_json,
    shown,
)
from nanochat_ray.stages.evaluation import EvalSpec

logger = logging.getLogger("nanochat_ray")

STAGE = "pretrain"
POLL_S = 1.0
POLL_STORE_S = 5.0
SPEAK_EVERY_S = 30.0


@dataclass
class Watch:
    """A watching job and what it has seen of its run."""

    settings: RunSettings
    eval_settings: BaseEvalSettings
    run_dir: RunDir
    device: str
    on_ray: bool
    passed_over: dict[int, object] = field(default_factory=dict)  # step -> which folder could not be evaluated

    def use_ray(self) -> bool:
        return self.on_ray

    @property
    def checkpoints(self) -> Path:
        return self.run_dir.checkpoints(STAGE)

    def waiting(self) -> list[int]:
        """Steps whose checkpoint is there and neither evaluated nor passed over."""
        done = {record["step"]: record.get("model") for record in read_watch(self.run_dir.stage(STAGE) / WATCH_FILE)}
        steps = [step for step in saved_steps(self.checkpoints) if self.passed_over.get(step, "") != self._stamp(step)]
        return [step for step in steps if step not in done or done[step] != weights_hash(self.checkpoints, step)]

    def pass_over(self, step: int, reason: object) -> None:
        logger.warning("step %d: passed over: %s", step, reason)
        self.passed_over[step] = self._stamp(step)

    def _stamp(self, step: int) -> object:
        """What tells a checkpoint from one that is saved later for the same step."""
        return stamp(step_folder(self.checkpoints, step) / MANIFEST_FILE)

    def evaluate(self, step: int, bundle: Path | None) -> dict[str, Any] | None:
        """The numbers of a checkpoint; None, with a line that says why, if it cannot be read or went away."""
        try:
            checkpoint = open_checkpoint(self.checkpoints, step)
            weights = checkpoint.model_hash
            config = checkpoint.model_config
            logger.info("step %d: evaluating", step)
            spec = EvalSpec(
                self.checkpoints, step, self.run_dir.stage("tokenizer"), self.device, self.settings.dtype,
                bundle=bundle, manifest=DataManifest.from_json(read_json(self.run_dir.root / DATA_FILE)),
                device_batch_size=self.eval_settings.device_batch_size,
            )
            units = base_units(self.eval_settings, config.sequence_len, bundle)
            notes = Notes()
            note_scores(notes, units, run_units(self, spec, units), config.sequence_len, bundle)
        except ClusterError:
            raise
        except Exception as error:  # of whatever kind an actor passes on; what matters is whether it is still there
            try:
                open_checkpoint(self.checkpoints, step)
            except (OSError, ValueError) as problem:
                self.pass_over(step, problem)
                return None
            raise error
        return {**notes.metrics, "samples": notes.samples, "model": weights}


def weights_hash(root: Path, step: int) -> str | None:
    """Which weights a checkpoint says to hold, without reading them; None if it does not say."""
    path = step_folder(root, step) / MANIFEST_FILE
    try:
        data = remote.read(path) if (remote := Remote.of(path)) else path.read_bytes()
        return json.loads(data or b"")["files"][MODEL_FILE]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def stamp(path: Path) -> object:
    """What changes when a file is written anew, here or in the run's store; None if there is no such file."""
    if (remote := Remote.of(path)) is not None:
        return remote.find(path)
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


class Deadline:
    """Waiting for a run: a line every SPEAK_EVERY_S, TimeoutError after `timeout_s` without a sign of life."""

    def __init__(self, run_dir: RunDir, timeout_s: float):
        self.run_dir, self.timeout_s = run_dir, timeout_s
        self.sign: object = None
        self.heard = self.spoke = time.monotonic()

    def wait(self, what: str) -> None:
        """Wait a little for `what`."""
        now, sign = time.monotonic(), self._sign()
        if sign != self.sign:
            self.sign, self.heard = sign, now
        if now - self.heard > self.timeout_s:
            raise TimeoutError(f"{shown(self.run_dir.root)} has shown no sign of life for {self.timeout_s:g} s "
                               f"(--watch-timeout), while waiting for {what}")
        if now - self.spoke > SPEAK_EVERY_S:
            self.spoke = now
            logger.info("waiting for %s; the last sign of life was %.0f s ago", what, now - self.heard)
        time.sleep(POLL_STORE_S if Remote.of(self.run_dir.root) else POLL_S)

    def _sign(self) -> object:
        """Something that changes while a job works on the run: its lease, which it renews every few seconds."""
        return stamp(self.run_dir.root / LEASE_FILE), saved_steps(self.run_dir.checkpoints(STAGE))


def watch(settings: RunSettings, eval_settings: BaseEvalSettings, run: str, timeout_s: float) -> None:
    """Evaluate every checkpoint of the run's pretraining once; returns when the stage is done and all were seen.

    Raises TimeoutError when the run shows no sign of life for `timeout_s`, or never appears.
    """
    run_dir = RunDir.of(settings.storage, run)
    deadline = Deadline(run_dir, timeout_s)
    with ended_by_signals():
        while not is_ready(run_dir):
            deadline.wait(f"{shown(run_dir.root)} to begin its pretraining")
        run_dir.fetch()
        with contextlib.ExitStack() as stack:
            on_ray = settings.ray and bool(os.environ.get("RAY_ADDRESS"))  # no cluster is started for this job
            if on_ray:
                stack.enter_context(ray_cluster(0))
                signal.signal(signal.SIGTERM, end)  # Ray has set its own
            device: str = settings.device_type or (
                ("cuda" if find_machine().gpus else "cpu") if on_ray else pick_device(None)
            )
            follow(Watch(settings, eval_settings, run_dir, device, on_ray), deadline)
        upload_rest(settings, run_dir)
    logger.info("%s: pretraining is done and its checkpoints are evaluated", run)


def is_ready(run_dir: RunDir) -> bool:
    """Whether all is there that an evaluation needs, but for a checkpoint."""
    wanted = (DATA_FILE, f"tokenizer/{DONE_FILE}", f"{STAGE}/{CONFIG_FILE}")
    return all(stamp(run_dir.root / name) is not None for name in wanted)


def follow(job: Watch, deadline: Deadline) -> None:
    """Evaluate what is waiting, oldest first, until pretraining is done and nothing waits."""
    bundle, reason = core_bundle(job.settings, job.eval_settings)
    if reason:
        logger.info("skipped CORE: %s", reason)
    log = MetricsLog(job.run_dir.stage(STAGE) / WATCH_FILE)
    while True:
        # asked before looking, so that the last checkpoint is seen
        ended = stamp(job.run_dir.stage(STAGE) / DONE_FILE) is not None
        waiting = job.waiting()
        if not waiting and ended:
            break
        if not waiting:
            deadline.wait("the next checkpoint")
            continue
        try:
            metrics = job.evaluate(waiting[0], bundle)
        except ClusterError as error:
            logger.warning("%s", error)
            deadline.wait("room on the cluster")
            continue
        if metrics is not None:
            log.append({"step": waiting[0], "time": round(time.time(), 3), **metrics})
            if (remote := Remote.of(log.path)) is not None:
                remote.push_log(log.path)
    log.close()


def upload_rest(settings: RunSettings, run_dir: RunDir) -> None:
    """Send to the stage's wandb run what came after the training had closed it."""
    if settings.run != NO_WANDB:
        folder = run_dir.stage(STAGE)
        if problem := Uploader(folder, settings.run, project_of(folder), {}).finish():
            logger.warning("wandb did not finish: %s", problem)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGINT and SIGTERM end the job; what it has evaluated is in the file."""
    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end(number: int, frame: object) -> None:
    print(f"\n{signal.Signals(number).name}: ended; the same command goes on from here", flush=True)
    sys.exit(EXIT_STOPPED)

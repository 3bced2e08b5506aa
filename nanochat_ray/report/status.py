"""Where a run is, from its files alone: no Ray, no torch, no process of the run is asked.

A file that is missing, half-written or damaged makes one number unknown, or a line among the problems, never an error.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nanochat_ray import run_dir
from nanochat_ray.report.metrics_log import WATCH_FILE, is_train_step, read_lines, read_watch, without_undone
from nanochat_ray.report.records import read_result
from nanochat_ray.report.status_checkpoints import SavedCheckpoint, newest_checkpoint
from nanochat_ray.report.status_failures import Failure, read_failures
from nanochat_ray.report.training import middle, numbers, summarise
from nanochat_ray.run_dir import CONFIG_FILE, DONE_FILE, METRICS_FILE, RESULT_FILE, STAGES, RunDir

RECENT_STEPS = 200  # that the rate of the remaining steps is estimated from
SHOWN = {  # what a stage's line says, by the tracker's names: the newest value counts
    "loss": "train/loss", "val_bpb": "val/bpb", "tok_per_sec": "train/tok_per_sec", "mfu": "train/mfu",
    "core_metric": "core_metric", "chatcore_metric": "chatcore_metric", "reward": "rollout/reward_mean",
    "eval_reward": "eval/reward_mean", "pass_at_1": "eval/greedy",
}  # fmt: skip
RunState = Literal["running", "done", "failed", "stopped", "died", "empty"]
WORDS: dict[RunState, str] = {
    "running": "a job is at work on it",
    "done": "every stage that was begun is done",
    "failed": "its last job ended with an error",
    "stopped": "ended before its last stage was done; the same command goes on",
    "died": "its job died; the same command goes on from the last checkpoint",
    "empty": "no stage has begun",
}


@dataclass(frozen=True)
class Holder:
    """Who holds the run's lease."""

    epoch: int
    host: str
    pid: int
    alive: bool
    released: bool
    heartbeat_age_s: float


@dataclass(frozen=True)
class StageStatus:
    """Where a stage is; None where its files do not say."""

    name: str
    state: Literal["waiting", "begun", "done"]
    step: int | None  # steps that are done
    steps: int | None  # of them in all
    done_frac: float | None
    step_s: float | None  # of late, with evaluations and checkpoints
    eta_s: float | None
    news_age_s: float | None  # since the newest line of its metrics
    seconds: float | None  # that all its starts took together, as far as it is recorded
    restarts: int  # times that its training began again
    checkpoint: SavedCheckpoint | None
    failures: Sequence[Failure]
    values: Mapping[str, float]  # the newest of each name of SHOWN


@dataclass(frozen=True)
class RunStatus:
    """Where a run is."""

    run: str
    folder: str  # or URI
    state: RunState
    stage: str | None  # the one that is under way, or that was left half-done
    holder: Holder | None
    stages: Sequence[StageStatus]
    last_failure: Failure | None
    disk_bytes: int  # of the run's folder on this machine
    disk_free_bytes: int | None
    at_s: float  # when this was found out, in seconds since 1970
    problems: Sequence[str]  # files that could not be read

    @property
    def restarts(self) -> int:
        return sum(stage.restarts for stage in self.stages)

    @property
    def current(self) -> StageStatus | None:
        return next((stage for stage in self.stages if stage.name == self.stage), None)


def read_status(run: RunDir) -> RunStatus:
    """Look at a run. A run in object storage should have been fetched before (`RunDir.fetch`)."""
    problems: list[str] = []
    now_s = time.time()
    stages = [_stage(run, name, now_s, problems) for name in STAGES]
    holder = _holder(run.root, now_s, problems)
    under_way = [stage.name for stage in stages if stage.state == "begun"]
    failures = [*read_failures(run.root), *(failure for stage in stages for failure in stage.failures)]
    last = max(failures, key=lambda failure: failure.at_s, default=None)
    return RunStatus(
        run.root.name, run_dir.shown(run.root), _state(stages, holder, last), under_way[-1] if under_way else None,
        holder, stages, last, _folder_bytes(run.root), _free_bytes(run.root), now_s, problems,
    )  # fmt: skip


def curves(run: RunDir, stage: str) -> list[dict[str, Any]]:
    """The records of a stage that count, with those of a job that evaluates its checkpoints."""
    folder = run.stage(stage)
    watched = read_watch(folder / WATCH_FILE)
    return [*without_undone(read_lines(folder / METRICS_FILE)), *watched]


def _state(stages: Sequence[StageStatus], holder: Holder | None, last: Failure | None) -> RunState:
    if holder is not None and holder.alive:
        return "running"
    if last is not None and last.final and (holder is None or last.epoch >= holder.epoch):
        return "failed"
    if holder is not None and not holder.released:
        return "died"
    states = {stage.state for stage in stages}
    if states == {"waiting"}:
        return "empty"
    return "stopped" if "begun" in states else "done"


def _holder(root: Path, now_s: float, problems: list[str]) -> Holder | None:
    try:
        held = run_dir.stored_lease(root)
        if held is None:
            return None
        return Holder(
            int(held["epoch"]), str(held["host"]).split("|")[0], int(held["pid"]), run_dir.holder_is_alive(held),
            bool(held.get("released")), max(0.0, now_s - float(held["heartbeat"])),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append(f"{run_dir.LEASE_FILE}: {type(error).__name__}: {error}")
        return None


def _stage(run: RunDir, name: str, now_s: float, problems: list[str]) -> StageStatus:
    folder = run.stage(name)
    begun = any((folder / file).exists() for file in (CONFIG_FILE, METRICS_FILE))
    done = (folder / DONE_FILE).exists()
    if name == "report":  # a stage without settings, made anew each time
        done = (folder / "report.md").exists()
    settings = _settings(folder, problems) if (folder / CONFIG_FILE).exists() else {}
    written = read_lines(folder / METRICS_FILE)
    kept = without_undone(written)
    trained = [record for record in kept if is_train_step(record) and isinstance(record.get("step"), int)]
    checkpoint = newest_checkpoint(run.checkpoints(name), now_s, problems) if begun else None
    step = trained[-1]["step"] + 1 if trained else None
    steps = _steps(settings, checkpoint)
    if done and step is not None:
        steps = step
    done_frac = _done_frac(step, steps, trained, settings)
    step_s = seconds_per_step(trained, written)
    news = [seconds for seconds in numbers(written, "time") if seconds > 0]
    summary = summarise(written)
    return StageStatus(
        name, "done" if done else "begun" if begun else "waiting", step, steps,
        1.0 if done else done_frac, step_s, None if done else _eta_s(step, steps, done_frac, step_s),
        max(0.0, now_s - news[-1]) if news else None, _seconds(folder, problems), summary.starts - 1 if summary else 0,
        checkpoint, read_failures(folder), _newest_values(kept, trained),
    )  # fmt: skip


def _settings(folder: Path, problems: list[str]) -> dict[str, Any]:
    """What the stage's identity says: its settings, and RL's task."""
    try:
        config = run_dir.read_json(folder / CONFIG_FILE)
        return {**config.get("settings", {}), "task": config.get("task")}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        problems.append(f"{folder.name}/{CONFIG_FILE}: {type(error).__name__}: {error}")
        return {}


def _steps(settings: Mapping[str, Any], checkpoint: SavedCheckpoint | None) -> int | None:
    """Steps of a stage: as it was told, as its checkpoints say, or as the number of RL's prompts makes them."""
    told = settings.get("num_iterations")
    if isinstance(told, int):
        return told
    if checkpoint is not None and checkpoint.steps is not None:
        return checkpoint.steps
    try:
        n_prompts = int(settings["task"]["train"]["prompts"])
        return -(-n_prompts * int(settings["num_epochs"]) // int(settings["examples_per_step"]))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def _done_frac(
    step: int | None, steps: int | None, trained: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> float | None:
    if step is None:
        return None
    if steps:
        return min(1.0, step / steps)
    progress = numbers(trained[-1:], "train/progress")  # in epochs
    epochs = settings.get("num_epochs") or 1
    return min(1.0, progress[0] / epochs) if progress and epochs > 0 else None


def seconds_per_step(trained: Sequence[Mapping[str, Any]], written: Sequence[Mapping[str, Any]]) -> float | None:
    """The wall time of a step over the latest steps of the latest start, None from less than two of them."""
    starts = [seconds for record in written if record.get("event") == "start" for seconds in numbers([record], "time")]
    since = [t for t in numbers(trained, "time") if not starts or t >= starts[-1]][-RECENT_STEPS:]
    return (since[-1] - since[0]) / (len(since) - 1) if len(since) > 1 and since[-1] > since[0] else None


def _eta_s(step: int | None, steps: int | None, done_frac: float | None, step_s: float | None) -> float | None:
    if step is None or step_s is None or not done_frac:
        return None
    left = steps - step if steps else step * (1 - done_frac) / done_frac
    return max(0.0, left * step_s)


def _newest_values(kept: Sequence[Mapping[str, Any]], trained: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found = {label: numbers(kept, name) for label, name in SHOWN.items()}
    newest = {label: values[-1] for label, values in found.items() if values}
    for label in ("tok_per_sec", "mfu"):  # which jump from step to step
        of_late = middle(numbers(trained[-RECENT_STEPS:], SHOWN[label]))
        newest |= {label: of_late} if of_late is not None else {}
    return newest


def _seconds(folder: Path, problems: list[str]) -> float | None:
    if not (folder / RESULT_FILE).exists():
        return None
    try:
        seconds = read_result(folder).seconds
        return seconds if math.isfinite(seconds) else None
    except (OSError, ValueError) as error:
        problems.append(f"{folder.name}/{RESULT_FILE}: {error}")
        return None


def _folder_bytes(root: Path) -> int:
    """What the files below a folder take, as far as they stay while they are counted."""
    total = 0
    for folder, _, names in os.walk(root):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except OSError:
                continue
    return total


def _free_bytes(root: Path) -> int | None:
    try:
        found = os.statvfs(root)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize

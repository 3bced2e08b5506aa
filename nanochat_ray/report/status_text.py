"""A run's status as lines for a terminal, and as JSON."""

from __future__ import annotations

import json

from nanochat_ray.report.records import plain
from nanochat_ray.report.status import WORDS, Holder, RunStatus, StageStatus
from nanochat_ray.report.status_failures import Failure
from nanochat_ray.report.text import duration, size

VALUE_WORDS = {
    "loss": ("loss", ".4f"), "val_bpb": ("val bpb", ".4f"), "tok_per_sec": ("tok/s", ",.0f"), "mfu": ("MFU %", ".1f"),
    "core_metric": ("CORE", ".4f"), "chatcore_metric": ("ChatCORE", ".4f"), "reward": ("reward", ".3f"),
    "eval_reward": ("evaluation reward", ".3f"), "pass_at_1": ("pass@1, greedy", ".3f"),
}  # fmt: skip


def status_json(status: RunStatus) -> str:
    """One line of JSON with every field of RunStatus, and `restarts`."""
    return json.dumps(plain(status) | {"restarts": status.restarts, "words": WORDS[status.state]}, allow_nan=False)


def status_text(status: RunStatus) -> str:
    """Some lines that a person reads; control characters of the run's own texts are left out."""
    lines = [f"{status.run}: {status.state} ({WORDS[status.state]})", f"  {status.folder}"]
    if status.holder is not None:
        lines.append(f"  {holder_words(status.holder)}")
    for stage in status.stages:
        lines.append(f"{stage.name:<16}{stage_words(stage, status)}".rstrip())
        if stage.name == status.stage and stage.checkpoint is not None:
            lines.append(f"{'':<16}{checkpoint_words(stage)}")
    lines.append(f"restarts: {status.restarts}")
    if status.last_failure is not None:
        lines.append(f"last error: {failure_words(status.last_failure, status.at_s)}")
    lines.append(f"disk: {disk_words(status)}")
    lines += [f"cannot be read: {problem}" for problem in status.problems]
    return "\n".join("".join(char for char in line if char.isprintable()) for line in lines)


def stage_words(stage: StageStatus, status: RunStatus) -> str:
    """What one stage does, in a line."""
    if stage.state == "waiting":
        return "-"
    parts = [state_word(stage, status)]
    if stage.step is not None:
        share = f" ({100 * stage.done_frac:.1f} %)" if stage.done_frac is not None and stage.state != "done" else ""
        parts.append(f"step {stage.step:,}" + (f" of {stage.steps:,}" if stage.steps else "") + share)
    parts += value_words(stage)
    if stage.state == "begun" and stage.eta_s is not None:
        parts.append(f"{duration(stage.eta_s)} to go" + ("" if status.state == "running" else " once it goes on"))
    if stage.state == "begun" and status.state == "running" and stage.news_age_s is not None:
        parts.append(f"last news {duration(stage.news_age_s)} ago")
    if stage.state == "done" and stage.seconds is not None:
        parts.append(f"took {duration(stage.seconds)}")
    if stage.restarts:
        parts.append(f"{stage.restarts} restart{'s' if stage.restarts > 1 else ''}")
    return ", ".join(parts)


def state_word(stage: StageStatus, status: RunStatus) -> str:
    """The stage's state in the light of the run's: what was begun is under way only while somebody lives."""
    if stage.state != "begun":
        return stage.state
    return status.state if stage.name == status.stage else "left half-done"


def value_words(stage: StageStatus) -> list[str]:
    """The newest numbers of a stage."""
    return [
        f"{words} {stage.values[name]:{form}}" for name, (words, form) in VALUE_WORDS.items() if name in stage.values
    ]


def checkpoint_words(stage: StageStatus) -> str:
    saved = stage.checkpoint
    if saved is None:
        return "no checkpoint yet"
    return f"last checkpoint: step {saved.step:,}, {duration(saved.age_s)} old, {size(saved.bytes)}"


def holder_words(holder: Holder) -> str:
    who = f"process {holder.pid} on {holder.host} (lease {holder.epoch})"
    if holder.alive:
        return f"{who} is at work, last heartbeat {duration(holder.heartbeat_age_s)} ago"
    how = "has given the run back" if holder.released else "is gone without giving the run back"
    return f"{who} {how}, last heartbeat {duration(holder.heartbeat_age_s)} ago"


def failure_words(failure: Failure, now_s: float) -> str:
    went_on = "" if failure.step is None else f", went on from step {failure.step:,}"
    end = ", the job ended" if failure.final else went_on
    return f"{failure.stage}, {duration(max(0.0, now_s - failure.at_s))} ago{end}: {' '.join(failure.error.split())}"


def disk_words(status: RunStatus) -> str:
    free = "" if status.disk_free_bytes is None else f", {size(status.disk_free_bytes)} free"
    return f"{size(status.disk_bytes)} here{free}"

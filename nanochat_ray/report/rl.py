"""What the report says of a stage with rollouts: before and after, where a step's time went, what was left out.

Of the records of `metrics.jsonl` it reads `rollout/...`, `train/...` and `rollout/left_out`: names of prompts and
rollouts that were not learned from, each with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from nanochat_ray.report.metrics_log import is_train_step, without_undone
from nanochat_ray.report.records import Scalar, StageRecord
from nanochat_ray.report.text import ABSENT, cell, markdown_table, one_line, value_text
from nanochat_ray.report.training import middle, numbers, share, warm_steps
from nanochat_ray.run_dir import read_json

BEFORE, AFTER = "before", "after"
SAMPLES_FILES = {BEFORE: "samples_before.json", AFTER: "samples_after.json"}
MAX_SAMPLES, MAX_SAMPLE_CHARS = 10, 500
MAX_LEFT_OUT = 20
STEP_PARTS = (
    ("generate", "rollout/generate_s"), ("score", "rollout/score_s"), ("wait for rollouts", "rollout/wait_s"),
    ("update", "train/update_s"), ("publish the weights", "train/publish_s"),
)  # fmt: skip
TOOL_CALL = re.compile(
    r"<\|python_start\|>(.*?)<\|python_end\|>(?:<\|output_start\|>(.*?)<\|output_end\|>)?", re.DOTALL
)


@dataclass(frozen=True)
class RLSample:
    """One completion of a prompt that the stage is evaluated on, as the files of samples have it."""

    id: str  # of the prompt
    prompt: str
    completion: str
    reward: float | None


def rl_parts(folder: Path, record: StageRecord | None, written: Sequence[Mapping[str, Any]]) -> list[str]:
    """The parts of a stage's section in Markdown, none for a stage without rollouts."""
    steps = [step for step in without_undone(map(dict, written)) if is_train_step(step)]
    found = [
        _before_and_after(record.metrics if record else {}),
        _rollouts([step for step in steps if "rollout/reward_mean" in step]),
        _left_out(steps),
        _step_times(warm_steps(written) or steps),
        _samples(folder),
    ]
    return [part for part in found if part]


def of_before_and_after(name: str) -> bool:
    """Whether a metric is of the model before or after RL; those stand in a table of their own."""
    return name.partition("/")[0] in (BEFORE, AFTER)


def _before_and_after(metrics: Mapping[str, Scalar]) -> str:
    names = list(dict.fromkeys(name.partition("/")[2] for name in metrics if of_before_and_after(name)))
    rows = []
    for name in names:
        values = [metrics.get(f"{when}/{name}") for when in (BEFORE, AFTER)]
        told = ABSENT
        first, last = values
        if isinstance(first, int | float) and isinstance(last, int | float):
            told = ("+" if last >= first else "-") + value_text(name, abs(last - first))
        rows.append([name, *[value_text(name, value) for value in values], told])
    if not rows:
        return ""
    note = (
        "pass@k: any of a prompt's first k samples is right; unbiased: of any k of its samples. "
        "greedy: right at temperature 0."
    )
    return f"### Before and after\n\n{markdown_table(['', BEFORE, AFTER, 'change'], rows)}\n\n{note}"


def _rollouts(steps: Sequence[Mapping[str, Any]]) -> str:
    if not steps:
        return ""
    lags, useless = numbers(steps, "rollout/policy_lag"), numbers(steps, "rollout/zero_advantage_frac")
    rows = [
        ["steps", f"{len(steps):,}"],
        ["policy lag, largest", f"{max(lags):g}" if lags else ABSENT],
        ["groups in which all rewards are equal", f"{fmean(useless):.1%}" if useless else ABSENT],
        ["rollouts without a reward, left out", f"{sum(numbers(steps, 'rollout/masked')):,.0f}"],
        ["prompts set aside", f"{sum(numbers(steps, 'rollout/set_aside')):,.0f}"],
    ]
    return f"### Rollouts\n\n{markdown_table(['', 'value'], rows)}"


def _left_out(steps: Sequence[Mapping[str, Any]]) -> str:
    """Prompts and rollouts that were not learned from, by name, with the reason."""
    found: dict[str, str] = {}
    for step in steps:
        found |= step.get("rollout/left_out") or {}
    if not found:
        return ""
    rows = [[name, reason] for name, reason in list(found.items())[:MAX_LEFT_OUT]]
    more = f"\n\nAnd {len(found) - MAX_LEFT_OUT:,} more." if len(found) > MAX_LEFT_OUT else ""
    return f"### Not learned from\n\n{markdown_table(['', 'why'], rows, numbers=False)}{more}"


def _step_times(steps: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for label, name in STEP_PARTS:
        seconds, part = numbers(steps, name), share(steps, name)
        if seconds and part is not None:
            rows.append([label, f"{middle(seconds):.3f} s", f"{part:.1%}"])
    if not rows:
        return ""
    rows.append(["whole step", f"{middle(numbers(steps, 'train/dt')):.3f} s", "100.0%"])
    note = (
        "Medians, and shares of the steps' time, without the first steps of each start. What other processes do "
        "beside the step counts in full, so shares may add up to more than the whole."
    )
    return f"### Time of a step\n\n{markdown_table(['', 'a step', 'share'], rows)}\n\n{note}"


def _samples(folder: Path) -> str:
    """The same prompts before and after, side by side."""
    title = "### Samples before and after\n\n"
    try:
        before, after = (_read_samples(folder / SAMPLES_FILES[when]) for when in (BEFORE, AFTER))
    except (ValueError, KeyError, TypeError) as error:
        return title + one_line(f"The samples cannot be read ({type(error).__name__}: {error}).")
    rows = []
    for name in list(dict.fromkeys([*before, *after]))[:MAX_SAMPLES]:
        sides = [before.get(name), after.get(name)]
        prompt = next(sample.prompt for sample in sides if sample)
        row = [cell(prompt, MAX_SAMPLE_CHARS)]
        for sample in sides:
            row += [_completion(sample), ABSENT if sample is None else value_text("reward", sample.reward)]
        rows.append(row)
    columns = ["prompt", BEFORE, "reward", AFTER, "reward"]
    return title + markdown_table(columns, rows, numbers=False, escaped=True) if rows else ""


def _read_samples(path: Path) -> dict[str, RLSample]:
    """The first sample of each prompt."""
    if not path.exists():
        return {}
    found: dict[str, RLSample] = {}
    for item in read_json(path):
        reward = item["reward"]
        sample = RLSample(
            str(item["id"]), str(item["prompt"]), str(item["completion"]), None if reward is None else float(reward)
        )
        found.setdefault(sample.id, sample)
    return found


def _completion(sample: RLSample | None) -> str:
    """What the model wrote, tool calls as `[6*7 = 42]`."""
    if sample is None:
        return ABSENT
    text = TOOL_CALL.sub(lambda call: f"[{call[1]}" + (f" = {call[2]}]" if call[2] else "]"), sample.completion)
    return cell(text, MAX_SAMPLE_CHARS) or "(nothing)"

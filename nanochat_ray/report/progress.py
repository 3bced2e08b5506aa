"""What a person sees while a stage runs: a bar with rate and ETA on a terminal, sparse step lines in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from nanochat_ray.report.metrics_log import is_train_step
from nanochat_ray.report.records import plain

# Evaluation numbers that get a line of their own: tracker name -> words, decimals
EVALUATIONS = {
    "val/bpb": ("Validation bpb", 6),
    "core_metric": ("CORE metric", 4),
    "chatcore_metric": ("ChatCORE metric", 4),
    "chatcore_cat": ("ChatCORE categorical", 4),
    "eval/reward_mean": ("Mean reward of evaluation prompts", 4),
    "eval/unbiased_pass@1": ("pass@1, sampled", 4),
    "eval/greedy": ("pass@1, greedy", 4),
}
MIN_LINE_INTERVAL_S = 2.0
MAX_LINE_INTERVAL_S = 60.0
LINES_PER_E_FOLD = 50  # lines while the elapsed time grows by a factor e


class Waits:
    """What the training waited for, as shares of the steps' own time since the last time that this was shown."""

    SHOWN = (
        ("train/data_wait_s", "data wait"), ("rollout/wait_s", "rollout wait"),
        ("train/checkpoint_stall_s", "checkpoint stall"),
    )  # fmt: skip

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._sums = dict.fromkeys(("train/dt", *(name for name, _ in self.SHOWN)), 0.0)
        self._seen: set[str] = set()

    def add(self, metrics: Mapping[str, Any]) -> None:
        for name in self._sums:
            if metrics.get(name) is not None:
                self._sums[name] += metrics[name]
                self._seen.add(name)

    def shares(self) -> dict[str, float]:
        """Label -> share of 1; stalls and waits for rollouts only where there were some."""
        steps_s = self._sums["train/dt"]
        return {
            label: self._sums[name] / steps_s for name, label in self.SHOWN
            if steps_s > 0 and name in self._seen and (self._sums[name] > 0 or name == "train/data_wait_s")
        }  # fmt: skip


def step_line(
    step: int, total: int | None, metrics: Mapping[str, Any], done_frac: float | None = None,
    eta_s: float | None = None, waits: Mapping[str, float] = {},
) -> str:
    """One line on a training step, from the tracker's names; what is missing is left out (SPEC 1, 11.3).

    Units of `metrics`: train/loss nats, train/dt and total_training_time seconds, train/mfu percent. `done_frac` is
    the share of the stage that is done where `total`, its steps, is not known; `waits` are shares of the steps' time.
    """
    if total:
        done_frac = step / total
    head = f"step {step:05d}" + (f"/{total:05d}" if total else "")
    parts = [head if done_frac is None else f"{head} ({100 * done_frac:.2f}%)"]
    for name, label, form, unit, scale in (
        ("rollout/reward_mean", "reward", ".4f", "", 1),
        ("rollout/length_mean", "length", ".1f", "", 1),
        ("rollout/policy_lag", "lag", ".0f", "", 1),
        ("train/loss", "loss", ".6f", "", 1),
        ("train/lrm", "lrm", ".2f", "", 1),
        ("train/dt", "dt", ".2f", "ms", 1000),
        ("train/tok_per_sec", "tok/sec", ",.0f", "", 1),
        ("train/mfu", "bf16_mfu", ".2f", "", 1),
        ("train/grad_norm", "grad norm", ".3f", "", 1),
        ("data/waste_frac", "waste", ".2f", "%", 100),
    ):
        if metrics.get(name) is not None:
            parts.append(f"{label}: {metrics[name] * scale:{form}}{unit}")
    parts += [f"{label}: {100 * frac:.1f}%" for label, frac in waits.items()]
    place = [f"{name}: {metrics[f'train/{name}']}" for name in ("epoch", "item", "row") if f"train/{name}" in metrics]
    if place:
        parts.append(" ".join(place))
    if metrics.get("total_training_time") is not None:
        parts.append(f"total time: {metrics['total_training_time'] / 60:.2f}m")
    if eta_s is not None:
        parts.append(f"eta: {eta_s / 60:.1f}m")
    return " | ".join(parts)


def evaluation_lines(step: int, metrics: Mapping[str, Any]) -> list[str]:
    """A line for each evaluation number and each sample in `metrics`."""
    found = []
    for name, (words, decimals) in EVALUATIONS.items():
        if metrics.get(name) is not None:
            found.append(f"step {step:05d} | {words}: {metrics[name]:.{decimals}f}")
    for sample in plain(metrics.get("samples") or []):
        text = sample["prompt"] + sample["text"] if isinstance(sample, dict) else str(sample)
        found.append(f"step {step:05d} | sample: {text}")
    return found


class Progress:
    """Shows a training stage; `update` takes what the tracker takes, on rank 0, as often as there is news.

    On a terminal one bar (tqdm). Otherwise plain lines: the first step, the last, and in between ever fewer, one in two
    seconds at first and one a minute later, so that a long log stays readable. Evaluations are always shown.
    `total` is the number of steps; None if it is not known, then `train/progress` counts up to `epochs`.
    """

    def __init__(
        self,
        total: int | None,
        desc: str,
        epochs: float = 1.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total = total
        self._epochs = epochs
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._first: tuple[float, float] | None = None  # time and share done at the first update
        self._last_line_s: float | None = None
        self._pending: str | None = None  # the newest line not shown
        self._waits = Waits()
        self._bar: Any = None
        if self._stream.isatty():
            from tqdm import tqdm

            size: dict[str, Any] = {"dynamic_ncols": True}
            if not _knows_its_size(self._stream):  # tqdm hides the bar of a terminal of 0 lines
                size = {"ncols": 100, "nrows": 24}
            self._bar = tqdm(total=total, desc=desc, unit="step", file=self._stream, **size)

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show the news of one step: a training step, or else evaluation numbers and samples."""
        if not is_train_step(metrics):
            for line in evaluation_lines(step, metrics):
                self.write(line)
            return
        self._waits.add(metrics)
        if self._bar is not None:
            self._update_bar(step, metrics)
        else:
            self._update_log(step, metrics)

    def write(self, text: str) -> None:
        """A line of text above the bar, or in the log."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Show the last step if it was not, and leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
        elif self._pending is not None:
            self.write(self._pending)
            self._pending = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _done_frac(self, step: int, metrics: Mapping[str, Any]) -> float | None:
        """The share of the stage that is done after this step."""
        if self._total:
            return (step + 1) / self._total
        progress = metrics.get("train/progress")
        return None if progress is None else min(1.0, progress / self._epochs)

    def _update_bar(self, step: int, metrics: Mapping[str, Any]) -> None:
        done = self._done_frac(step, metrics)
        if self._total is None and done:
            self._bar.total = max(step + 1, round((step + 1) / done))
        shown = {"loss": f"{metrics['train/loss']:.4f}"}
        if metrics.get("rollout/reward_mean") is not None:
            shown["reward"] = f"{metrics['rollout/reward_mean']:.3f}"
        if metrics.get("train/tok_per_sec") is not None:
            shown["tok/s"] = f"{metrics['train/tok_per_sec']:,.0f}"
        shown |= {label: f"{100 * frac:.1f}%" for label, frac in self._waits.shares().items()}
        if self._bar.n == 0 and step > 0:  # resumed: the steps before are not part of the rate
            self._bar.initial = self._bar.n = step
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step + 1 - self._bar.n)

    def _update_log(self, step: int, metrics: Mapping[str, Any]) -> None:
        now, done = self._clock(), self._done_frac(step, metrics)
        if self._first is None:
            self._first = (now, done or 0.0)
        elapsed_s, gained = now - self._first[0], (done or 0.0) - self._first[1]
        eta_s = elapsed_s * (1 - done) / gained if done is not None and gained > 0 else None
        line = step_line(step, self._total, metrics, done, eta_s, self._waits.shares())
        interval_s = min(max(elapsed_s / LINES_PER_E_FOLD, MIN_LINE_INTERVAL_S), MAX_LINE_INTERVAL_S)
        if self._last_line_s is not None and now - self._last_line_s < interval_s:
            self._pending = line
            return
        self._last_line_s, self._pending = now, None
        self._waits.clear()
        self.write(line)


def _knows_its_size(terminal: TextIO) -> bool:
    """Whether a terminal says how large it is; those of containers and pipes often say 0."""
    try:
        columns, lines = os.get_terminal_size(terminal.fileno())
    except (OSError, ValueError):
        return False
    return columns > 0 and lines > 0

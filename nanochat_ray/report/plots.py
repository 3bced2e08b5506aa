"""PNG plots of a stage's records: loss, bits per byte, CORE, rewards, rates, waits. Only what has data is drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_ray.report.metrics_log import is_train_step
from nanochat_ray.run_dir import write_atomic


@dataclass(frozen=True)
class Plot:
    """One picture: the series in it, by tracker name and legend."""

    name: str
    y_label: str
    series: Mapping[str, str]
    of_train_steps: bool | None = True  # of the steps' records, of the evaluations', or of both
    from_zero: bool = False


PLOTS = (
    Plot("loss", "loss (nats per token)", {"train/loss_step": "one step", "train/loss": "moving average"}),
    Plot("bpb", "bits per byte", {"train/bpb": "train", "val/bpb": "validation"}, of_train_steps=False),
    Plot("core", "CORE metric", {"core_metric": "CORE"}, of_train_steps=False),
    Plot("reward", "mean reward", {"rollout/reward_mean": "rollouts", "eval/reward_mean": "evaluation"}, None),
    Plot("length", "tokens sampled per completion",
         {"rollout/length_mean": "rollouts", "eval/length_mean": "evaluation"}, None, from_zero=True),
    Plot("pass", "share of prompts",
         {"eval/greedy": "greedy"} | {f"eval/unbiased_pass@{k}": f"pass@{k}" for k in (1, 2, 4, 8, 16, 32)}, False),
    Plot("lr", "learning rate multiplier", {"train/lrm": "multiplier"}, from_zero=True),
    Plot("grad_norm", "gradient norm", {"train/grad_norm": "gradient norm"}, from_zero=True),
    Plot("throughput", "tokens per second", {"train/tok_per_sec": "tokens per second"}, from_zero=True),
    Plot("waits", "seconds per step",
         {"train/data_wait_s": "for data", "train/checkpoint_stall_s": "for a checkpoint",
          "rollout/wait_s": "for rollouts"}, from_zero=True),
)


def draw_plots(records: Sequence[Mapping[str, Any]], folder: Path, prefix: str = "") -> list[Path]:
    """Write `<prefix><name>.png` into `folder` for each plot that has numbers; returns their paths in order.

    Where two records give a number for the same step, the first one is drawn.
    """
    written = []
    for plot in PLOTS:
        series = {}
        for key, legend in plot.series.items():
            of_kind = [r for r in records if plot.of_train_steps in (None, is_train_step(r)) and _has(r, key)]
            points = {r["step"]: r[key] for r in reversed(of_kind)}
            if points:
                series[legend] = sorted(points.items())
        if series:
            path = folder / f"{prefix}{plot.name}.png"
            write_atomic(path, _png(plot, series))
            written.append(path)
    return written


def _has(record: Mapping[str, Any], key: str) -> bool:
    values = (record.get("step"), record.get(key))
    return all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)


def _png(plot: Plot, series: Mapping[str, Sequence[tuple[float, float]]]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (legend, points) in enumerate(series.items()):
        steps, values = zip(*points, strict=True)
        faint = number < len(series) - 1 and len(points) > 50  # a noisy one; the last series is the one to read
        marker = "o" if len(points) <= 50 else ""
        axes.plot(steps, values, label=legend, marker=marker, markersize=3, alpha=0.35 if faint else 1.0, linewidth=1.2)
    axes.set_xlabel("step")
    axes.set_ylabel(plot.y_label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    if plot.from_zero:
        top = max(value for points in series.values() for _, value in points)
        axes.set_ylim(0, 1.08 * top if top > 0 else 1)
    if len(series) > 1:
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()

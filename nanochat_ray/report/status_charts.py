"""Curves as inline SVG: no script, no font, nothing to fetch. Colours are the page's, by class."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from nanochat_ray.report.metrics_log import is_train_step
from nanochat_ray.report.plots import PLOTS, Plot
from nanochat_ray.report.training import numbers

WIDTH, HEIGHT = 480, 230
LEFT, RIGHT, TOP, BOTTOM = 56, 10, 10, 28
MAX_POINTS = 240  # of a line; more are averaged
DOTS_UP_TO = 40  # points that are also drawn as dots
TICKS = 4
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """One picture's data: lines by legend."""

    plot: Plot
    lines: Mapping[str, Points]


def charts_of(records: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """The charts that have data, in the report's order. The first of several numbers for a step counts."""
    found = []
    for plot in PLOTS:
        of_kind = [r for r in records if plot.of_train_steps in (None, is_train_step(r)) and numbers([r], "step")]
        lines: dict[str, Points] = {}
        for name, legend in plot.series.items():
            points = {r["step"]: float(r[name]) for r in reversed(of_kind) if numbers([r], name)}
            if points:
                lines[legend] = sorted(points.items())
        if lines:
            found.append(Chart(plot, lines))
    return found


def figure(chart: Chart) -> str:
    """The chart with its title, its newest values and a legend, as HTML."""
    alone = len(chart.lines) == 1
    newest = "".join(
        f'<span class="key c{number}">{"" if alone else escape(legend)} <b>{tick_text(points[-1][1])}</b></span>'
        for number, (legend, points) in enumerate(chart.lines.items())
    )
    return f"<figure><figcaption><h3>{escape(chart.plot.y_label)}</h3>{newest}</figcaption>{svg(chart)}</figure>"


def svg(chart: Chart) -> str:
    """The picture. Where one line is noisy, the last one is drawn above it."""
    shown = {legend: thinned(points) for legend, points in chart.lines.items()}
    every = [point for points in shown.values() for point in points]
    low, high = _bounds([value for _, value in every], chart.plot.from_zero)
    steps = [step for points in chart.lines.values() for step, _ in points]
    first, last = min(steps), max(steps)

    def place(step: float, value: float) -> tuple[float, float]:
        across = (step - first) / (last - first) if last > first else 0.5
        up = (value - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = []
    for value in ticks(low, high):
        y = place(first, value)[1]
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick_text(value)}</text>')
    for step in ticks(first, last, whole=True):
        x = place(step, low)[0]
        anchor = "end" if x > WIDTH - 30 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{tick_text(step)}</text>')
    for number, points in enumerate(shown.values()):
        faint = " faint" if number < len(shown) - 1 and len(points) > DOTS_UP_TO else ""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        parts.append(f'<polyline class="c{number}{faint}" points="{path}"/>')
        if len(points) <= DOTS_UP_TO:
            parts += [f'<circle class="c{number}" cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>'
                      for x, y in (place(*point) for point in points)]  # fmt: skip
    label = escape(f"{chart.plot.y_label} by step", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def thinned(points: Points) -> Points:
    """At most about MAX_POINTS points: means over equal numbers of neighbours, the first and the last as they are."""
    size = -(-len(points) // MAX_POINTS)
    if size <= 1:
        return points
    parts = [points[k : k + size] for k in range(1, len(points) - 1, size)]
    return [points[0], *((_mean(x for x, _ in part), _mean(y for _, y in part)) for part in parts), points[-1]]


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Round numbers from `low` to `high`, about TICKS of them."""
    if not high > low:
        return [low]
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    if whole:
        size = max(1.0, size)
    begin, end = math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9)
    return [number * size for number in range(begin, end + 1)]


def tick_text(value: float) -> str:
    """A short number: 0.125, 12.3k, 1e-05."""
    if value == 0:
        return "0"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:.4g}"


def _bounds(values: Sequence[float], from_zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if from_zero:
        low = min(low, 0.0)
    if not high > low:
        margin = abs(high) * 0.1 or 1.0
        return (low if from_zero else low - margin), high + margin
    margin = 0.05 * (high - low)
    return (low if from_zero else low - margin), high + margin


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed)

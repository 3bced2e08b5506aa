"""A run's status as one HTML page with curves, which needs nothing but itself. The run's own texts are escaped."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from nanochat_ray.report.status import WORDS, RunStatus, StageStatus, curves
from nanochat_ray.report.status_charts import charts_of, figure
from nanochat_ray.report.status_text import (
    checkpoint_words,
    disk_words,
    failure_words,
    holder_words,
    state_word,
    value_words,
)
from nanochat_ray.report.text import duration
from nanochat_ray.run_dir import RunDir, write_atomic

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #1b1f24; --dim: #626b76; --line: #dfe3e8;
  --good: #1a7f43; --bad: #b3261e; --busy: #1f5fbf; --warn: #8a5a00;
  --c0: #2a6fdb; --c1: #d9731a; --c2: #1f9d6b; --c3: #a04bc4; --c4: #c2405d; --c5: #6b7280; --c6: #0e8a9c; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --card: #1d2126; --text: #e4e7eb; --dim: #98a2ae;
  --line: #31373f; --good: #5dc98a; --bad: #ff8a80; --busy: #7fb0ff; --warn: #e3b454; --c0: #6ea8ff; --c1: #ffa65c;
  --c2: #55d3a0; --c3: #cd8cf0; --c4: #ff8097; --c5: #a3abb6; --c6: #4fc9db; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 28px 0 10px; }
h3 { font-size: .9rem; margin: 0; font-weight: 600; }
header { display: flex; flex-wrap: wrap; gap: 4px 14px; align-items: baseline; }
p { margin: 4px 0; overflow-wrap: anywhere; }
.dim { color: var(--dim); }
.state { padding: 1px 10px; border-radius: 99px; border: 1px solid currentColor; font-size: .85rem; font-weight: 600; }
.done, .state.done { color: var(--good); } .failed, .died { color: var(--bad); } .running { color: var(--busy); }
.stopped, .empty { color: var(--warn); }
.card, figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.now { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 1px; margin: 16px 0;
  overflow: hidden; background: var(--line); }
.now div { padding: 10px 14px; background: var(--card); }
.now b { display: block; font-size: 1.2rem; font-variant-numeric: tabular-nums; }
.bar { height: 8px; border-radius: 4px; background: var(--line); overflow: hidden; margin-top: 12px; }
.bar i { display: block; height: 100%; background: var(--busy); }
.error { border-left: 4px solid var(--bad); padding: 10px 14px; margin: 14px 0; }
.error pre { margin: 4px 0 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
.stages { list-style: none; margin: 0; padding: 0; }
.stages li { display: grid; grid-template-columns: 9.5rem 7rem 1fr; gap: 2px 12px; padding: 7px 14px;
  border-top: 1px solid var(--line); }
.stages li:first-child { border-top: 0; }
.stages .name { font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 12px; }
figure { margin: 0; padding: 10px 12px 6px; min-width: 0; }
figcaption { display: flex; flex-wrap: wrap; gap: 2px 12px; align-items: baseline; margin-bottom: 4px; }
figcaption h3 { margin-right: auto; }
.key { font-size: .8rem; color: var(--dim); } .key b { color: var(--text); font-variant-numeric: tabular-nums; }
.key::before { content: ""; display: inline-block; width: 10px; height: 3px; border-radius: 2px; margin: 0 5px 3px 0;
  background: currentColor; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--dim); font-size: 13px; font-family: inherit; }
svg .grid { stroke: var(--line); stroke-width: 1; fill: none; }
svg polyline { fill: none; stroke: currentColor; stroke-width: 1.6; stroke-linejoin: round; }
svg circle { fill: currentColor; stroke: none; } svg .faint { opacity: .4; }
.key.c0::before, svg .c0 { color: var(--c0); } .key.c1::before, svg .c1 { color: var(--c1); }
.key.c2::before, svg .c2 { color: var(--c2); } .key.c3::before, svg .c3 { color: var(--c3); }
.key.c4::before, svg .c4 { color: var(--c4); } .key.c5::before, svg .c5 { color: var(--c5); }
.key.c6::before, svg .c6 { color: var(--c6); }
@media (max-width: 640px) { main { padding: 14px 10px 32px; } .stages li { grid-template-columns: 1fr auto; }
  .stages .what { grid-column: 1 / -1; } .now { grid-template-columns: 1fr 1fr; } }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_page(path: Path, status: RunStatus, run: RunDir, reload_s: float | None) -> None:
    """Write the page, whole or not at all. With `reload_s` it loads itself again.

    A link stays one. OSError that names the page; ValueError for a device, a pipe or a folder, which stay as they are.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is there and is no ordinary file, so no page is written to it; name another one")
    try:
        write_atomic(Path(os.path.realpath(path)), page(status, run, reload_s))
    except OSError as error:
        raise OSError(error.errno, f"cannot write the page {path}: {error.strerror}") from error


def page(status: RunStatus, run: RunDir, reload_s: float | None = None) -> str:
    """The page's HTML. Stages with curves stand newest first."""
    again = f'<meta http-equiv="refresh" content="{max(1, round(reload_s))}">' if reload_s else ""
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status.at_s))
    seen = f"as of {at}" + (f", looked at every {reload_s:g} s" if reload_s else "")
    body = [
        f'<header><h1>{escape(status.run)}</h1><span class="state {status.state}">{status.state}</span>'
        f'<span class="dim">{escape(WORDS[status.state])}</span></header>',
        f'<p class="dim">{escape(status.folder)}</p>',
        _now(status), _failure(status), _problems(status.problems),
        '<h2>Stages</h2><ul class="card stages">', *(_stage_line(stage, status) for stage in status.stages), "</ul>",
        *(_curves(run, stage.name) for stage in reversed(status.stages)),
        f'<p class="dim">{escape(seen)}</p>',
    ]  # fmt: skip
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">{again}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(status.run)}: {status.state}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _now(status: RunStatus) -> str:
    """What is under way, in large numbers."""
    cells, bar = [], ""
    stage = status.current
    if stage is not None:
        cells.append(("stage", stage.name))
        if stage.step is not None:
            cells.append(("step", f"{stage.step:,}" + (f" / {stage.steps:,}" if stage.steps else "")))
        if stage.eta_s is not None:
            cells.append(("to go", duration(stage.eta_s)))
        saved = stage.checkpoint
        if saved is None:
            cells.append(("last checkpoint", "none yet"))
        else:
            cells.append((f"checkpoint, {duration(saved.age_s)} old", f"{saved.step:,}"))
        if stage.done_frac is not None:
            bar = f'<div class="bar"><i style="width:{100 * stage.done_frac:.1f}%"></i></div>'
    else:
        n_done = sum(one.state == "done" for one in status.stages)
        cells.append(("stages done", f"{n_done} of {len(status.stages)}"))
    cells.append(("restarts", str(status.restarts)))
    cells.append(("disk", disk_words(status).partition(" here")[0]))
    shown = "".join(f'<div><span class="dim">{escape(name)}</span><b>{escape(text)}</b></div>' for name, text in cells)
    holder = f'<p class="dim">{escape(holder_words(status.holder))}</p>' if status.holder is not None else ""
    return f'{bar}<div class="card now">{shown}</div>{holder}'


def _failure(status: RunStatus) -> str:
    if status.last_failure is None:
        return ""
    head, _, _ = failure_words(status.last_failure, status.at_s).partition(": ")
    text = escape(status.last_failure.error)
    return f'<div class="card error"><b>Last error</b> <span class="dim">{escape(head)}</span><pre>{text}</pre></div>'


def _problems(problems: Sequence[str]) -> str:
    lines = "".join(f"<pre>{escape(problem)}</pre>" for problem in problems)
    return f'<div class="card error"><b>Cannot be read</b>{lines}</div>' if problems else ""


def _stage_line(stage: StageStatus, status: RunStatus) -> str:
    word = state_word(stage, status)
    what = value_words(stage)
    if stage.step is not None:
        what.insert(0, f"{stage.step:,} steps")
    if stage.seconds is not None:
        what.append(f"took {duration(stage.seconds)}" if stage.state == "done" else f"{duration(stage.seconds)} before")
    if stage.checkpoint is not None and stage.state != "done":
        what.append(checkpoint_words(stage))
    if stage.restarts:
        what.append(f"restarts {stage.restarts}")
    dim = " dim" if stage.state == "waiting" else ""
    return (
        f'<li><span class="name{dim}">{escape(stage.name)}</span><span class="{word.split()[0]}{dim}">{word}</span>'
        f'<span class="what dim">{escape(" · ".join(what))}</span></li>'
    )


def _curves(run: RunDir, stage: str) -> str:
    charts = charts_of(curves(run, stage))
    if not charts:
        return ""
    return f'<h2>{escape(stage)}</h2><div class="charts">{"".join(map(figure, charts))}</div>'

"""report.md of a run: a pure function of the stages' records, their metrics.jsonl and the driver's environment.

What a stage's metrics are called decides where they appear in the summary: `val/bpb`, `core_metric`,
`chatcore/<task>`, `chatcore_metric`, `chatcore_cat`, `heldout/overall` and `heldout/<family>` (shares of 1), and
`source` of a chat evaluation; `core_metric_name` and `chatcore_metric_name` say what such a mean covers; what is called
`before/<name>` and `after/<name>` is of the models before and after RL. Every other metric stands in its stage's
section. A stage that is not known is shown after the known ones, never dropped.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_ray.report.environment import Environment, cost, describe_environment
from nanochat_ray.report.metrics_log import WATCH_FILE, read_lines, read_watch, without_undone
from nanochat_ray.report.plots import draw_plots
from nanochat_ray.report.records import StageRecord, read_result
from nanochat_ray.report.rl import AFTER, BEFORE, of_before_and_after, rl_parts
from nanochat_ray.report.text import (
    ABSENT,
    duration,
    fenced,
    folded,
    markdown_table,
    money,
    one_line,
    value_text,
    yaml_text,
)
from nanochat_ray.report.training import TrainingSummary, summarise
from nanochat_ray.run_dir import CONFIG_FILE, DONE_FILE, METRICS_FILE, RESULT_FILE, STAGES, write_atomic

REPORT_STAGE = "report"
REPORT_FILE = "report.md"
BASE, SFT, RL = "BASE", "SFT", "RL"
COLUMN_OF_STAGE = {"pretrain": BASE, "base_eval": BASE, "sft": SFT, "rl": RL}
COLUMN_OF_TIME = {BEFORE: SFT, AFTER: RL}
RL_LABELS = {"greedy": "pass@1, greedy", "unbiased_pass@1": "pass@1, sampled", "reward_mean": "mean reward"}


@dataclass(frozen=True)
class Stage:
    """One stage's folder as found."""

    name: str
    done: bool
    record: StageRecord | None
    problem: str | None  # why there is no record
    plots: Sequence[Path]
    training: TrainingSummary | None = None
    watched: Sequence[Mapping[str, Any]] = ()  # evaluations of its checkpoints by a job of their own
    rollouts: Sequence[str] = ()  # what only a stage with rollouts has to say


def write_report(
    run_folder: Path,
    environment: Environment | None = None,
    price_per_hour: float | None = None,
    made_at: str | None = None,
) -> Path:
    """Write `<run>/report/report.md` and its plots over those of before; returns its path.

    `environment` is this machine's if not given; `price_per_hour` is of the whole machine, in dollars. Raises
    FileNotFoundError if the folder holds no stage.
    """
    out = run_folder / REPORT_STAGE
    stages = [_read_stage(folder, out) for folder in _stage_folders(run_folder)]
    if not stages:
        raise FileNotFoundError(f"{run_folder} holds no stage of a run; train one first (python jobs/speedrun.py)")
    stages.sort(key=_order)
    parts = [
        f"# nanochat-ray: {one_line(run_folder.name)}",
        f"Made {made_at or time.strftime('%Y-%m-%d %H:%M:%S %z')} from the records in `{run_folder}`.",
        _summary([stage.record for stage in stages if stage.record]),
        _times(stages, price_per_hour),
        _training(stages),
        _skipped(stages),
        _environment(environment or describe_environment()),
        *[_section(stage) for stage in stages],
    ]
    path = out / REPORT_FILE
    write_atomic(path, "\n\n".join(part for part in parts if part) + "\n")
    return path


def _stage_folders(run_folder: Path) -> list[Path]:
    marks = (RESULT_FILE, METRICS_FILE, CONFIG_FILE, DONE_FILE)
    folders = [path for path in run_folder.iterdir() if path.is_dir()] if run_folder.is_dir() else []
    return [path for path in folders if path.name != REPORT_STAGE and any((path / mark).exists() for mark in marks)]


def _read_stage(folder: Path, out: Path) -> Stage:
    record, problem = None, None
    try:
        record = read_result(folder)
    except FileNotFoundError:
        problem = "No record yet: the stage has not come to its end."
    except ValueError as error:
        problem = f"The record cannot be read: {error}"
    written = read_lines(folder / METRICS_FILE)
    watched = read_watch(folder / WATCH_FILE)
    plots = draw_plots([*without_undone(written), *watched], out, prefix=f"{folder.name}_")
    done = (folder / DONE_FILE).exists()
    rollouts = rl_parts(folder, record, written)
    return Stage(folder.name, done, record, problem, plots, summarise(written), watched, rollouts)


def _order(stage: Stage) -> tuple[int, str, str]:
    """Known stages in their order, `<stage>_<more>` right after <stage>, the others at the end in order of time."""
    place = len(STAGES)
    for index, name in enumerate(STAGES):
        if stage.name == name or (stage.name.startswith(f"{name}_") and place == len(STAGES)):
            place = index
    started_at = stage.record.started_at if stage.record and place == len(STAGES) else ""
    return place, started_at, stage.name


# --- parts -------------------------------------------------------------------------------------------------------


def _summary(records: Sequence[StageRecord]) -> str:
    """The table of results, one column per model; a later stage's number replaces an earlier one's.

    Tasks that the chat evaluation left out have their row too.
    """
    rows: dict[str, dict[str, str]] = {"val bpb, text": {}}
    for record in records:
        for name, value in record.metrics.items():
            label, column = _summary_place(record, name)
            if label and column:
                rows.setdefault(label, {})[column] = value_text(name, value)
        if record.stage.startswith("chat_eval"):
            for item in record.skipped:
                rows.setdefault(item.name, {})
    if not any(label.startswith("CORE") for label in rows):
        rows["CORE"] = {}
    columns = [BASE, SFT] + ([RL] if any(_column(record) == RL for record in records) else [])
    order = sorted(rows, key=_summary_order)
    body = [[label, *[rows[label].get(column, ABSENT) for column in columns]] for label in order]
    note = "Bits per byte of text and of answers are taken over different bytes and cannot be compared."
    if any(label in rows for label in RL_LABELS.values()):
        note += (
            " pass@1 and the reward are of prompts that RL evaluates on and never trains on; sampled, as for the mean "
            "reward: all samples at temperature 1."
        )
    return f"## Summary\n\n{markdown_table(['', *columns], body)}\n\n{note}"


def _column(record: StageRecord) -> str | None:
    if record.stage.startswith("chat_eval"):
        source = record.metrics.get("source") or record.stage.removeprefix("chat_eval").strip("_") or "sft"
        return str(source).upper()
    return COLUMN_OF_STAGE.get(record.stage)


def _summary_place(record: StageRecord, name: str) -> tuple[str | None, str | None]:
    """Row and column of a metric, None where it has none."""
    when, _, rest = name.partition("/")
    if when in COLUMN_OF_TIME:
        return RL_LABELS.get(rest), COLUMN_OF_TIME[when]
    column = _column(record)
    label = record.metrics.get(f"{name}_name") or _summary_label(name, column)
    return str(label or ""), column


def _summary_label(name: str, column: str | None) -> str | None:
    if name == "val/bpb":
        return "val bpb, text" if column == BASE else "val bpb, answers"
    if name in ("core_metric", "chatcore_metric", "chatcore_cat"):
        return {"core_metric": "CORE", "chatcore_metric": "ChatCORE", "chatcore_cat": "ChatCORE, categorical"}[name]
    if name == "heldout/overall":
        return "held-out questions"
    if name.startswith("heldout/"):
        return f"held-out: {name.removeprefix('heldout/')}"
    return name.removeprefix("chatcore/") if name.startswith("chatcore/") else None


def _summary_order(label: str) -> int:
    """bpb, CORE, tasks as they came, ChatCORE, RL's task, held-out questions with the families after all of them."""
    order = ("val bpb", "CORE", None, "ChatCORE", "pass@1", "mean reward", "held-out questions", "held-out:")
    for place, starts in enumerate(order):
        if starts and label.startswith(starts):
            return place
    return order.index(None)


def _times(stages: Sequence[Stage], price_per_hour: float | None) -> str:
    columns = ["stage", "state", "started", "wall clock", "peak memory"]
    records = [(stage, stage.record) for stage in stages]
    body = [
        [
            stage.name,
            "done" if stage.done else "unfinished",
            record.started_at[:19].replace("T", " ") if record else ABSENT,
            duration(record.seconds) if record else ABSENT,
            value_text("peak_memory_bytes", record.metrics.get("peak_memory_bytes")) if record else ABSENT,
        ]
        for stage, record in records
    ]
    seconds = [record.seconds for _, record in records if record]
    body.append(["**total**", "", "", f"**{duration(sum(seconds))}**", ""])
    if price_per_hour is not None:
        columns.append("cost")
        for row, (_, record) in zip(body, records, strict=False):
            row.append(money(cost(price_per_hour, record.seconds)) if record else ABSENT)
        body[-1].append(f"**{money(cost(price_per_hour, sum(seconds)))}**")
    note = "" if price_per_hour is None else f"\n\nCost at {money(price_per_hour)} per hour, as given for this report."
    return f"## Time\n\n{markdown_table(columns, body)}{note}"


def _training(stages: Sequence[Stage]) -> str:
    """How the training stages went, one column each."""
    trained = {stage.name: stage.training for stage in stages if stage.training}
    rows: list[list[str]] = []
    for label, field, form in (
        ("steps", "steps", "{:,}"), ("tokens per second", "tok_per_sec", "{:,.0f}"), ("MFU", "mfu", "{:.2f} %"),
        ("waiting for data", "data_wait_frac", "{:.2%}"),
        ("waiting for checkpoints", "checkpoint_stall_frac", "{:.2%}"),
        ("gradient norm, median", "grad_norm", "{:.4f}"), ("gradient norm, largest", "grad_norm_max", "{:.4f}"),
        ("tokens read but not trained on", "waste_frac", "{:.2%}"), ("starts", "starts", "{:,}"),
        ("steps done again after a restart", "steps_again", "{:,}"),
    ):  # fmt: skip
        values = [getattr(training, field) for training in trained.values()]
        if any(value is not None for value in values):
            rows.append([label, *[ABSENT if value is None else form.format(value) for value in values]])
    if not trained:
        return ""
    note = "Rates are medians, waits are shares of the steps' time, both without the first steps of each start."
    return f"## Training\n\n{markdown_table(['', *trained], rows)}\n\n{note}"


def _skipped(stages: Sequence[Stage]) -> str:
    lines = [
        f"- {one_line(stage.name)}: **{one_line(item.name)}**: {one_line(item.reason)}"
        for stage in stages
        if stage.record
        for item in stage.record.skipped
    ]
    return "## Left out\n\n" + "\n".join(lines) if lines else ""


def _environment(env: Environment) -> str:
    changed = {True: ", with uncommitted changes", False: "", None: ""}[env.git_dirty]
    gpus = ", ".join(f"{count}x {name}" for name, count in env.gpus.items())
    physical = ABSENT if env.cpus_physical is None else env.cpus_physical
    rows = [
        ["code", f"commit {env.git_commit}, branch {env.git_branch}{changed}"],
        ["platform", env.platform],
        ["CPU", f"{env.cpu}, {physical} physical, {env.cpus_logical} logical"],
        ["memory", value_text("ram_bytes", env.ram_bytes)],
        ["GPU", f"{gpus}, {value_text('vram_bytes', env.vram_bytes)} together, CUDA {env.cuda}" if gpus else "none"],
        ["software", f"Python {env.python}, PyTorch {env.torch}, Ray {env.ray}"],
    ]
    return f"## Machine\n\n{markdown_table(['', 'of the driver'], rows, numbers=False)}"


def _section(stage: Stage) -> str:
    parts = [f"## {one_line(stage.name)}"]
    if stage.problem:
        parts.append(one_line(stage.problem))
    elif not stage.done:
        parts.append("Not finished; the numbers are those of its last stop.")
    record = stage.record
    values = [[name, value_text(name, value)] for name, value in record.metrics.items()
              if not of_before_and_after(name)] if record else []
    if values:
        parts.append(markdown_table(["", "value"], values, numbers=False))
    if stage.plots:
        pictures = [f'<img src="{path.name}" alt="{path.stem}" width="49%">' for path in stage.plots]
        parts.append("\n".join(pictures))
    parts += stage.rollouts
    if stage.watched:
        parts.append(f"### Checkpoints, evaluated beside the training\n\n{_watched(stage.watched)}")
    if record:
        for title, table in record.tables.items():
            names = table.columns
            rows = [[value_text(name, value) for name, value in zip(names, row, strict=False)] for row in table.rows]
            parts.append(f"### {one_line(title)}\n\n{markdown_table(names, rows)}")
        if record.samples:
            shown = "\n\n".join(f"> {item.prompt or '(no prompt)'}\n{item.text.strip()}" for item in record.samples)
            parts.append(f"### Samples\n\n{fenced(shown, 'text')}")
        if record.config:
            parts.append(folded("Settings", fenced(yaml_text(record.config), "yaml")))
        if record.hashes:
            hashes = markdown_table(["", "hash"], list(record.hashes.items()), numbers=False)
            parts.append(folded("Hashes of the inputs", hashes))
    return "\n\n".join(parts)


def _watched(records: Sequence[Mapping[str, Any]]) -> str:
    names = [name for name in ("train/bpb", "val/bpb", "core_metric") if any(name in record for record in records)]
    core = next((record["core_metric_name"] for record in records if "core_metric_name" in record), "CORE")
    columns = ["step", *[core if name == "core_metric" else name for name in names]]
    body = [[record["step"], *[value_text(name, record.get(name)) for name in names]] for record in records]
    return markdown_table(columns, body)

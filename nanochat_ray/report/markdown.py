"""report.md of a run: a pure function of the stages' records, their metrics.jsonl and the driver's environment.

What a stage's metrics are called decides where they appear in the summary: `val/bpb`, `core_metric`,
`chatcore/<task>`, `chatcore_metric`, `chatcore_cat`, `heldout/overall` and `heldout/<family>` (shares of 1), and
`source` of a chat evaluation; `core_metric_name` and `chatcore_metric_name` say what such a mean covers. Every other
metric stands in its stage's section. A stage that is not known is shown after the known ones, never dropped.
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
from nanochat_ray.report.records import Scalar, StageRecord, read_result
from nanochat_ray.report.training import TrainingSummary, summarise
from nanochat_ray.run_dir import CONFIG_FILE, DONE_FILE, METRICS_FILE, RESULT_FILE, STAGES, write_atomic

REPORT_STAGE = "report"
REPORT_FILE = "report.md"
BASE, SFT, RL = "BASE", "SFT", "RL"
COLUMN_OF_STAGE = {"pretrain": BASE, "base_eval": BASE, "sft": SFT, "rl": RL}
SHARE_PREFIXES = ("chatcore/", "heldout/")
ABSENT = "-"


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
        f"# nanochat-ray: {_text(run_folder.name)}",
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
    return Stage(folder.name, done, record, problem, plots, summarise(written), watched)


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
        column = _column(record)
        for name, value in record.metrics.items():
            label = str(record.metrics.get(f"{name}_name") or _summary_label(name, column) or "")
            if label and column:
                rows.setdefault(label, {})[column] = _value(name, value)
        if record.stage.startswith("chat_eval"):
            for item in record.skipped:
                rows.setdefault(item.name, {})
    if not any(label.startswith("CORE") for label in rows):
        rows["CORE"] = {}
    columns = [BASE, SFT] + ([RL] if any(_column(record) == RL for record in records) else [])
    order = sorted(rows, key=_summary_order)
    body = [[label, *[rows[label].get(column, ABSENT) for column in columns]] for label in order]
    note = "Bits per byte of text and of answers are taken over different bytes and cannot be compared."
    return f"## Summary\n\n{_table(['', *columns], body)}\n\n{note}"


def _column(record: StageRecord) -> str | None:
    if record.stage.startswith("chat_eval"):
        source = record.metrics.get("source") or record.stage.removeprefix("chat_eval").strip("_") or "sft"
        return str(source).upper()
    return COLUMN_OF_STAGE.get(record.stage)


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
    """bpb, CORE, tasks as they came, ChatCORE, held-out questions with the families after all of them."""
    for place, starts in enumerate(("val bpb", "CORE", None, "ChatCORE", "held-out questions", "held-out:")):
        if starts and label.startswith(starts):
            return place
    return 2


def _times(stages: Sequence[Stage], price_per_hour: float | None) -> str:
    columns = ["stage", "state", "started", "wall clock", "peak memory"]
    records = [(stage, stage.record) for stage in stages]
    body = [
        [
            stage.name,
            "done" if stage.done else "unfinished",
            record.started_at[:19].replace("T", " ") if record else ABSENT,
            _duration(record.seconds) if record else ABSENT,
            _value("peak_memory_bytes", record.metrics.get("peak_memory_bytes")) if record else ABSENT,
        ]
        for stage, record in records
    ]
    seconds = [record.seconds for _, record in records if record]
    body.append(["**total**", "", "", f"**{_duration(sum(seconds))}**", ""])
    if price_per_hour is not None:
        columns.append("cost")
        for row, (_, record) in zip(body, records, strict=False):
            row.append(_money(cost(price_per_hour, record.seconds)) if record else ABSENT)
        body[-1].append(f"**{_money(cost(price_per_hour, sum(seconds)))}**")
    note = "" if price_per_hour is None else f"\n\nCost at {_money(price_per_hour)} per hour, as given for this report."
    return f"## Time\n\n{_table(columns, body)}{note}"


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
    return f"## Training\n\n{_table(['', *trained], rows)}\n\n{note}"


def _skipped(stages: Sequence[Stage]) -> str:
    lines = [
        f"- {_text(stage.name)}: **{_text(item.name)}**: {_text(item.reason)}"
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
        ["memory", _value("ram_bytes", env.ram_bytes)],
        ["GPU", f"{gpus}, {_value('vram_bytes', env.vram_bytes)} together, CUDA {env.cuda}" if gpus else "none"],
        ["software", f"Python {env.python}, PyTorch {env.torch}, Ray {env.ray}"],
    ]
    return f"## Machine\n\n{_table(['', 'of the driver'], rows, numbers=False)}"


def _section(stage: Stage) -> str:
    parts = [f"## {_text(stage.name)}"]
    if stage.problem:
        parts.append(_text(stage.problem))
    elif not stage.done:
        parts.append("Not finished; the numbers are those of its last stop.")
    record = stage.record
    if record and record.metrics:
        values = [[name, _value(name, value)] for name, value in record.metrics.items()]
        parts.append(_table(["", "value"], values, numbers=False))
    if stage.plots:
        pictures = [f'<img src="{path.name}" alt="{path.stem}" width="49%">' for path in stage.plots]
        parts.append("\n".join(pictures))
    if stage.watched:
        parts.append(f"### Checkpoints, evaluated beside the training\n\n{_watched(stage.watched)}")
    if record:
        for title, table in record.tables.items():
            rows = [[_value(name, cell) for name, cell in zip(table.columns, row, strict=False)] for row in table.rows]
            parts.append(f"### {_text(title)}\n\n{_table(table.columns, rows)}")
        if record.samples:
            shown = "\n\n".join(f"> {item.prompt or '(no prompt)'}\n{item.text.strip()}" for item in record.samples)
            parts.append(f"### Samples\n\n{_fenced(shown, 'text')}")
        if record.config:
            parts.append(_folded("Settings", _fenced(_yaml(record.config), "yaml")))
        if record.hashes:
            hashes = _table(["", "hash"], list(record.hashes.items()), numbers=False)
            parts.append(_folded("Hashes of the inputs", hashes))
    return "\n\n".join(parts)


def _watched(records: Sequence[Mapping[str, Any]]) -> str:
    names = [name for name in ("train/bpb", "val/bpb", "core_metric") if any(name in record for record in records)]
    core = next((record["core_metric_name"] for record in records if "core_metric_name" in record), "CORE")
    columns = ["step", *[core if name == "core_metric" else name for name in names]]
    body = [[record["step"], *[_value(name, record.get(name)) for name in names]] for record in records]
    return _table(columns, body)


# --- text --------------------------------------------------------------------------------------------------------


def _value(name: str, value: Scalar) -> str:
    """A number as its name's unit asks."""
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value)
    if name.startswith(SHARE_PREFIXES):
        return f"{100 * value:.1f} %"
    if name.endswith("_bytes"):
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
    if name.endswith(("_s", "seconds", "_time")):
        return _duration(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**15 else f"{value:.3e}"
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:.4f}"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e12 else f"{value:.3e}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _money(amount: float | None) -> str:
    return ABSENT if amount is None else f"${amount:,.2f}"


def _text(text: str) -> str:
    """One line in which no character opens a table cell or an HTML tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]], numbers: bool = True) -> str:
    """A Markdown table; `numbers` sets all columns but the first flush right."""
    lines = [list(map(str, columns)), *[list(map(str, row)) for row in rows]]
    cells = [[_text(cell) for cell in line] for line in lines]
    rule = ["---", *["---:" if numbers else "---"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [cells[0], rule, *cells[1:]])


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{content}\n\n</details>"


def _yaml(value: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True)

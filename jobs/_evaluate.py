"""What the evaluating jobs share: the model, running units on Ray or in this process, the scores of a base model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from _runtime import Job, Notes, available_cpus

from nanochat_ray import sandbox
from nanochat_ray.config import BaseEvalSettings, RunSettings
from nanochat_ray.evals.hf import HFSpec, run_units_here
from nanochat_ray.metrics.bits_per_byte import bits_per_byte
from nanochat_ray.metrics.core import CoreRecord, core_metric, merge
from nanochat_ray.metrics.core_bundle import find_bundle, load_bundle, load_items
from nanochat_ray.model.checkpoint import Checkpoint, resolve_checkpoint
from nanochat_ray.report.records import Sample, Table
from nanochat_ray.run_dir import STAGE_OF_SOURCE, storage_path, write_atomic
from nanochat_ray.sandbox import ProgramResult, SandboxFailed
from nanochat_ray.stages.evaluation import (
    BpbUnit,
    CoreUnit,
    EvalSpec,
    Nats,
    Record,
    SampleUnit,
    Unit,
    cut,
)
from nanochat_ray.stages.pretrain import bpb_convention
from nanochat_ray.tasks.rows import TaskDataMissing

logger = logging.getLogger("nanochat_ray")

ROWS_PER_UNIT = 64
ITEMS_PER_UNIT = 40


class Runner(Protocol):
    """A job, as far as running units needs one."""

    settings: RunSettings

    @property
    def device(self) -> str: ...

    def use_ray(self) -> bool: ...


def checkpoint_of(job: Job, source: str, step: int | None) -> Checkpoint:
    """The checkpoint of base, sft or rl in this run."""
    stage = STAGE_OF_SOURCE[source]
    job.run_dir.require_stage(stage, f"{stage}.py")
    return resolve_checkpoint(job.run_dir.checkpoints(stage), step)


def run_units(job: Runner, spec: EvalSpec | HFSpec, units: Sequence[Unit]) -> list[list[Record]]:
    """Evaluate the units where the job's settings say. The records are the same for any number of actors."""
    if not units:
        return []
    if not job.use_ray():
        return run_units_here(spec, units)
    from nanochat_ray.evals.pool import run_units as on_actors

    if job.settings.eval_workers is not None:
        actors = job.settings.eval_workers
    elif job.device.startswith("cuda"):
        actors = job.settings.worker_range[0]
    else:
        actors = available_cpus()
    threads = max(1, available_cpus() // actors)
    return on_actors(spec, units, actors, threads)


# --- the pretrained model --------------------------------------------------------------------------------------------


def check_sandbox(job: Runner) -> None:
    """Raise SandboxUnavailable unless programs that the model writes can be run, somewhere without a GPU."""
    if job.use_ray():
        from nanochat_ray.evals import sandbox_pool

        if not job.settings.unsafe_sandbox:
            sandbox_pool.require_isolation()
    elif job.device.startswith("cuda"):
        raise sandbox.SandboxUnavailable("with --no-ray this process holds the GPU, so it runs no model's programs")
    elif not job.settings.unsafe_sandbox:
        sandbox.require_isolation()


def run_programs(job: Runner, codes: Sequence[str]) -> list[ProgramResult | SandboxFailed]:
    """Run programs that the model wrote, each within the limits of the sandbox, where `check_sandbox` has looked."""
    if not job.use_ray():
        return sandbox.run_programs(codes, unsafe=job.settings.unsafe_sandbox)
    from nanochat_ray.evals import sandbox_pool

    return sandbox_pool.run_programs(codes, job.settings.eval_workers or available_cpus(), job.settings.unsafe_sandbox)


def core_bundle(run: RunSettings, settings: BaseEvalSettings) -> tuple[Path | None, str]:
    """The CORE bundle's folder if CORE is asked for, else None with the reason, which is empty if it is not."""
    if "core" not in settings.eval.split(","):
        return None, ""
    try:
        return find_bundle(Path(run.eval_bundle).expanduser().absolute() if run.eval_bundle else None,
                           storage_path(run.storage)), ""
    except TaskDataMissing as error:
        return None, str(error)


def base_units(settings: BaseEvalSettings, sequence_len: int, bundle: Path | None) -> list[Unit]:
    """All that an evaluation of a pretrained model consists of."""
    parts = settings.eval.split(",")
    units: list[Unit] = []
    if "bpb" in parts:
        n_rows = max(1, settings.split_tokens // sequence_len)
        units += [BpbUnit(split, n_rows, *span) for split in ("train", "val") for span in spans(n_rows)]
    if bundle:
        units += [
            CoreUnit(task.label, indices, settings.max_per_task)
            for task in load_bundle(bundle).tasks
            for indices in cut(range(len(load_items(task)[: settings.max_per_task])), ITEMS_PER_UNIT)
        ]
    if "sample" in parts:
        units.append(SampleUnit())
    return units


def spans(n_rows: int) -> list[tuple[int, int]]:
    """The rows of a split in units."""
    return [(start, min(start + ROWS_PER_UNIT, n_rows)) for start in range(0, n_rows, ROWS_PER_UNIT)]


def note_scores(
    notes: Notes, units: Sequence[Unit], found: Sequence[Sequence[Record]], sequence_len: int, bundle: Path | None
) -> None:
    """The metrics, tables and samples of the records that the units gave."""
    pairs: list[tuple[Unit, Any]] = [
        (unit, record) for unit, part in zip(units, found, strict=True) for record in part
    ]
    for split in ("train", "val"):
        note_bpb(notes, split, [r for unit, r in pairs if isinstance(unit, BpbUnit) and unit.split == split],
                 sequence_len)
    if bundle:
        note_core(notes, bundle, [r for unit, r in pairs if isinstance(unit, CoreUnit)])
    notes.samples += [Sample(**r) for unit, r in pairs if isinstance(unit, SampleUnit)]


def note_bpb(notes: Notes, split: str, sums: list[Nats], sequence_len: int) -> None:
    """Bits per byte of a split, with what the number depends on."""
    if not sums:
        return
    bpb = bits_per_byte(sum(part.nats for part in sums), sum(part.bytes for part in sums))
    n_rows = sum(part.rows for part in sums)
    logger.info("%s bpb %.4f over %d rows of %d tokens", split, bpb, n_rows, sequence_len)
    notes.metrics |= {f"{split}/bpb": bpb, f"{split}/convention": bpb_convention(n_rows, sequence_len, sums[0].dtype)}
    if split == "train":
        notes.metrics["train/note"] = "the first training documents; tokenizer and model have seen them"


def note_core(notes: Notes, folder: Path, records: list[CoreRecord]) -> None:
    """The CORE metric and its table."""
    bundle = load_bundle(folder)
    for label, reason in bundle.skipped.items():
        notes.skip(f"CORE task {label}", reason)
    results = [merge(task, [record for record in records if record.task == task.label]) for task in bundle.tasks]
    score = core_metric(results)
    logger.info("%s %.4f", score.name, score.value)
    notes.metrics |= {"core_metric": score.value, "core_metric_name": score.name}
    notes.hashes["eval_bundle"] = bundle.sha256
    notes.tables[score.name] = Table(
        ["task", "items", "accuracy", "centred", "baseline"],
        [[r.task, r.n_items, r.accuracy, r.centred, r.baseline_frac] for r in results],
    )


def write_core_csv(folder: Path, notes: Notes) -> None:
    """nanochat's CSV of the CORE tasks."""
    name, value = notes.metrics["core_metric_name"], notes.metrics["core_metric"]
    table: Table = notes.tables[name]
    lines = [f"{'Task':<35}, {'Accuracy':<10}, {'Centered':<10}"]
    lines += [f"{task:<35}, {accuracy:<10.6f}, {centred:<10.6f}" for task, _, accuracy, centred, _ in table.rows]
    lines += [f"{name:<35}, {'':<10}, {value:<10.6f}"]
    write_atomic(folder / "core.csv", "\n".join(lines) + "\n")

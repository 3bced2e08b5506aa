"""Evaluate the pretrained model: bits per byte on train and val, CORE, samples (stage `base_eval`)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from _runtime import Job, Notes, main, open_job

from nanochat_ray.config import BaseEvalSettings, RunSettings
from nanochat_ray.corpus.reader import DataManifest
from nanochat_ray.flags import Section, read_flags
from nanochat_ray.run_dir import existing_run, storage_path, write_atomic

if TYPE_CHECKING:
    from nanochat_ray.metrics.core import CoreRecord
    from nanochat_ray.stages.evaluation import Nats, Unit

logger = logging.getLogger("nanochat_ray")

ROWS_PER_UNIT = 64
ITEMS_PER_UNIT = 40


def run(job: Job, settings: BaseEvalSettings, manifest: DataManifest) -> None:
    from _evaluate import checkpoint_of, run_units

    from nanochat_ray.metrics.core_bundle import find_bundle, load_bundle
    from nanochat_ray.report.records import Sample
    from nanochat_ray.stages.evaluation import BpbUnit, CoreUnit, EvalSpec, SampleUnit
    from nanochat_ray.tasks.rows import TaskDataMissing

    checkpoint = checkpoint_of(job, "base", settings.step)
    parts = settings.eval.split(",")
    bundle, no_bundle = None, ""
    if "core" in parts:
        try:
            named = job.settings.eval_bundle
            folder = Path(named).expanduser().absolute() if named else None
            bundle = find_bundle(folder, storage_path(job.settings.storage))
        except TaskDataMissing as error:
            no_bundle = str(error)
    config = {
        "settings": settings.identity(),
        "model": checkpoint.model_hash,
        "data": manifest.hash,
        "bundle": load_bundle(bundle).sha256 if bundle and job.settings.eval_bundle else None,
    }
    with job.stage("base_eval", config) as notes:
        if notes is None:
            return
        spec = EvalSpec(
            job.run_dir.checkpoints("pretrain"), checkpoint.step, job.run_dir.stage("tokenizer"), job.device,
            job.settings.dtype, job.task_sources(), bundle, manifest, device_batch_size=settings.device_batch_size,
        )
        units: list[Unit] = []
        if "bpb" in parts:
            n_rows = max(1, settings.split_tokens // checkpoint.model_config.sequence_len)
            units += [BpbUnit(split, n_rows, *span) for split in ("train", "val") for span in spans(n_rows)]
        if bundle:
            units += core_units(bundle, settings.max_per_task)
        elif no_bundle:
            notes.skip("CORE", no_bundle)
        if "sample" in parts:
            units.append(SampleUnit())
        found = list(zip(units, run_units(job, spec, units), strict=True))
        notes.metrics |= {"step": checkpoint.step}
        for split in ("train", "val") if "bpb" in parts else ():
            sums = [r for unit, part in found for r in part if isinstance(unit, BpbUnit) and unit.split == split]
            note_bpb(split, sums, checkpoint.model_config.sequence_len, notes)
        if bundle:
            note_core(job, bundle, [r for unit, part in found if isinstance(unit, CoreUnit) for r in part], notes)
        notes.samples += [Sample(**r) for unit, part in found if isinstance(unit, SampleUnit) for r in part]


def spans(n_rows: int) -> list[tuple[int, int]]:
    """The rows of a split in units."""
    return [(start, min(start + ROWS_PER_UNIT, n_rows)) for start in range(0, n_rows, ROWS_PER_UNIT)]


def core_units(bundle: Path, max_per_task: int | None) -> list[Unit]:
    """The items of all CORE tasks in units."""
    from nanochat_ray.metrics.core_bundle import load_bundle, load_items
    from nanochat_ray.stages.evaluation import CoreUnit, cut

    return [
        CoreUnit(task.label, indices, max_per_task)
        for task in load_bundle(bundle).tasks
        for indices in cut(range(len(load_items(task)[:max_per_task])), ITEMS_PER_UNIT)
    ]


def note_bpb(split: str, sums: list[Nats], sequence_len: int, notes: Notes) -> None:
    """Bits per byte of a split, with what the number depends on."""
    from nanochat_ray.metrics.bits_per_byte import bits_per_byte
    from nanochat_ray.stages.pretrain import bpb_convention

    bpb = bits_per_byte(sum(part.nats for part in sums), sum(part.bytes for part in sums))
    n_rows = sum(part.rows for part in sums)
    logger.info("base_eval: %s bpb %.4f over %d rows of %d tokens", split, bpb, n_rows, sequence_len)
    notes.metrics |= {f"{split}/bpb": bpb, f"{split}/convention": bpb_convention(n_rows, sequence_len, sums[0].dtype)}
    if split == "train":
        notes.metrics["train/note"] = "the first training documents; tokenizer and model have seen them"


def note_core(job: Job, folder: Path, records: list[CoreRecord], notes: Notes) -> None:
    """The CORE metric, its table, and nanochat's CSV."""
    from nanochat_ray.metrics.core import core_metric, merge
    from nanochat_ray.metrics.core_bundle import load_bundle
    from nanochat_ray.report.records import Table

    bundle = load_bundle(folder)
    for label, reason in bundle.skipped.items():
        notes.skip(f"CORE task {label}", reason)
    results = [merge(task, [record for record in records if record.task == task.label]) for task in bundle.tasks]
    score = core_metric(results)
    logger.info("base_eval: %s %.4f", score.name, score.value)
    notes.metrics |= {"core_metric": score.value, "core_metric_name": score.name}
    notes.hashes["eval_bundle"] = bundle.sha256
    notes.tables[score.name] = Table(
        ["task", "items", "accuracy", "centred", "baseline"],
        [[r.task, r.n_items, r.accuracy, r.centred, r.baseline_frac] for r in results],
    )
    lines = [f"{'Task':<35}, {'Accuracy':<10}, {'Centered':<10}"]
    lines += [f"{r.task:<35}, {r.accuracy:<10.6f}, {r.centred:<10.6f}" for r in results]
    lines += [f"{score.name:<35}, {'':<10}, {score.value:<10.6f}"]
    write_atomic(job.run_dir.stage("base_eval") / "core.csv", "\n".join(lines) + "\n")


def cli() -> None:
    flags = read_flags(__doc__ or "", [Section("run", RunSettings()), Section("base_eval", BaseEvalSettings())])
    settings = flags.settings(RunSettings)
    from _data import pin_data

    with open_job(settings, existing_run(settings.storage, settings.model_tag)) as job:
        run(job, flags.settings(BaseEvalSettings), pin_data(settings, job.run_dir, job.device))


if __name__ == "__main__":
    main(cli)

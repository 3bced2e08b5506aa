"""Evaluate the pretrained model: bits per byte on train and val, CORE, samples (stage `base_eval`)."""

from __future__ import annotations

import logging

from _runtime import Job, Notes, main, open_job

from nanochat_ray.config import BaseEvalSettings, RunSettings
from nanochat_ray.corpus.reader import DataManifest
from nanochat_ray.flags import Section, parse_args
from nanochat_ray.run_dir import find_model_tag, storage_path, write_atomic

logger = logging.getLogger("nanochat_ray")

ROWS_PER_UNIT = 64
ITEMS_PER_UNIT = 40


def run(job: Job, settings: BaseEvalSettings, manifest: DataManifest) -> None:
    from pathlib import Path

    from _evaluate import checkpoint_of, run_units

    from nanochat_ray.metrics.core_bundle import find_bundle
    from nanochat_ray.stages.evaluation import EvalSpec, Evaluator, free_samples, sample_completions
    from nanochat_ray.tasks.rows import TaskDataMissing

    checkpoint = checkpoint_of(job, "base", settings.step)
    parts = settings.eval.split(",")
    bundle, no_bundle = None, ""
    if "core" in parts:
        try:
            named = job.settings.eval_bundle
            bundle = find_bundle(Path(named).expanduser().absolute() if named else None, storage_path(job.settings.storage))
        except TaskDataMissing as error:
            no_bundle = str(error)
    config = {
        "settings": settings.identity(),
        "model": checkpoint.model_hash,
        "data": manifest.hash,
        "bundle": str(bundle) if bundle else None,
    }
    with job.stage("base_eval", config) as notes:
        if notes is None:
            return
        spec = EvalSpec(
            job.run_dir.checkpoints("pretrain"), checkpoint.step, job.run_dir.stage("tokenizer"), job.device,
            job.settings.dtype, job.task_sources(), bundle, manifest, device_batch_size=settings.device_batch_size,
        )
        notes.metrics |= {"step": checkpoint.step}
        if "bpb" in parts:
            bits_per_byte(job, settings, spec, checkpoint.model_config.sequence_len, notes)
        if bundle:
            core(job, settings, spec, notes)
        elif no_bundle:
            notes.skip("CORE", no_bundle)
        if "sample" in parts:
            from nanochat_ray.report.records import Sample

            evaluator = Evaluator(spec)
            for sample in sample_completions(evaluator.model, evaluator.tokenizer) + free_samples(
                evaluator.model, evaluator.tokenizer
            ):
                notes.samples.append(Sample(**sample))


def bits_per_byte(job: Job, settings: BaseEvalSettings, spec, sequence_len: int, notes: Notes) -> None:
    from _evaluate import run_units

    from nanochat_ray.metrics.bits_per_byte import bits_per_byte as ratio
    from nanochat_ray.stages.evaluation import BpbUnit, Evaluator
    from nanochat_ray.stages.pretrain import bpb_convention

    wanted = max(1, settings.split_tokens // sequence_len)
    evaluator = Evaluator(spec)
    for split in ("train", "val"):
        n_rows = len(evaluator.split_rows(split, wanted))
        units = [
            BpbUnit(split, wanted, start, min(start + ROWS_PER_UNIT, n_rows)) for start in range(0, n_rows, ROWS_PER_UNIT)
        ]
        sums = [record for records in run_units(job, spec, units) for record in records]
        bpb = ratio(sum(part.nats for part in sums), sum(part.bytes for part in sums))
        logger.info("base_eval: %s bpb %.4f over %d rows of %d tokens", split, bpb, n_rows, sequence_len)
        notes.metrics |= {
            f"{split}/bpb": bpb,
            f"{split}/convention": bpb_convention(n_rows, sequence_len, str(evaluator.model.compute_dtype)),
        }
    notes.metrics["train/note"] = "first training documents; tokenizer and model have seen them"


def core(job: Job, settings: BaseEvalSettings, spec, notes: Notes) -> None:
    from _evaluate import run_units

    from nanochat_ray.metrics.core import core_metric, merge
    from nanochat_ray.metrics.core_bundle import load_bundle, load_items
    from nanochat_ray.report.records import Table
    from nanochat_ray.stages.evaluation import CoreUnit, cut

    bundle = load_bundle(spec.bundle)
    for label, reason in bundle.skipped.items():
        notes.skip(f"CORE task {label}", reason)
    units = [
        CoreUnit(task.label, indices, settings.max_per_task)
        for task in bundle.tasks
        for indices in cut(range(len(load_items(task)[: settings.max_per_task])), ITEMS_PER_UNIT)
    ]
    records = [record for records in run_units(job, spec, units) for record in records]
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
    found = parse_args(__doc__, [Section("run", RunSettings()), Section("base_eval", BaseEvalSettings())])
    settings = found["run"]
    from _data import pin_data

    with open_job(settings, settings.model_tag or find_model_tag(storage_path(settings.storage))) as job:
        run(job, found["base_eval"], pin_data(settings, job.run_dir, job.device))


if __name__ == "__main__":
    main(cli)

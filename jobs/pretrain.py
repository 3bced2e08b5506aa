"""Pretrain the model on the run's data (stage `pretrain`)."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from _runtime import Job, main, open_job

from nanochat_ray.config import ModelConfig, PretrainSettings, RunSettings, TokenizerSettings
from nanochat_ray.corpus.reader import DataManifest
from nanochat_ray.flags import Section, read_flags
from nanochat_ray.run_dir import RunDir, read_json, write_json

WENT_BACK_FILE = "went_back.json"
logger = logging.getLogger("nanochat_ray")


def run(job: Job, settings: PretrainSettings, manifest: DataManifest) -> None:
    from _train import Feed, other_optimizer, train

    from nanochat_ray.stages.pretrain import PretrainJob
    from nanochat_ray.stages.rows import CorpusRows
    from nanochat_ray.text.tokenizer import Tokenizer

    tokenizer_folder = job.run_dir.require_stage("tokenizer", "tok_train.py")
    tokenizer = Tokenizer.load(tokenizer_folder)
    config = {"settings": settings.identity(), "data": manifest.hash, "tokenizer": tokenizer.hash}
    config |= other_optimizer(job.settings.parallel)
    with job.stage("pretrain", config) as notes:
        if notes is None:
            return
        bundle = eval_bundle(job) if settings.core_metric_every else None
        if settings.core_metric_every and bundle is None:
            notes.skip("CORE while training", "no CORE bundle below the storage; name one with --eval-bundle")
        manifest.check()
        if settings.resume_from_step is not None:
            go_back(job.run_dir, settings.resume_from_step)
        stage = PretrainJob(
            settings, job.run_dir.stage("pretrain"), tokenizer_folder, manifest, job.settings.dtype, bundle,
            job.settings.parallel,
        )
        plan = stage.plan(tokenizer.vocab_size)
        logger.info(
            "pretrain: %s parameters, %s steps of %s tokens, %.2f tokens per scaling parameter, %.3g FLOPs",
            f"{plan.param_counts['total']:,}", f"{plan.num_iterations:,}", f"{plan.total_batch_size:,}",
            plan.total_tokens / plan.scaling_params, plan.total_flops,
        )
        check_architecture(job.run_dir, plan.config)
        rows = CorpusRows(
            manifest, tokenizer_folder, settings.max_seq_len, settings.seed, packing=settings.packing
        )
        result = train(job, stage, Feed(rows, plan.rows_per_step), plan.num_iterations)
        notes.metrics |= result["metrics"]
        notes.hashes |= {"data": manifest.hash, "tokenizer": tokenizer.hash}


def check_architecture(run_dir: RunDir, config: ModelConfig) -> None:
    """Raise ValueError if the newest checkpoint that lies here is of another network; its workers look again."""
    from nanochat_ray.model.checkpoint import META_FILE, Checkpoint, saved_steps, step_folder

    root = run_dir.checkpoints("pretrain")
    for step in saved_steps(root)[-1:]:
        meta = step_folder(root, step) / META_FILE
        if meta.exists():
            Checkpoint(meta.parent, step, read_json(meta)).check_architecture(config)


def go_back(run_dir: RunDir, step: int) -> None:
    """Drop the checkpoints behind a step, once: the same command given again, after a crash, goes on."""
    from nanochat_ray.model.checkpoint import drop_after

    done = run_dir.stage("pretrain") / WENT_BACK_FILE
    if done.exists() and read_json(done)["step"] == step:
        logger.info("pretrain: went back to step %d before; delete %s to go back again", step, done)
        return
    drop_after(run_dir.checkpoints("pretrain"), step)
    write_json(done, {"step": step})


def refuse_early(run: RunSettings, settings: PretrainSettings) -> None:
    """Raise ValueError for what this machine, or an installation like this one, cannot train; before anything is spent.

    A cluster's own GPUs are looked at by its workers.
    """
    from nanochat_ray.model.fp8 import check_fp8
    from nanochat_ray.model.precision import pick_device, pick_dtype
    from nanochat_ray.stages.parallel import check_strategy

    check_strategy(run.parallel)
    if settings.fp8 and not (run.ray and os.environ.get("RAY_ADDRESS")):
        device = pick_device(run.device_type)
        check_fp8(device, pick_dtype(device, run.dtype)[0], settings.max_seq_len, settings.fp8_recipe)


def eval_bundle(job: Job) -> Path | None:
    """The CORE bundle's folder: as named, else the one below the storage if it is there."""
    from nanochat_ray.run_dir import storage_path

    if job.settings.eval_bundle is not None:
        folder = Path(job.settings.eval_bundle).expanduser().absolute()
        if not (folder / "core.yaml").exists():
            raise FileNotFoundError(f"--eval-bundle {folder}: no core.yaml in it")
        return folder
    folder = storage_path(job.settings.storage) / "eval_bundle"
    return folder if (folder / "core.yaml").exists() else None


def cli() -> None:
    flags = read_flags(__doc__ or "", [Section("run", RunSettings()), Section("pretrain", PretrainSettings())])
    from _data import pin_data

    from nanochat_ray.corpus.shards import shards_needed
    from nanochat_ray.model.scaling import plan_training

    settings, pretrain_settings = flags.settings(RunSettings), flags.settings(PretrainSettings)
    refuse_early(settings, pretrain_settings)
    n_shards = shards_needed(plan_training(pretrain_settings, TokenizerSettings().vocab_size).total_tokens)
    with open_job(settings, settings.model_tag or f"d{pretrain_settings.depth}") as job:
        run(job, pretrain_settings, pin_data(settings, job.run_dir, job.device, n_shards))


if __name__ == "__main__":
    main(cli)

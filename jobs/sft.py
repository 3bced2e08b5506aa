"""Finetune the pretrained model on conversations (stage `sft`)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from _runtime import Job, main, open_job

from nanochat_ray.config import RunSettings, SFTSettings
from nanochat_ray.flags import Section, read_flags
from nanochat_ray.run_dir import existing_run

if TYPE_CHECKING:
    from nanochat_ray.tasks.catalog import Split
    from nanochat_ray.tasks.rows import TaskSources

logger = logging.getLogger("nanochat_ray")


def run(job: Job, settings: SFTSettings, world_folder: Path | None) -> None:
    """`world_folder` is the embedded corpus if the run's data is that, else None."""
    from _train import Feed, other_optimizer, train

    from nanochat_ray.model.checkpoint import resolve_checkpoint
    from nanochat_ray.stages.evaluation import ChatTasks
    from nanochat_ray.stages.rows import MixtureRows
    from nanochat_ray.stages.sft import SFTJob, inherit
    from nanochat_ray.tasks.catalog import NANOCHAT_VAL_MIXTURE, nanochat_mixture
    from nanochat_ray.text.tokenizer import Tokenizer

    tokenizer_folder = job.run_dir.require_stage("tokenizer", "tok_train.py")
    job.run_dir.require_stage("pretrain", "pretrain.py")
    base_checkpoints = job.run_dir.checkpoints("pretrain")
    base = resolve_checkpoint(base_checkpoints, settings.model_step)
    resolved, inherited = inherit(settings, base)

    tokenizer = Tokenizer.load(tokenizer_folder)
    sources = job.task_sources()
    missing: list[tuple[str, str]] = []
    if resolved.mixture:
        train_specs = val_specs = [absolute(spec) for spec in resolved.mixture]
    elif world_folder:
        train_specs = val_specs = [f"world={world_folder}"]
    else:
        wanted = nanochat_mixture(resolved.mmlu_epochs, resolved.gsm8k_epochs)
        train_specs, missing = available(wanted, "train", sources)
        val_specs, missing_val = available(NANOCHAT_VAL_MIXTURE, "val", sources)
        missing += missing_val
    epochs = None if resolved.num_iterations else resolved.num_epochs
    rows = MixtureRows(
        tuple(train_specs), "train", sources, tokenizer_folder, resolved.max_seq_len, resolved.seed, epochs
    )
    val_rows = MixtureRows(
        tuple(val_specs), "val", sources, tokenizer_folder, resolved.max_seq_len, resolved.seed
    )
    config = {
        "settings": resolved.identity() | {"mixture": None},  # with the files' contents in the next line
        "mixture": mixture_identity(train_specs) if resolved.mixture else None,
        "tokenizer": tokenizer.hash,
        "base_model": base.model_hash,
    } | other_optimizer(job.settings.parallel)
    with job.stage("sft", config) as notes:
        if notes is None:
            return
        for name, reason in missing:
            notes.skip(name, reason)
        for line in inherited:
            logger.info("sft: %s", line)
        chat_tasks = None
        if resolved.chatcore_every:
            chat_tasks = ChatTasks(sources, resolved.chatcore_max_cat, resolved.chatcore_max_sample)
        stage = SFTJob(
            resolved, job.run_dir.stage("sft"), tokenizer_folder, base_checkpoints, val_rows, job.settings.dtype,
            chat_tasks, job.settings.parallel,
        )
        result = train(
            job, stage, Feed(rows, resolved.total_batch_size // resolved.max_seq_len), resolved.num_iterations
        )
        notes.metrics |= result["metrics"]
        notes.hashes |= {"tokenizer": tokenizer.hash, "base_model": base.model_hash}


def absolute(spec: str) -> str:
    """A mixture's spec with its file's whole path: other processes have other working folders."""
    from nanochat_ray.tasks.catalog import TaskSpec

    parsed = TaskSpec.parse(spec)
    return f"{parsed.name}={Path(parsed.path).expanduser().absolute()}*{parsed.repeats}" if parsed.path else spec


def mixture_identity(specs: Sequence[str]) -> list[list[str | int | None]]:
    """Name, repeats and the contents' hash of each part of a mixture, wherever its files lie."""
    from nanochat_ray.model.checkpoint import file_hash
    from nanochat_ray.tasks.catalog import TaskSpec

    found: list[list[str | int | None]] = []
    for part in map(TaskSpec.parse, specs):
        file = Path(part.path) if part.path else None
        contents = file_hash(file) if file and file.is_file() else file and file.name
        found.append([part.name, part.repeats, str(contents) if contents else None])
    return found


def available(specs: Sequence[str], split: Split, sources: TaskSources) -> tuple[list[str], list[tuple[str, str]]]:
    """The parts of nanochat's mixture whose data is there, and name and reason of the others."""
    from nanochat_ray.tasks.catalog import make_task
    from nanochat_ray.tasks.rows import TaskDataMissing

    found, missing = [], []
    for spec in specs:
        try:
            make_task(spec, split, sources)
            found.append(spec)
        except TaskDataMissing as error:
            missing.append((f"{spec} ({split})", str(error)))
    if not found:
        reasons = "\n  ".join(f"{name}: {reason}" for name, reason in missing)
        raise FileNotFoundError(f"no conversations for SFT; give --task-data or --mixture json=FILE\n  {reasons}")
    return found, missing


def cli() -> None:
    flags = read_flags(__doc__ or "", [Section("run", RunSettings()), Section("sft", SFTSettings())])
    settings = flags.settings(RunSettings)
    from _data import pinned_world

    tag = existing_run(settings.storage, settings.model_tag)
    with open_job(settings, tag) as job:
        run(job, flags.settings(SFTSettings), pinned_world(job.run_dir, settings.storage))


if __name__ == "__main__":
    main(cli)

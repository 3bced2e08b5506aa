"""Run a training stage where the job's settings say: on Ray's workers, or in this process."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass
from typing import Any

from _runtime import Job

from nanochat_ray.messages import World
from nanochat_ray.model.checkpoint import sweep
from nanochat_ray.report.tracker import Tracker
from nanochat_ray.run_dir import CHECKPOINTS
from nanochat_ray.stages.hooks import FolderHooks
from nanochat_ray.stages.parallel import check_strategy
from nanochat_ray.stages.pretrain import PretrainJob, pretrain
from nanochat_ray.stages.rl import RLJob, plain_rollouts, reinforce
from nanochat_ray.stages.rows import RowSource, plain_row_blocks
from nanochat_ray.stages.sft import SFTJob, finetune
from nanochat_ray.stages.strategy import DEEPSPEED_OPTIMIZER
from nanochat_ray.text.packing import step_batches

logger = logging.getLogger("nanochat_ray")


@dataclass(frozen=True)
class Feed:
    """What a stage trains on: rows, so many a step, or rollouts by so many actors."""

    rows: RowSource | None = None
    rows_per_step: int = 0
    rollout_workers: int | None = None


def train(job: Job, stage: PretrainJob | SFTJob | RLJob, feed: Feed, total_steps: int | None) -> dict[str, Any]:
    """Train to the end; returns the stage's result. Raises Stopped if a signal asked for it, with the state saved."""
    sweep(stage.stage_folder / CHECKPOINTS)
    if job.use_ray():
        from nanochat_ray.train.launch import Patience, Workers, fit

        settings, use_gpu = job.settings, job.device.startswith("cuda")
        at_least, at_most = settings.worker_range
        threads = None if use_gpu else job.threads
        workers = Workers(at_least, at_most, use_gpu, threads_each=threads, rollout_workers=feed.rollout_workers)
        patience = Patience(
            settings.max_restarts, settings.wait_s, settings.hang_s, can_grow=bool(os.environ.get("RAY_ADDRESS"))
        )

        def work() -> dict[str, Any]:
            keep_last = settings.keep_checkpoints
            return fit(
                stage, feed.rows, feed.rows_per_step, workers, job.lease, settings.run, patience, keep_last,
                job.stop.is_set,
            )
    else:
        if job.settings.worker_range[0] > 1:
            raise ValueError("--workers above 1 needs Ray; leave --no-ray out")

        def work() -> dict[str, Any]:
            return train_here(job, stage, feed)

    epochs = float(feed.rows.epochs or 1) if feed.rows else 1.0
    return job.wait_for(stage.stage_folder.name, work, total_steps, epochs)


def other_optimizer(parallel: str) -> dict[str, str]:
    """What a stage's identity says of its optimizer: nothing of our own, which every number of ranks has in common.

    Raises ValueError if the strategy cannot run here.
    """
    check_strategy(parallel)
    return {"optimizer": DEEPSPEED_OPTIMIZER} if parallel.startswith("zero") else {}


def train_here(job: Job, stage: PretrainJob | SFTJob | RLJob, feed: Feed) -> dict[str, Any]:
    """Train in this process, without Ray: the same stage function, rows or rollouts, and hooks."""
    world = World(device=job.device)
    tracker = Tracker(stage.stage_folder, job.settings.run, config=stage.settings.model_dump(mode="json"))
    keep_last = job.settings.keep_checkpoints
    hooks = FolderHooks(stage.stage_folder, job.lease.epoch, world, tracker, keep_last, background=True)

    def open_batches(cursor, step):
        assert feed.rows is not None
        return step_batches(plain_row_blocks(feed.rows, cursor), feed.rows_per_step, start_step=step)

    try:
        if isinstance(stage, RLJob):
            with contextlib.closing(plain_rollouts(stage, world)) as source:
                return reinforce(stage, world, source, hooks)
        if isinstance(stage, PretrainJob):
            return pretrain(stage, world, open_batches, hooks)
        return finetune(stage, world, open_batches, hooks)
    finally:
        hooks.close()
        tracker.finish()

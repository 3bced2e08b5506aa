"""Supervised finetuning: the pretrained model learns to answer. Same shape as pretraining, other rows and schedule."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat_ray.config import PretrainSettings, ResolvedSFTSettings, SFTSettings, check_total_batch_size
from nanochat_ray.messages import PackedRows, World
from nanochat_ray.model.checkpoint import Checkpoint, resolve_checkpoint
from nanochat_ray.model.optim import Rates
from nanochat_ray.model.precision import pick_dtype, prepare_device
from nanochat_ray.model.scaling import flops_per_token, peak_flops
from nanochat_ray.model.schedule import sft_lr_multiplier, sft_muon_momentum
from nanochat_ray.report.environment import peak_memory_bytes
from nanochat_ray.run_dir import CHECKPOINTS
from nanochat_ray.stages.evaluation import ChatTasks, chatcore_in_loop
from nanochat_ray.stages.hooks import Hooks, OpenBatches
from nanochat_ray.stages.parallel import build_strategy, check_strategy
from nanochat_ray.stages.pretrain import compile_wanted
from nanochat_ray.stages.rows import MixtureRows
from nanochat_ray.stages.step import (
    UNTIMED_STEPS,
    Batches,
    Clock,
    LoopState,
    QuietGarbageCollector,
    Saver,
    agree,
    check_loss,
    checkpoint_to_go_on_from,
    count_targets,
    evaluating,
    load_checkpoint,
    mfu,
    validation_bpb,
)
from nanochat_ray.stages.strategy import Strategy
from nanochat_ray.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

FALLBACK = {"total_batch_size": 524_288, "embedding_lr": 0.3, "unembedding_lr": 0.004, "matrix_lr": 0.02}


@dataclass(frozen=True)
class SFTJob:
    """What every rank needs to finetune; plain values, so it can cross to another machine."""

    settings: ResolvedSFTSettings
    stage_folder: Path
    tokenizer_folder: Path
    base_checkpoints: Path
    val_rows: MixtureRows
    dtype: str | None = None
    chat_tasks: ChatTasks | None = None
    parallel: str = "sharded"


def inherit(settings: SFTSettings, base: Checkpoint) -> tuple[ResolvedSFTSettings, list[str]]:
    """Fill unset values from the pretraining checkpoint; also one line per value that says where it came from."""
    stored = PretrainSettings.model_validate(base.meta["settings"])
    available = {
        "max_seq_len": stored.max_seq_len,
        "device_batch_size": stored.device_batch_size,
        "total_batch_size": base.meta.get("total_batch_size", FALLBACK["total_batch_size"]),
        "embedding_lr": stored.embedding_lr,
        "unembedding_lr": stored.unembedding_lr,
        "matrix_lr": stored.matrix_lr,
    }
    values, notes = {}, []
    for name, inherited in available.items():
        given = getattr(settings, name)
        values[name] = inherited if given is None else given
        if given is None:
            notes.append(f"{name} {inherited}, inherited from pretraining")
        elif given != inherited:
            notes.append(f"{name} {given}, pretraining had {inherited}")
    resolved = ResolvedSFTSettings.model_validate(settings.model_dump() | values)
    check_total_batch_size(resolved.total_batch_size, resolved.max_seq_len)
    if resolved.max_seq_len > base.model_config.sequence_len:
        raise ValueError(
            f"max_seq_len {resolved.max_seq_len} is longer than the model's context of {base.model_config.sequence_len}"
        )
    return resolved, notes


def finetune(job: SFTJob, world: World, open_batches: OpenBatches, hooks: Hooks) -> dict[str, Any]:
    """Finetune from the newest checkpoint of this stage, else from the pretrained model.

    Returns {"status": "done" | "stopped", "step", "metrics"}; "stopped" means asked to stop, with the state saved.
    """
    settings = job.settings
    tokenizer = Tokenizer.load(job.tokenizer_folder)
    dtype, reason = pick_dtype(world.device, job.dtype)
    check_strategy(job.parallel, dtype)
    base = resolve_checkpoint(job.base_checkpoints, settings.model_step)
    prepare_device(world.device)
    model = base.build_model(world.device, dtype, tokenizer.vocab_size)
    stored = PretrainSettings.model_validate(base.meta["settings"])
    rates = Rates(
        settings.unembedding_lr, settings.embedding_lr, settings.matrix_lr, stored.scalar_lr, weight_decay=0.0,
        muon_eq=stored.muon_eq, muon_plus=stored.muon_plus,
    )
    compiled = compile_wanted(settings.compile, world)
    strategy = build_strategy(job.parallel, model, world, rates, dtype=dtype, compiled=compiled)
    state = LoopState()
    checkpoint = checkpoint_to_go_on_from(job.stage_folder / CHECKPOINTS, world, hooks)
    if checkpoint is not None:
        state = load_checkpoint(strategy, checkpoint)
        logger.info("resuming from step %d", checkpoint.step)
    elif settings.load_optimizer:
        load_moments(strategy, base)
    strategy.scale_initial_lr(settings.init_lr_frac)
    if world.rank == 0:
        logger.info("compute dtype %s: %s", str(dtype).removeprefix("torch."), reason)
        for warning in strategy.warnings:
            logger.warning("%s", warning)
    try:
        return run_loop(job, world, base, tokenizer, strategy, state, open_batches, hooks)
    finally:
        strategy.close()


def load_moments(strategy: Strategy, base: Checkpoint) -> None:
    """Begin with the pretraining optimizer's moments, if they are there and of the same optimizer."""
    moments = base.optimizer_tensors()
    if moments is None:
        logger.warning("the pretraining checkpoint has no optimizer state; starting with a fresh optimizer")
    elif base.meta["optimizer"] != strategy.optimizer_name:
        logger.warning("pretraining used the optimizer %s; starting with a fresh %s",
                       base.meta["optimizer"], strategy.optimizer_name)
    else:
        strategy.load(base.model_tensors(), moments)


def run_loop(
    job: SFTJob, world: World, base: Checkpoint, tokenizer: Tokenizer, strategy: Strategy, state: LoopState,
    open_batches: OpenBatches, hooks: Hooks,
) -> dict[str, Any]:
    """Save, evaluate, step, log, once per step until the conversations or the asked-for steps run out."""
    settings, rank0 = job.settings, world.rank == 0
    token_bytes = torch.from_numpy(tokenizer.token_bytes()).to(world.device)
    val_rows = job.val_rows.first_rows(max(1, settings.eval_tokens // settings.max_seq_len))
    peak = peak_flops(torch.cuda.get_device_name() if world.device.startswith("cuda") else world.device)
    flops = flops_per_token(base.model_config)
    batches = Batches(open_batches(state.cursor, state.step))
    resumed_at = state.step if state.step else None
    saver = Saver(strategy, hooks, resumed_at)
    save_now = stop = False
    metrics: dict[str, Any] = {}

    def due(every: int | None) -> bool:
        return every is not None and state.step > 0 and state.step % every == 0

    with QuietGarbageCollector() as garbage:
        while True:
            batch = batches.next() if state.step != settings.num_iterations else None
            last = batch is None  # the conversations, or the steps asked for, have run out
            if saver.saved_at != state.step and (last or stop or save_now or due(settings.save_every)):
                saver.save(state.step, checkpoint_meta(job, base, state, world))
            if stop and not last:
                hooks.flush()
                return {"status": "stopped", "step": state.step, "metrics": metrics}
            if last or (settings.eval_every and state.step % settings.eval_every == 0):
                with evaluating(strategy, hooks) as model:
                    state.note_bpb(validation_bpb(model, val_rows, token_bytes, settings.device_batch_size, world))
                metrics |= {"val/bpb": state.val_bpb, "val/min_bpb": state.min_val_bpb}
                if rank0:
                    hooks.report(state.step, {"val/bpb": state.val_bpb})
                    hooks.note_bpb(state.step, state.val_bpb)
            if job.chat_tasks is not None and due(settings.chatcore_every) and not last:
                with evaluating(strategy, hooks) as model:
                    scores = chatcore_in_loop(model, tokenizer, job.chat_tasks, world)
                if rank0:
                    hooks.report(state.step, scores)
            if batch is None:
                break

            clock = Clock(world.device)
            n_targets, stop, save_now = agree(
                count_targets(batch), hooks, world, timed_saves=settings.save_every is None
            )
            lr = sft_lr_multiplier(
                schedule_progress(settings, state.step, batch.progress),
                settings.warmup_ratio, settings.warmdown_ratio, settings.final_lr_frac,
            )
            strategy.set_schedule(lr, sft_muon_momentum(state.step), 0.0)
            loss = strategy.accumulate(batch, max(1, n_targets), settings.device_batch_size)
            check_loss(loss, state.step, strategy.model.compute_dtype)
            grad_norm = strategy.update()
            seconds = clock.seconds()
            n_tokens = settings.total_batch_size
            if state.step > UNTIMED_STEPS:
                state.training_time_s += seconds
            step_metrics = {
                "train/loss": state.smooth(loss),
                "train/loss_step": loss,
                "train/lrm": lr,
                "train/grad_norm": grad_norm,
                "train/dt": seconds,
                "train/data_wait_s": batches.wait_s,
                "train/checkpoint_stall_s": saver.take_stall_s(),
                "train/memory_bytes": peak_memory_bytes(world.device),
                "train/tok_per_sec": int(n_tokens / seconds),
                "train/mfu": mfu(flops * n_tokens / seconds, peak * world.world_size),
                "train/progress": batch.progress,
                "train/supervised_tokens": n_targets,
                "total_training_time": state.training_time_s,
            }
            metrics |= step_metrics
            if rank0:
                hooks.report(state.step, step_metrics)
            state.take(batch)
            garbage.after_step()
    if state.step == 0:
        raise ValueError("the SFT mixture gave no rows to train on; check --mixture and the task data")
    hooks.flush()
    metrics |= {"resumed_at": resumed_at, "peak_memory_bytes": peak_memory_bytes(world.device), **strategy.describe()}
    return {"status": "done", "step": state.step, "metrics": metrics | describe(job, state, world, val_rows)}


def schedule_progress(settings: SFTSettings, step: int, data_progress: float) -> float:
    """Where the schedule stands, 0 to 1: by steps when their number is known, else by conversations consumed."""
    if settings.num_iterations is not None:
        return step / settings.num_iterations
    return min(1.0, data_progress / settings.num_epochs)


def checkpoint_meta(job: SFTJob, base: Checkpoint, state: LoopState, world: World) -> dict[str, Any]:
    """The metadata of a checkpoint; `model_config` stays pretraining's, since the windows derive from its length."""
    return {
        "source": "sft",
        "model_config": base.meta["model_config"],
        "settings": job.settings.model_dump(mode="json"),
        "base_model": base.model_hash,
        "total_batch_size": job.settings.total_batch_size,
        "val_bpb": state.val_bpb,
        "world_size": world.world_size,
        "loop": state.to_json(),
    }


def describe(job: SFTJob, state: LoopState, world: World, val_rows: PackedRows) -> dict[str, Any]:
    """The numbers of the finished run for its report."""
    dtype, _ = pick_dtype(world.device, job.dtype)
    return {
        "num_iterations": state.step,
        "epochs": state.progress,
        "total_batch_size": job.settings.total_batch_size,
        "world_size": world.world_size,
        "dtype": str(dtype).removeprefix("torch."),
        "val/convention": (
            f"best-fit pad, supervised tokens only; {len(val_rows)} rows of T={job.settings.max_seq_len}; "
            f"{str(dtype).removeprefix('torch.')}; bytes of raw tokens, special tokens 0"
        ),
    }

"""Pretraining: the loop in which rows of text become a model. A plain process and Ray's workers call `pretrain`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat_ray.config import PretrainSettings
from nanochat_ray.corpus.reader import DataManifest, validation_rows
from nanochat_ray.messages import World
from nanochat_ray.model.checkpoint import latest_checkpoint, load_weights, model_tensors
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.optim import MuonAdamW, build_optimizer
from nanochat_ray.model.precision import pick_dtype, prepare_device
from nanochat_ray.model.scaling import Plan, peak_flops, plan_training
from nanochat_ray.model.schedule import lr_multiplier, muon_momentum, muon_weight_decay
from nanochat_ray.report.environment import peak_memory_bytes
from nanochat_ray.run_dir import CHECKPOINTS
from nanochat_ray.stages.evaluation import core_in_loop, sample_completions
from nanochat_ray.stages.hooks import Hooks, OpenBatches, TrainingState
from nanochat_ray.stages.step import (
    UNTIMED_STEPS,
    Clock,
    LoopState,
    QuietGarbageCollector,
    accumulate_gradients,
    agree,
    count_targets,
    mfu,
    validation_bpb,
)
from nanochat_ray.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainJob:
    """What every rank needs to pretrain; plain values, so it can cross to another machine."""

    settings: PretrainSettings
    stage_folder: Path
    tokenizer_folder: Path
    manifest: DataManifest
    dtype: str | None = None  # None: by hardware
    eval_bundle: Path | None = None

    def plan(self, vocab_size: int) -> Plan:
        return plan_training(self.settings, vocab_size)


def pretrain(job: PretrainJob, world: World, open_batches: OpenBatches, hooks: Hooks) -> dict[str, Any]:
    """Train from the newest checkpoint, or from new weights, to the horizon.

    Returns {"status": "done" | "stopped", "step", "metrics"}; "stopped" means asked to stop, with the state saved.
    """
    settings = job.settings
    tokenizer = Tokenizer.load(job.tokenizer_folder)
    plan = job.plan(tokenizer.vocab_size)
    dtype, reason = pick_dtype(world.device, job.dtype)
    if dtype == torch.float16:
        raise ValueError("training in float16 needs a loss scaler, which is not here; use bfloat16 or float32")
    prepare_device(world.device)
    model = GPT.build(plan.config, device=world.device, compute_dtype=dtype, seed=settings.seed)
    optimizer = build_optimizer(
        model, unembedding_lr=settings.unembedding_lr, embedding_lr=settings.embedding_lr,
        matrix_lr=settings.matrix_lr, scalar_lr=settings.scalar_lr, weight_decay=plan.weight_decay,
        batch_lr_scale=plan.batch_lr_scale, rank=world.rank, world_size=world.world_size,
        muon_eq=settings.muon_eq, muon_plus=settings.muon_plus,
    )
    state = resume(job, model, optimizer)
    if world.rank == 0:
        logger.info("compute dtype %s: %s", str(dtype).removeprefix("torch."), reason)
    return run_loop(job, world, plan, tokenizer, model, optimizer, state, open_batches, hooks)


def resume(job: PretrainJob, model: GPT, optimizer: MuonAdamW) -> LoopState:
    """Load the checkpoint to go on from into model and optimizer, if there is one."""
    checkpoint = latest_checkpoint(job.stage_folder / CHECKPOINTS)
    if checkpoint is None:
        return LoopState()
    if checkpoint.model_config != model.config:
        raise ValueError(f"{checkpoint.folder} holds another architecture: {checkpoint.model_config}")
    load_weights(model, checkpoint.model_tensors())
    optimizer.load_state_by_name(checkpoint.optimizer_tensors() or {})
    logger.info("resuming from step %d", checkpoint.step)
    return LoopState.from_json(checkpoint.meta["loop"])


def run_loop(
    job: PretrainJob, world: World, plan: Plan, tokenizer: Tokenizer, model: GPT, optimizer: MuonAdamW,
    state: LoopState, open_batches: OpenBatches, hooks: Hooks,
) -> dict[str, Any]:
    """Save, evaluate, step, log, once per step until the horizon."""
    settings, horizon, rank0 = job.settings, plan.num_iterations, world.rank == 0
    token_bytes = torch.from_numpy(tokenizer.token_bytes()).to(world.device)
    sequence_len = settings.max_seq_len
    n_val_rows = max(1, settings.eval_tokens // sequence_len)
    val_rows = validation_rows(job.manifest, tokenizer, sequence_len, n_val_rows)
    compiled = torch.compile(model, dynamic=False) if compile_wanted(settings.compile, world) else model
    peak = peak_flops(torch.cuda.get_device_name() if world.device.startswith("cuda") else world.device)
    batches = open_batches(state.cursor, state.step)
    resumed_at = saved_at = state.step if state.step else None
    save_now = stop = False
    metrics: dict[str, Any] = {}

    def due(every: int | None) -> bool:
        return every is not None and (state.step == horizon or (state.step > 0 and state.step % every == 0))

    def save() -> None:
        optimizer_state = optimizer.state_by_name()  # a collective: every rank takes part
        tensors = model_tensors(model) if rank0 else {}
        hooks.save(state.step, TrainingState(tensors, optimizer_state, checkpoint_meta(job, plan, state, world)))

    with QuietGarbageCollector() as garbage:
        while True:
            last = state.step == horizon
            if saved_at != state.step and (last or stop or save_now or due(settings.save_every)):
                save()
                saved_at = state.step
            if stop and not last:
                return {"status": "stopped", "step": state.step, "metrics": metrics}
            if settings.eval_every and (last or state.step % settings.eval_every == 0):
                state.note_bpb(validation_bpb(model, val_rows, token_bytes, settings.device_batch_size, world))
                metrics |= {"val/bpb": state.val_bpb, "val/min_bpb": state.min_val_bpb}
                if rank0:
                    hooks.report(state.step, {"val/bpb": state.val_bpb})
            if job.eval_bundle is not None and due(settings.core_metric_every):
                core = core_in_loop(model, tokenizer, job.eval_bundle, settings.core_metric_max_per_task, world)
                metrics |= core
                if rank0:
                    hooks.report(state.step, core)
            if rank0 and due(settings.sample_every):
                hooks.report(state.step, {"samples": sample_completions(model, tokenizer)})
            if last:
                break

            batch = next(batches)
            clock = Clock(world.device)
            n_targets, stop, save_now = agree(
                count_targets(batch), hooks, world, timed_saves=settings.save_every is None
            )
            loss = accumulate_gradients(compiled, batch, n_targets, settings.device_batch_size, world)
            lr = lr_multiplier(
                state.step, horizon, settings.warmup_steps, settings.warmdown_ratio, settings.final_lr_frac
            )
            optimizer.set_schedule(
                lr, muon_momentum(state.step, horizon, settings.warmdown_ratio),
                muon_weight_decay(state.step, horizon, plan.weight_decay),
            )
            optimizer.step()
            optimizer.zero_grad()
            seconds = clock.seconds()
            if state.step > UNTIMED_STEPS:
                state.training_time_s += seconds
            step_metrics = {
                "train/loss": state.smooth(loss),
                "train/loss_step": loss,
                "train/lrm": lr,
                "train/dt": seconds,
                "train/tok_per_sec": int(n_targets / seconds),
                "train/mfu": mfu(plan.flops_per_token * n_targets / seconds, peak * world.world_size),
                "train/epoch": batch.cursor.epoch,
                "train/item": batch.cursor.item,
                "train/row": batch.cursor.row,
                "total_training_time": state.training_time_s,
                "total_training_flops": plan.flops_per_token * plan.total_batch_size * (state.step + 1),
            }
            metrics |= step_metrics
            if rank0:
                hooks.report(state.step, step_metrics)
            state.cursor, state.progress = batch.cursor, batch.progress
            state.step += 1
            garbage.after_step()
    metrics |= {"resumed_at": resumed_at, "peak_memory_bytes": peak_memory_bytes(world.device)}
    return {"status": "done", "step": state.step, "metrics": metrics | describe(job, plan, world, len(val_rows))}


def compile_wanted(setting: bool | None, world: World) -> bool:
    """torch.compile pays on CUDA; on a CPU it needs a C++ compiler and more start-up than a short run gives back."""
    return world.device.startswith("cuda") if setting is None else setting


def checkpoint_meta(job: PretrainJob, plan: Plan, state: LoopState, world: World) -> dict[str, Any]:
    """The metadata of a checkpoint; the same schema for every source."""
    return {
        "source": "base",
        "model_config": plan.config.model_dump(mode="json"),
        "settings": job.settings.model_dump(mode="json"),
        "total_batch_size": plan.total_batch_size,
        "num_iterations": plan.num_iterations,
        "val_bpb": state.val_bpb,
        "data_hash": job.manifest.hash,
        "world_size": world.world_size,
        "loop": state.to_json(),
    }


def describe(job: PretrainJob, plan: Plan, world: World, n_val_rows: int) -> dict[str, Any]:
    """The numbers of the finished run for its report."""
    dtype, _ = pick_dtype(world.device, job.dtype)
    tokens = plan.total_batch_size * plan.num_iterations
    return {
        "parameters": plan.param_counts["total"],
        "scaling_parameters": plan.scaling_params,
        "flops_per_token": plan.flops_per_token,
        "num_iterations": plan.num_iterations,
        "total_batch_size": plan.total_batch_size,
        "training_tokens": tokens,
        "tokens_per_scaling_parameter": tokens / plan.scaling_params,
        "world_size": world.world_size,
        "device": world.device,
        "dtype": str(dtype).removeprefix("torch."),
        "val/convention": bpb_convention(n_val_rows, job.settings.max_seq_len, str(dtype)),
    }


def bpb_convention(n_rows: int, sequence_len: int, dtype: str) -> str:
    """What a bits-per-byte number depends on besides model and text; stored with each of them."""
    return (
        f"best-fit crop, buffer 1000, one reader; {n_rows} rows of T={sequence_len}; {dtype.removeprefix('torch.')}; "
        "bytes of raw tokens, special tokens 0"
    )

"""Pretraining: the loop in which rows of text become a model. A plain process and Ray's workers call `pretrain`."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat_ray.config import PretrainSettings
from nanochat_ray.corpus.reader import DataManifest, validation_rows
from nanochat_ray.messages import World
from nanochat_ray.model.fp8 import check_fp8, enable_fp8
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.optim import Rates
from nanochat_ray.model.precision import pick_dtype, prepare_device
from nanochat_ray.model.scaling import Plan, peak_flops, plan_training
from nanochat_ray.model.schedule import lr_multiplier, muon_momentum, muon_weight_decay
from nanochat_ray.report.environment import peak_memory_bytes
from nanochat_ray.run_dir import CHECKPOINTS
from nanochat_ray.stages.evaluation import core_in_loop, sample_completions
from nanochat_ray.stages.hooks import Hooks, OpenBatches
from nanochat_ray.stages.parallel import build_strategy, check_strategy
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


@dataclass(frozen=True)
class PretrainJob:
    """What every rank needs to pretrain; plain values, so it can cross to another machine."""

    settings: PretrainSettings
    stage_folder: Path
    tokenizer_folder: Path
    manifest: DataManifest
    dtype: str | None = None  # None: by hardware
    eval_bundle: Path | None = None
    parallel: str = "sharded"

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
    check_strategy(job.parallel, dtype)
    if settings.fp8:
        check_fp8(world.device, dtype, settings.max_seq_len, settings.fp8_recipe)
    prepare_device(world.device)
    model = GPT.build(plan.config, device=world.device, compute_dtype=dtype, seed=settings.seed)
    fp8_layers = enable_fp8(model, settings.fp8_recipe)[0] if settings.fp8 else 0
    rates = Rates(
        settings.unembedding_lr, settings.embedding_lr, settings.matrix_lr, settings.scalar_lr, plan.weight_decay,
        plan.batch_lr_scale, settings.muon_eq, settings.muon_plus,
    )
    compiled = compile_wanted(settings.compile, world)
    strategy = build_strategy(job.parallel, model, world, rates, dtype=dtype, compiled=compiled)
    state = LoopState()
    checkpoint = checkpoint_to_go_on_from(job.stage_folder / CHECKPOINTS, world, hooks)
    if checkpoint is not None:
        checkpoint.check_architecture(plan.config)
        state = load_checkpoint(strategy, checkpoint)
        logger.info("resuming from step %d", checkpoint.step)
    if world.rank == 0:
        fp8 = f", {fp8_layers} layers in fp8 {settings.fp8_recipe}" if settings.fp8 else ""
        logger.info("compute dtype %s: %s%s", str(dtype).removeprefix("torch."), reason, fp8)
        for warning in strategy.warnings:
            logger.warning("%s", warning)
    try:
        return run_loop(job, world, plan, tokenizer, strategy, state, open_batches, hooks)
    finally:
        strategy.close()


def run_loop(
    job: PretrainJob, world: World, plan: Plan, tokenizer: Tokenizer, strategy: Strategy, state: LoopState,
    open_batches: OpenBatches, hooks: Hooks,
) -> dict[str, Any]:
    """Save, evaluate, step, log, once per step until the horizon."""
    settings, horizon, rank0 = job.settings, plan.num_iterations, world.rank == 0
    token_bytes = torch.from_numpy(tokenizer.token_bytes()).to(world.device)
    sequence_len = settings.max_seq_len
    n_val_rows = max(1, settings.eval_tokens // sequence_len)
    val_rows = validation_rows(job.manifest, tokenizer, sequence_len, n_val_rows)
    peak = peak_flops(torch.cuda.get_device_name() if world.device.startswith("cuda") else world.device)
    batches = Batches(open_batches(state.cursor, state.step))
    resumed_at = state.step if state.step else None
    saver = Saver(strategy, hooks, resumed_at)
    save_now = stop = False
    metrics: dict[str, Any] = {}

    def due(every: int | None) -> bool:
        return every is not None and (state.step == horizon or (state.step > 0 and state.step % every == 0))

    with QuietGarbageCollector() as garbage:
        while True:
            last = state.step == horizon
            if saver.saved_at != state.step and (last or stop or save_now or due(settings.save_every)):
                saver.save(state.step, checkpoint_meta(job, plan, state, world))
            if stop and not last:
                hooks.flush()
                return {"status": "stopped", "step": state.step, "metrics": metrics}
            if settings.eval_every and (last or state.step % settings.eval_every == 0):
                with evaluating(strategy, hooks) as model:
                    state.note_bpb(validation_bpb(model, val_rows, token_bytes, settings.device_batch_size, world))
                metrics |= {"val/bpb": state.val_bpb, "val/min_bpb": state.min_val_bpb}
                if rank0:
                    hooks.report(state.step, {"val/bpb": state.val_bpb})
                    hooks.note_bpb(state.step, state.val_bpb)
            if job.eval_bundle is not None and due(settings.core_metric_every):
                with evaluating(strategy, hooks) as model:
                    core = core_in_loop(model, tokenizer, job.eval_bundle, settings.core_metric_max_per_task, world)
                metrics |= core
                if rank0:
                    hooks.report(state.step, core)
            if due(settings.sample_every):
                with evaluating(strategy, hooks) as model:
                    if rank0:
                        hooks.report(state.step, {"samples": sample_completions(model, tokenizer)})
            if last:
                break

            batch = batches.next()
            assert batch is not None, "the stream of pretraining rows has no end"
            clock = Clock(world.device)
            n_targets, stop, save_now = agree(
                count_targets(batch), hooks, world, timed_saves=settings.save_every is None
            )
            lr = lr_multiplier(
                state.step, horizon, settings.warmup_steps, settings.warmdown_ratio, settings.final_lr_frac
            )
            strategy.set_schedule(
                lr, muon_momentum(state.step, horizon, settings.warmdown_ratio),
                muon_weight_decay(state.step, horizon, plan.weight_decay),
            )
            loss = strategy.accumulate(batch, n_targets, settings.device_batch_size)
            check_loss(loss, state.step, strategy.model.compute_dtype)
            grad_norm = strategy.update()
            seconds = clock.seconds()
            state.counts += batch.counts
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
                "data/waste_frac": state.counts.waste_frac,
                "train/tok_per_sec": int(n_targets / seconds),
                "train/mfu": mfu(plan.flops_per_token * n_targets / seconds, peak * world.world_size),
                "train/epoch": batch.cursor.epoch,
                "train/item": batch.cursor.item,
                "train/row": batch.cursor.row,
                "train/progress": (state.step + 1) / horizon,
                "total_training_time": state.training_time_s,
                "total_training_flops": plan.flops_per_token * plan.total_batch_size * (state.step + 1),
            }
            metrics |= step_metrics
            if rank0:
                hooks.report(state.step, step_metrics)
            state.take(batch)
            garbage.after_step()
    hooks.flush()
    metrics |= {"resumed_at": resumed_at, "peak_memory_bytes": peak_memory_bytes(world.device), **strategy.describe()}
    metrics |= {f"data/{name}": count for name, count in asdict(state.counts).items()}
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

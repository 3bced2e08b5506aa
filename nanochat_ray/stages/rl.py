"""Reinforcement learning: the finetuned model answers prompts, and learns from which of its answers were better.

REINFORCE with the mean reward of a prompt's other answers as baseline; no reference model, no critic, no clipping.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from nanochat_ray.config import PretrainSettings, RLSettings
from nanochat_ray.messages import RolloutGroup, World
from nanochat_ray.metrics.pass_at_k import pass_metrics
from nanochat_ray.model.checkpoint import Checkpoint, resolve_checkpoint
from nanochat_ray.model.optim import Rates
from nanochat_ray.model.precision import pick_dtype, prepare_device
from nanochat_ray.report.environment import peak_memory_bytes
from nanochat_ray.report.rl import AFTER, BEFORE, SAMPLES_FILES
from nanochat_ray.run_dir import CHECKPOINTS, write_atomic
from nanochat_ray.sandbox import SandboxFailed, SandboxUnavailable
from nanochat_ray.stages.hooks import Hooks
from nanochat_ray.stages.losses import LearningStep, learning_step, micro_batch
from nanochat_ray.stages.parallel import build_strategy, check_strategy
from nanochat_ray.stages.ranks import sum_over_ranks
from nanochat_ray.stages.rl_desk import Desk, Plan
from nanochat_ray.stages.rollout_log import ROLLOUTS, LoggedRollouts, RolloutLog
from nanochat_ray.stages.rollouts import OwnRollouts, RolloutSource, RolloutSpec
from nanochat_ray.stages.sft import load_moments
from nanochat_ray.stages.step import (
    UNTIMED_STEPS,
    Clock,
    LoopState,
    Saver,
    agree,
    check_loss,
    checkpoint_to_go_on_from,
    load_checkpoint,
)
from nanochat_ray.stages.strategy import Strategy
from nanochat_ray.tasks.rl_task import RLTaskSpec
from nanochat_ray.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MUON_MOMENTUM = 0.95
SAMPLES_SHOWN = 8
SANDBOX_FAILURES = (SandboxFailed.__name__, SandboxUnavailable.__name__)  # how such a rollout's `failure` begins


@dataclass(frozen=True)
class RLJob:
    """What every rank needs; plain values, so it can cross to another machine."""

    settings: RLSettings
    stage_folder: Path
    tokenizer_folder: Path
    base_checkpoints: Path  # of SFT
    pretrain: PretrainSettings  # for what the optimizer takes over from there
    task: RLTaskSpec
    dtype: str | None = None
    parallel: str = "sharded"

    def base(self) -> Checkpoint:
        return resolve_checkpoint(self.base_checkpoints, self.settings.model_step)

    def rollout_spec(self, device: str) -> RolloutSpec:
        s, config = self.settings, self.base().model_config
        plan = Plan(s, self.task.open(), Tokenizer.load(self.tokenizer_folder), config.sequence_len)
        rows = max(s.num_samples, s.eval_samples) * s.prompts_per_unit
        return RolloutSpec(
            f"{self.stage_folder.parent.name} {self.stage_folder.name}", self.task, self.tokenizer_folder, config,
            device, self.dtype, min(s.max_rows, rows), plan.longest(), s.rollout_threads,
            s.rollout_engine,
        )


def plain_rollouts(job: RLJob, world: World) -> RolloutSource:
    """Rollouts in this process alone, or from a log."""
    if job.settings.replay:
        return LoggedRollouts(Path(job.settings.replay))
    return OwnRollouts(job.rollout_spec(world.device), world)


def reinforce(job: RLJob, world: World, source: RolloutSource, hooks: Hooks) -> dict[str, Any]:
    """Train from the newest checkpoint of this stage, else from the finetuned model.

    Returns {"status": "done" | "stopped", "step", "metrics"}; "stopped" means asked to stop, with the state saved.
    """
    settings = job.settings
    tokenizer = Tokenizer.load(job.tokenizer_folder)
    dtype, reason = pick_dtype(world.device, job.dtype)
    check_strategy(job.parallel, dtype)
    base = job.base()
    prepare_device(world.device)
    model = base.build_model(world.device, dtype, tokenizer.vocab_size)
    rates = Rates(
        settings.unembedding_lr, settings.embedding_lr, settings.matrix_lr, settings.scalar_lr,
        weight_decay=settings.weight_decay, muon_eq=job.pretrain.muon_eq, muon_plus=job.pretrain.muon_plus,
    )
    strategy = build_strategy(job.parallel, model, world, rates, dtype=dtype, compiled=False)
    state = LoopState()
    checkpoint = checkpoint_to_go_on_from(job.stage_folder / CHECKPOINTS, world, hooks)
    if checkpoint is not None:
        state = load_checkpoint(strategy, checkpoint)
        logger.info("resuming from step %d", checkpoint.step)
    elif settings.load_optimizer:
        load_moments(strategy, base)
    strategy.scale_initial_lr(settings.init_lr_frac)
    before = checkpoint.meta["before"] if checkpoint else {}
    log = RolloutLog(job.stage_folder / ROLLOUTS, hooks.guard)
    if world.rank == 0:
        logger.info("compute dtype %s: %s", str(dtype).removeprefix("torch."), reason)
        log.pull()
        if settings.temperature != 1 or settings.top_k:
            logger.warning("temperature %g and top_k %s: sampled from another distribution than the one trained, which "
                           "nothing corrects", settings.temperature, settings.top_k)
    plan = Plan(settings, job.task.open(), tokenizer, base.model_config.sequence_len)
    try:
        return run_loop(job, world, base, strategy, state, Desk(plan, source, log, world, hooks.beat), hooks, before)
    finally:
        strategy.close()


def run_loop(
    job: RLJob, world: World, base: Checkpoint, strategy: Strategy, state: LoopState, desk: Desk, hooks: Hooks,
    before: dict[str, float],
) -> dict[str, Any]:
    """Save, evaluate, and once per step: generate, score, learn, publish, until the prompts have run out.

    `before` are the scores of the model that it all began with, if they are known already.
    """
    settings, rank0, n_steps = job.settings, world.rank == 0, desk.plan.n_steps
    lag = settings.async_steps
    resumed_at = state.step if state.step else None
    saver = Saver(strategy, hooks, resumed_at)
    pad_id = desk.plan.tokenizer.encode_special("<|assistant_end|>")
    save_now = stop = False
    metrics: dict[str, Any] = {}

    publish_s = publish(desk, strategy, state.step, world)
    for ahead in range(lag):
        desk.order(state.step + ahead, version=state.step)
    while True:
        last = state.step >= n_steps
        if saver.saved_at != state.step and (last or stop or save_now or due(settings.save_every, state.step)):
            if rank0:
                desk.log.push()
            saver.save(state.step, checkpoint_meta(job, base, state, world, before))
        if stop and not last:
            hooks.flush()
            return {"status": "stopped", "step": state.step, "metrics": metrics}
        if last or state.step == 0 or due(settings.eval_every, state.step):
            scores = evaluate(job, desk, state.step, world)
            before = before or scores
            if rank0:
                hooks.report(state.step, {f"eval/{name}": value for name, value in scores.items()})
        if last:
            break

        clock = Clock(world.device)
        desk.order(state.step + lag, version=state.step)  # without a lag: this step's own prompts, with these weights
        groups = desk.take(state.step)
        learning = learning_step(groups, settings.zscore)
        rows = learning.rows[world.rank :: world.world_size]
        check_rewards(groups, state.step)

        update_clock = Clock(world.device)
        micro = [
            micro_batch(rows[k : k + settings.device_batch_size], pad_id, world.device, settings)
            for k in range(0, len(rows), settings.device_batch_size)
        ]
        lr = 1 - state.step / n_steps
        strategy.set_schedule(lr, MUON_MOMENTUM, settings.weight_decay)
        loss = strategy.accumulate_objectives(micro, max(1, learning.n_targets))
        check_loss(loss, state.step, strategy.model.compute_dtype)
        drift = drift_metrics([sums for *_, objective in micro for sums in objective.drift], world)
        grad_norm = strategy.update()
        update_s = update_clock.seconds()
        publish_s = publish(desk, strategy, state.step + 1, world)

        _, stop, save_now = agree(0, hooks, world, timed_saves=settings.save_every is None)
        step_metrics = rollout_metrics(groups, learning, state.step) | drift | {
            "train/loss": loss,
            "train/grad_norm": grad_norm,
            "train/lrm": lr,
            "train/dt": (seconds := clock.seconds()),
            "train/update_s": update_s,
            "train/publish_s": publish_s,
            "rollout/wait_s": desk.wait_s,
            "rollout/generate_s": desk.generate_s,
            "rollout/score_s": desk.score_s,
            "train/checkpoint_stall_s": saver.take_stall_s(),
            "train/memory_bytes": peak_memory_bytes(world.device),
            "train/tok_per_sec": int(n_sampled(groups) / seconds),
        }
        if rank0:
            step_metrics |= {f"rollout/{name}": value for name, value in desk.source.counts().items()}
            hooks.report(state.step, step_metrics)
        metrics |= step_metrics
        state.step += 1
        if state.step > UNTIMED_STEPS:
            state.training_time_s += seconds
    hooks.flush()
    metrics |= {f"before/{name}": value for name, value in before.items()}
    metrics |= {f"after/{name}": value for name, value in scores.items()}
    metrics |= {"resumed_at": resumed_at, "num_iterations": n_steps, "world_size": world.world_size}
    metrics |= strategy.describe()
    return {"status": "done", "step": state.step, "metrics": metrics}


def due(every: int | None, step: int) -> bool:
    return every is not None and step > 0 and step % every == 0


def publish(desk: Desk, strategy: Strategy, version: int, world: World) -> float:
    """Give out the weights; returns the seconds it took."""
    clock = Clock(world.device)
    with strategy.full_weights() as model:
        desk.source.publish(version, model)
    return clock.seconds()


def check_rewards(groups: Sequence[RolloutGroup], step: int) -> None:
    """ValueError if not one of these rollouts has a reward: going on would be training on nothing."""
    failures = [rollout.failure for group in groups for rollout in group.rollouts]
    if failures and all(failures):
        raise ValueError(
            f"step {step}: none of {len(failures)} rollouts has a reward; what is said of the first: {failures[0]}; "
            "the same command tries this step again"
        )


def rewards_of(groups: Sequence[RolloutGroup]) -> list[list[float | None]]:
    return [[rollout.reward for rollout in group.rollouts] for group in groups]


def n_sampled(groups: Sequence[RolloutGroup]) -> int:
    """Tokens that the policy chose."""
    return sum(sum(rollout.mask) for group in groups for rollout in group.rollouts)


def drift_metrics(sums: Sequence[Tensor], world: World) -> dict[str, float]:
    """Of the tokens learned from: mean ratio to the weights that sampled, share above the cap, and the KL estimate."""
    total = torch.stack([*sums]).double().sum(0).tolist() if sums else [0.0] * 4
    n, ratio, capped, kl = sum_over_ranks(total, world)
    if not n:
        return {}
    return {"train/ratio_mean": ratio / n, "train/ratio_capped_frac": capped / n, "train/kl": kl / n}


def reward_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Means over the rollouts that have a reward."""
    scored = [rollout for group in groups for rollout in group.rollouts if rollout.reward is not None]
    if not scored:
        return {}
    return {
        "reward_mean": fmean(rollout.reward or 0.0 for rollout in scored),
        "length_mean": fmean(sum(rollout.mask) for rollout in scored),
    }


def rollout_metrics(groups: Sequence[RolloutGroup], learning: LearningStep, step: int) -> dict[str, Any]:
    """What a step's rollouts were like."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    left_out = {group.prompt.id: group.set_aside for group in groups if group.set_aside}
    for group in groups:
        left_out |= {f"{group.prompt.id} sample {r.sample}": r.failure for r in group.rollouts if r.failure}
    alike = [group for group in groups if len({rollout.reward for rollout in group.rollouts}) <= 1]
    return {f"rollout/{name}": value for name, value in reward_metrics(groups).items()} | {
        "rollout/policy_lag": fmean(step - group.version for group in groups),
        "rollout/zero_advantage_frac": len(alike) / len(groups),
        "rollout/masked": sum(rollout.reward is None for rollout in rollouts),
        "rollout/sandbox_failed": sum((rollout.failure or "").startswith(SANDBOX_FAILURES) for rollout in rollouts),
        "rollout/set_aside": sum(group.set_aside is not None for group in groups),
        "rollout/truncated_frac": fmean(rollout.finish_reason == "length" for rollout in rollouts) if rollouts else 0.0,
        "rollout/trained_tokens": learning.n_targets,
    } | ({"rollout/left_out": left_out} if left_out else {})


def evaluate(job: RLJob, desk: Desk, step: int, world: World) -> dict[str, float]:
    """Scores of the policy at a step on the evaluation prompts. Rank 0 also keeps samples of the first and the last."""
    sampled, greedy = desk.evaluate(step, step)
    check_rewards(sampled, step)
    scores = pass_metrics(rewards_of(sampled)) | reward_metrics(sampled)
    if found := pass_metrics(rewards_of(greedy)):
        scores["greedy"] = found["pass@1"]
    if world.rank == 0:
        shown = [f"{name} {scores[name]:.3f}" for name in ("pass@1", "greedy", "reward_mean") if name in scores]
        logger.info("step %d: %s", step, ", ".join(shown))
        if step in (0, desk.plan.n_steps):
            path = job.stage_folder / SAMPLES_FILES[AFTER if step else BEFORE]
            write_atomic(path, json.dumps(samples(desk, sampled), indent=1, ensure_ascii=False) + "\n")
    return scores


def samples(desk: Desk, groups: Sequence[RolloutGroup]) -> list[dict[str, Any]]:
    """The first completions of the first prompts, for people."""
    conversations = desk.plan.conversations["val"]
    return [
        {
            "id": group.prompt.id,
            "prompt": conversations[group.prompt.index]["messages"][-2]["content"],
            "completion": group.rollouts[0].text,
            "reward": group.rollouts[0].reward,
        }
        for group in groups[:SAMPLES_SHOWN]
        if group.rollouts
    ]


def checkpoint_meta(
    job: RLJob, base: Checkpoint, state: LoopState, world: World, before: dict[str, float]
) -> dict[str, Any]:
    """The metadata of a checkpoint; `model_config` stays pretraining's, since the windows derive from its length."""
    return {
        "source": "rl",
        "model_config": base.meta["model_config"],
        "settings": job.settings.model_dump(mode="json"),
        "base_model": base.model_hash,
        "total_batch_size": base.meta.get("total_batch_size"),
        "world_size": world.world_size,
        "loop": state.to_json(),
        "before": before,
    }

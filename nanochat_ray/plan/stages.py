"""Seconds and money of each stage, and what a run leaves on the disk. All modelled but for what is marked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from nanochat_ray.config import SpeedrunSettings
from nanochat_ray.corpus.shards import PUBLISHED, shards_needed, tokenizer_shards
from nanochat_ray.model.scaling import Plan, decode_flops
from nanochat_ray.plan.serving import MAX_ROWS, Serving
from nanochat_ray.plan.state import Shapes, n_bytes, state_tensors
from nanochat_ray.stages.hooks import SAVE_INTERVAL_S

SHARD_BYTES = 100_000_000  # of a published set, about
DOWNLOAD_BYTES_PER_S = 100e6  # assumed
TOKENIZER_CHARS_PER_S = 10e6  # assumed, on the CPUs of a GPU machine
CORE_TASKS, CORE_ITEMS, TOKENS_PER_CORE_ITEM = 22, 80_000, 2000  # items of all tasks; tokens with all choices
SFT_TOKENS = 370_000_000  # of nanochat's mixture, estimated from its 1.07 million rows
RL_PROMPTS = 7473  # GSM8K's training questions
CHAT_EVAL_TOKENS, CHAT_EVAL_SAMPLED = 3_500_000, 350_000  # read and sampled over all tasks
PROMPT_TOKENS = 128  # before a sampled answer, estimated
START_S = 12.0  # of a stage's workers, measured on a small machine (dev/LOG.md)
COMPILE_S = 120.0  # torch.compile's first time, assumed; its results are kept
DECODE_OF_BOUND = 0.3  # share of serving's bound that sampling reaches, assumed
DECODE_OF_CPU = 0.14  # share of a CPU's products that sampling reaches, measured (dev/LOG.md)
ROLLOUT_BYTES_PER_TOKEN = 40  # of the rollout log


@dataclass(frozen=True)
class StageCost:
    name: str
    seconds: float | None
    what: str


@dataclass(frozen=True)
class Disk:
    """Bytes on the storage."""

    shards: int  # to download, the validation shard included; 0 if the data is not a published set
    data: int
    checkpoint: int  # one, weights and optimizer state: exact for our own optimizer
    checkpoints: int  # all that there are at a time, of all stages; modelled, for most are written by the clock
    rollouts: int

    @property
    def total(self) -> int:
        return self.data + self.checkpoints + self.rollouts


def shards_to_have(settings: SpeedrunSettings, plan: Plan, on_cpu: bool) -> int:
    name = settings.run.data or ("embedded" if on_cpu else "climbmix")
    if name not in PUBLISHED:
        return 0
    wanted = max(shards_needed(plan.total_tokens), tokenizer_shards(settings.tokenizer.max_chars))
    return min(settings.run.max_shards or wanted, PUBLISHED[name].n_shards - 1) + 1


def disk(settings: SpeedrunSettings, plan: Plan, shapes: Shapes, shards: int, costs: Iterable[StageCost]) -> Disk:
    seconds = {cost.name: cost.seconds or 0.0 for cost in costs}
    one, rl = checkpoint_bytes(shapes), settings.rl
    rollouts = rl_steps(settings) * rl.examples_per_step * rl.num_samples * rl.max_new_tokens * ROLLOUT_BYTES_PER_TOKEN
    return Disk(shards, shards * SHARD_BYTES, one, _most_checkpoints(settings, plan, seconds) * one, rollouts)


def _most_checkpoints(settings: SpeedrunSettings, plan: Plan, seconds: Mapping[str, float]) -> int:
    """Checkpoints of all stages, and one that is being written before another one goes. RL evaluates no bits per byte,
    so none of its checkpoints is kept as the best. Without known times each stage saves more than it keeps."""
    pre, sft, keep = settings.pretrain, settings.sft, settings.run.keep_checkpoints
    pretrain_s = seconds.get("pretrain", 0.0) + seconds.get("evaluations in it", 0.0)
    sft_steps = sft.num_iterations or SFT_TOKENS * sft.num_epochs // (sft.total_batch_size or plan.total_batch_size)
    saves_and_kept = (
        (_saves(plan.num_iterations, pre.save_every, pretrain_s), keep + 1),
        (_saves(sft_steps, sft.save_every, seconds.get("sft", 0.0)), keep + 1),
        (_saves(rl_steps(settings), settings.rl.save_every, seconds.get("rl", 0.0)), keep),
    )
    if not seconds:
        return sum(kept for _, kept in saves_and_kept) + 1
    return sum(min(pair) for pair in saves_and_kept) + any(saves > kept for saves, kept in saves_and_kept)


def _saves(steps: int, save_every: int | None, seconds: float) -> int:
    return 1 + (steps // save_every if save_every else int(seconds // SAVE_INTERVAL_S))


def checkpoint_bytes(shapes: Shapes) -> int:
    """Tensors of one checkpoint: all parameters, and the optimizer's state of all ranks."""
    state = sum(n_bytes(state_tensors(shard)) for shard in shapes.optimizer(1).shards)
    return shapes.gradient_bytes + state


def rl_steps(settings: SpeedrunSettings) -> int:
    rl = settings.rl
    return rl.num_iterations or -(-RL_PROMPTS * rl.num_epochs // rl.examples_per_step)


def stage_costs(
    settings: SpeedrunSettings, plan: Plan, ranks: int, flops: float | None, step_s: float | None,
    serve: Callable[[int, int], Serving], shards: int, on_cpu: bool,
) -> list[StageCost]:
    """In the order of the main job. `flops` is one rank's speed in training, `step_s` an optimizer step's time, `serve`
    gives an engine for streams of so many tokens, so many of them together."""
    if flops is None or step_s is None:
        return []
    flops_per_s = flops
    pre, sft, rl = settings.pretrain, settings.sft, settings.rl
    forward_flops = plan.flops_per_token / 3

    def reading(tokens: float) -> float:
        return tokens * forward_flops / (flops_per_s * ranks)

    def sampling(tokens: float, longest: int, rows: int) -> float:
        engine = serve(PROMPT_TOKENS + longest, rows)
        if engine.tok_per_s_all:
            return tokens / (engine.tok_per_s_all * DECODE_OF_BOUND * ranks)
        share = DECODE_OF_CPU if on_cpu else DECODE_OF_CPU / 10
        return tokens * decode_flops(plan.config, engine.context // 2) / (flops_per_s * share * ranks)

    start = START_S + (0 if on_cpu else COMPILE_S)
    evals = pre.eval_tokens * (2 + plan.num_iterations // pre.eval_every) if pre.eval_every else 0
    core_each = min(CORE_TASKS * pre.core_metric_max_per_task if pre.core_metric_max_per_task else CORE_ITEMS,
                    CORE_ITEMS)
    n_core = 1 + plan.num_iterations // pre.core_metric_every if pre.core_metric_every else 0
    core_s = reading(n_core * core_each * TOKENS_PER_CORE_ITEM)
    chars = settings.tokenizer.max_chars
    found = [StageCost("download", shards * SHARD_BYTES / DOWNLOAD_BYTES_PER_S,
                       f"{shards} shards at 100 MB/s, assumed; most of it beside the tokenizer")] if shards else []
    found.append(StageCost("tokenizer", chars / TOKENIZER_CHARS_PER_S, f"{chars:,} characters, at most"))
    found.append(StageCost("pretrain", plan.num_iterations * step_s + start, f"{plan.num_iterations:,} steps"))
    if evals or n_core:
        found.append(StageCost("evaluations in it", reading(evals) + core_s,
                               f"{evals:,} tokens, {n_core} times CORE if its bundle is there"))
    base = settings.base_eval
    base_tokens = 2 * base.split_tokens + (0 if on_cpu else CORE_ITEMS * TOKENS_PER_CORE_ITEM)
    found.append(StageCost("base_eval", START_S + reading(base_tokens), "bits per byte of two splits"
                           + ("" if on_cpu else ", CORE")))
    batch = sft.total_batch_size or plan.total_batch_size
    sft_tokens = sft.num_iterations * batch if sft.num_iterations else SFT_TOKENS * sft.num_epochs
    sft_s = sft_tokens / plan.total_batch_size * step_s + start
    found.append(StageCost("sft", sft_s, f"{sft_tokens:,} tokens"))
    asked = "held-out questions" if on_cpu else "the public tasks"
    chat_s = START_S
    if not on_cpu:
        chat_s += reading(CHAT_EVAL_TOKENS) + sampling(CHAT_EVAL_SAMPLED, settings.chat_eval.max_new_tokens, MAX_ROWS)
    found.append(StageCost("chat_eval", chat_s, asked))
    steps = rl_steps(settings)
    sampled = rl.examples_per_step * rl.num_samples * rl.max_new_tokens
    rows = min(rl.max_rows, rl.prompts_per_unit * rl.num_samples)
    trained_s = sampled * plan.flops_per_token / (flops_per_s * ranks)
    rl_s = steps * (sampling(sampled, rl.max_new_tokens, rows) + trained_s) + start
    found.append(StageCost("rl", rl_s, f"{steps:,} steps of {sampled:,} sampled tokens at most"))
    found.append(StageCost("chat_eval_rl", chat_s, f"{asked} once more"))
    return found


def total_s(costs: Iterable[StageCost]) -> float | None:
    """All stages one after the other; a download goes on beside the tokenizer, so the longer of the two counts."""
    by_name = {cost.name: cost.seconds or 0.0 for cost in costs}
    if not by_name:
        return None
    return sum(by_name.values()) - min(by_name.get("download", 0.0), by_name.get("tokenizer", 0.0))

"""Rewards of a unit's completions, all awaited together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from nanochat_ray.messages import Rollout, RolloutGroup, RolloutUnit, ScoredRollout
from nanochat_ray.tasks.rl_task import RLTask
from nanochat_ray.tasks.task import Conversation
from nanochat_ray.text.tokenizer import Tokenizer


def score_unit(
    task: RLTask, prompts: Sequence[Conversation], tokenizer: Tokenizer, unit: RolloutUnit,
    rollouts: Sequence[Sequence[Rollout]],
) -> tuple[RolloutGroup, ...]:  # fmt: skip
    """The groups of a unit. `prompts` are the task's of the unit's split. Blocks; runs an event loop of its own."""
    return asyncio.run(_score(task, prompts, tokenizer, unit, rollouts))


async def _score(
    task: RLTask, prompts: Sequence[Conversation], tokenizer: Tokenizer, unit: RolloutUnit,
    rollouts: Sequence[Sequence[Rollout]],
) -> tuple[RolloutGroup, ...]:  # fmt: skip
    groups = []
    for prompt, found in zip(unit.prompts, rollouts, strict=True):
        texts = [tokenizer.decode(rollout.token_ids) for rollout in found]
        rewards = await asyncio.gather(*(task.reward(prompts[prompt.index], text) for text in texts))
        scored = [
            ScoredRollout(sample, *with_terminal(rollout), rollout.finish_reason, text, (), float(reward))
            for sample, (rollout, text, reward) in enumerate(zip(found, texts, rewards, strict=True))
        ]
        groups.append(RolloutGroup(prompt, unit.version, tuple(scored)))
    return tuple(groups)


def with_terminal(rollout: Rollout) -> tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]:
    """Tokens, mask and log-probabilities of a rollout, the sampled token that ended it included."""
    assert rollout.logprobs is not None, "rollouts to learn from are sampled with log-probabilities"
    tokens, mask, logprobs = list(rollout.token_ids), list(rollout.mask), list(rollout.logprobs)
    if rollout.terminal_token is not None:
        assert rollout.terminal_logprob is not None
        tokens.append(rollout.terminal_token)
        mask.append(1)
        logprobs.append(rollout.terminal_logprob)
    return tuple(tokens), tuple(mask), tuple(logprobs)

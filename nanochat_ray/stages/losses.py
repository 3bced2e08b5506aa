"""The policy-gradient loss of RL: advantages of groups, rows to learn from, and the objective of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanochat_ray.config import RLSettings
from nanochat_ray.messages import RolloutGroup

LEAST_STD = 1e-6


def group_advantages(rewards: Tensor, zscore: bool = False) -> Tensor:
    """Reward over the mean of its group, for rewards (..., n) of n rollouts of one prompt each.

    There is no division by the standard deviation unless `zscore` asks for it: it would weigh up prompts that are
    nearly always or never solved (arXiv:2503.20783).
    """
    above = rewards - rewards[..., :1]  # equal rewards give 0: their mean may be rounded, and Muon scales noise up
    above = above - above.mean(dim=-1, keepdim=True)
    if not zscore:
        return above
    return above / (rewards.std(dim=-1, keepdim=True, correction=0) + LEAST_STD)


@dataclass(frozen=True)
class LearningRow:
    """One rollout to learn from."""

    token_ids: tuple[int, ...]  # prompt and completion
    mask: tuple[int, ...]  # of token_ids: 1 where the policy chose
    logprobs: tuple[float, ...]  # of token_ids under the weights that sampled; 0 where the mask is 0
    advantage: float


@dataclass(frozen=True)
class LearningStep:
    """What an optimizer step learns from."""

    rows: list[LearningRow]  # those with an advantage, the longest first
    n_targets: int  # tokens of all rollouts with a reward; those whose group taught nothing count too


def learning_step(groups: Sequence[RolloutGroup], zscore: bool = False) -> LearningStep:
    """The rows of a step's groups. A rollout without a reward is left out; so is a group with less than two others."""
    rows, n_targets = [], 0
    for group in groups:
        scored = [rollout for rollout in group.rollouts if rollout.reward is not None]
        if len(scored) < 2:
            continue
        rewards = torch.tensor([rollout.reward for rollout in scored], dtype=torch.float64)  # (n,)
        before = (0,) * len(group.prompt.token_ids)
        for rollout, advantage in zip(scored, group_advantages(rewards, zscore).tolist(), strict=True):
            n_targets += sum(rollout.mask)
            if advantage:
                ids, mask = group.prompt.token_ids + rollout.token_ids, before + rollout.mask
                rows.append(LearningRow(ids, mask, before + rollout.logprobs, advantage))
    return LearningStep(sorted(rows, key=lambda row: -len(row.token_ids)), n_targets)


def rollout_batch(
    sequences: Sequence[Sequence[int]], masks: Sequence[Sequence[int]], pad_id: int
) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T) int64 of token sequences, padded on the right to T + 1 tokens, the longest of them.

    A target is -1 where its token has mask 0 (prompt, tool output) and in the padding.
    """
    length = max(map(len, sequences))
    ids = torch.full((len(sequences), length), pad_id)  # (B, T+1)
    trained = torch.zeros(len(sequences), length, dtype=torch.bool)  # (B, T+1)
    for row, (sequence, mask) in enumerate(zip(sequences, masks, strict=True)):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        trained[row, : len(sequence)] = torch.tensor(mask, dtype=torch.bool)
    return ids[:, :-1], torch.where(trained, ids, -1)[:, 1:]


@dataclass(frozen=True)
class PolicyGradient:
    """The objective of one micro-batch: called with -log p (B, T) of its targets, it gives the sum to minimise."""

    targets: Tensor  # (B, T), -1 where there is none
    advantages: Tensor  # (B, 1)
    behaviour: Tensor  # (B, T), log-probabilities under the weights that sampled
    settings: RLSettings
    drift: list[Tensor] = field(default_factory=list)  # what `drift_sums` gave, once it was called

    def __call__(self, losses: Tensor) -> Tensor:
        self.drift.append(drift_sums(-losses.detach(), self.behaviour, self.targets, self.settings.ratio_cap))
        return policy_gradient_loss(
            -losses, self.advantages, self.targets, 1, behaviour=self.behaviour,
            ratio_cap=self.settings.ratio_cap if self.settings.async_steps else None, ppo_clip=self.settings.ppo_clip,
        )


def drift_sums(logprobs: Tensor, behaviour: Tensor, targets: Tensor, ratio_cap: float) -> Tensor:
    """How far the policy has moved from the weights that sampled, as sums over targets (4,).

    Their number, the ratios of the two probabilities, how many of these are above the cap, and minus the logarithms of
    the ratios (divided by the number: an estimate of the KL divergence).
    """
    log_ratio = (logprobs - behaviour)[targets >= 0]  # (n,)
    ratio = log_ratio.exp()
    return torch.stack([torch.ones_like(ratio).sum(), ratio.sum(), (ratio > ratio_cap).sum(), -log_ratio.sum()])


def micro_batch(
    rows: Sequence[LearningRow], pad_id: int, device: str, settings: RLSettings
) -> tuple[Tensor, Tensor, PolicyGradient]:
    """Inputs and targets (B, T) of these rows, and their objective."""
    inputs, targets = rollout_batch([row.token_ids for row in rows], [row.mask for row in rows], pad_id)
    behaviour = torch.zeros(targets.shape)  # (B, T)
    for k, row in enumerate(rows):
        behaviour[k, : len(row.logprobs) - 1] = torch.tensor(row.logprobs[1:])
    inputs, targets, behaviour = inputs.to(device), targets.to(device), behaviour.to(device)
    advantages = torch.tensor([[row.advantage] for row in rows], dtype=torch.float32, device=device)  # (B, 1)
    return inputs, targets, PolicyGradient(targets, advantages, behaviour, settings)


def policy_gradient_loss(
    logprobs: Tensor, advantages: Tensor, targets: Tensor, n_targets: int, *, behaviour: Tensor | None = None,
    ratio_cap: float | None = None, ppo_clip: float | None = None,
) -> Tensor:  # fmt: skip
    """REINFORCE: minus the advantage-weighted log-probability, summed over targets and divided by `n_targets`.

    logprobs (B, T), of each target under the policy being trained; advantages (B,), (B, 1) or (B, T); targets (B, T),
    -1 where there is none. With n_targets the count of the whole step, over all its micro-batches and ranks, a rollout
    weighs the same however the step is cut up.

    With `behaviour` (B, T), the log-probabilities under the weights that sampled: `ratio_cap` weighs each token by the
    ratio of the two probabilities, cut off at this value and without a gradient of its own (truncated importance
    sampling); `ppo_clip` is the clipped surrogate (arXiv:1707.06347) instead.
    """
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    gain = logprobs * advantages
    if ppo_clip is not None:
        assert behaviour is not None
        ratio = (logprobs - behaviour).exp()
        gain = torch.minimum(ratio * advantages, ratio.clamp(1 - ppo_clip, 1 + ppo_clip) * advantages)
    elif ratio_cap is not None:
        assert behaviour is not None
        gain = gain * (logprobs - behaviour).detach().exp().clamp(max=ratio_cap)
    return -torch.where(targets >= 0, gain, 0.0).sum() / max(n_targets, 1)

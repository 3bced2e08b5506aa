"""The policy-gradient loss of RL and the batch it is computed on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def group_advantages(rewards: Tensor) -> Tensor:
    """Reward over the mean of its group, for rewards (..., n) of n rollouts of one prompt each.

    There is no division by the standard deviation: it would weigh up prompts that are nearly always or never solved
    (arXiv:2503.20783).
    """
    return rewards - rewards.mean(dim=-1, keepdim=True)


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


def policy_gradient_loss(logprobs: Tensor, advantages: Tensor, targets: Tensor, n_targets: int) -> Tensor:
    """REINFORCE: minus the advantage-weighted log-probability, summed over targets and divided by `n_targets`.

    logprobs (B, T), of each target under the policy being trained; advantages (B,) or (B, T); targets (B, T), -1 where
    there is none. With n_targets the count of the whole step, over all its micro-batches and ranks, a rollout weighs
    the same however the step is cut up.
    """
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    weighted = torch.where(targets >= 0, logprobs * advantages, 0.0)
    return -weighted.sum() / max(n_targets, 1)

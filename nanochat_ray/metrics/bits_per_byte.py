"""Bits per byte: the loss per byte of text, comparable between tokenizers."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from nanochat_ray.model.gpt import GPT


@torch.no_grad()
def evaluate_bpb(model: GPT, batches: Iterable[tuple[Tensor, Tensor]], token_bytes: Tensor) -> tuple[float, int]:
    """Loss in nats and bytes of text, summed over all targets that have bytes.

    batches: (idx, targets), each (B, T). token_bytes (V,): bytes of each token id, 0 for special tokens. Targets of -1
    or of zero bytes count for nothing. Sums of several ranks add up; see `bits_per_byte`.
    """
    total_nats = torch.zeros((), dtype=torch.float64)
    total_bytes = 0
    for idx, targets in batches:
        losses = model(idx, targets, reduction="none")  # (B, T)
        n_bytes = torch.where(targets >= 0, token_bytes[targets.clamp(min=0)], 0)  # (B, T)
        total_nats += (losses.double() * (n_bytes > 0)).sum().cpu()
        total_bytes += int(n_bytes.sum())
    return total_nats.item(), total_bytes


def bits_per_byte(nats: float, total_bytes: int) -> float:
    """Bits per byte of a summed loss; infinite when there is no byte."""
    return nats / (math.log(2) * total_bytes) if total_bytes else math.inf

"""Windows, rotary position and causal attention, for whole rows and against a cache of earlier keys and values."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_ray.config import ModelConfig

SHORT_WINDOW_MULTIPLE = 128


class Cache(Protocol):
    """What a forward pass needs of a key and value cache; engine/kv_cache.py has the real one."""

    lengths: list[int]  # positions filled, per row
    prev_ids: Tensor  # (B,) int64, the last token id of each row; of no meaning where the length is 0

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, T, K, D) behind what each row has; returns all keys and values, (B, S, K, D), S the longest."""
        ...

    def advance(self, idx: Tensor) -> None:
        """Count the tokens idx (B, T) as stored, after the last layer has written."""
        ...


def windows_of(config: ModelConfig) -> list[int]:
    """Left window of each layer: how many earlier positions a query sees besides its own.

    L is the whole context, S a quarter of it rounded up to a multiple of 128. The last layer is always L.
    """
    short = -(-config.sequence_len // (4 * SHORT_WINDOW_MULTIPLE)) * SHORT_WINDOW_MULTIPLE
    letters = [config.window_pattern[i % len(config.window_pattern)] for i in range(config.n_layer - 1)] + ["L"]
    return [config.sequence_len if letter == "L" else short for letter in letters]


def rotary_tables(config: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position times frequency, each (positions, D/2) fp32 (RoPE, arXiv:2104.09864)."""
    half = config.head_dim // 2
    frequencies = config.rope_base ** (-torch.arange(half, dtype=torch.float32, device=device) / half)  # (D/2,)
    positions = torch.arange(config.rope_table_factor * config.sequence_len, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies)  # (positions, D/2)
    return angles.cos(), angles.sin()


def attend(q: Tensor, k: Tensor, v: Tensor, left: int) -> Tensor:
    """Causal attention over whole rows: q (B, T, H, D), k and v (B, T, K, D) -> (B, T, H, D)."""
    T = q.size(1)
    mask = None
    if 0 <= left < T - 1:
        distance = torch.arange(T, device=q.device)[:, None] - torch.arange(T, device=q.device)
        mask = (distance >= 0) & (distance <= left)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return y.transpose(1, 2)


def attend_cached(q: Tensor, k: Tensor, v: Tensor, left: int, lengths: list[int]) -> Tensor:
    """Causal attention of T new queries per row at positions lengths[row] on; k, v (B, S, K, D) include the new ones."""
    T, S = q.size(1), k.size(1)
    start = torch.tensor(lengths, device=q.device)
    p = start[:, None, None] + torch.arange(T, device=q.device)[:, None]  # (B, T, 1)
    distance = p - torch.arange(S, device=q.device)  # (B, T, S)
    mask = distance >= 0
    if left >= 0:
        mask &= distance <= left
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask[:, None], enable_gqa=True
    )
    return y.transpose(1, 2)

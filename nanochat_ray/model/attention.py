"""Windows, rotary position and causal attention, for whole rows and against a cache of earlier keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nanochat_ray.config import ModelConfig
from nanochat_ray.model.ops import wide_dtype

SHORT_WINDOW_MULTIPLE = 128
QUERY_BLOCK = 128  # queries per block of attention on a CPU


class Cache(Protocol):
    """Where new tokens stand, and the keys and values before them; engine/kv_cache.py has the real one."""

    positions: Tensor  # (B, T) int64, of each new token in its sequence
    previous: Tensor  # (B, T) int64, the token id before each new token; of no meaning at position 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the new keys and values k, v (B, T, K, D); attention of the queries q (B, T, H, D), of the same shape.

        Each query sees what its layer's window reaches of its own sequence.
        """
        ...


def windows_of(config: ModelConfig) -> list[int]:
    """Left window of each layer: how many earlier positions a query sees besides its own.

    L is the configured context, S a quarter of it rounded up to a multiple of 128. The last layer is always L. Rows
    longer than the context are possible, but no layer looks further back than that.
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
    """Causal attention over whole rows: q (B, T, H, D), k and v (B, T, K, D) -> (B, T, H, D).

    A query sees its own position and `left` earlier ones, all if `left` is negative. Query head h uses key head
    h // (H/K). Scores are scaled by 1/sqrt(D).
    """
    if left >= q.size(1) - 1:
        left = -1
    return BlockAttention.apply(q, k, v, left) if q.device.type == "cpu" else sdpa_attention(q, k, v, left)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, left: int) -> Tensor:
    """`attend` by torch's scaled_dot_product_attention: a flash kernel for full layers, one with a mask for windows."""
    T, group = q.size(1), q.size(2) // k.size(2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
    if left < 0:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1)
    else:
        if group > 1:  # the kernels that take a mask take no groups
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=_mask(T, T, left, 1, q))
    return y.transpose(1, 2)


def window_mask(n_queries: int, n_keys: int, left: int, group: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What to add to the scores of the last `n_queries` of `n_keys` positions: 0 where they may look, else -inf.

    (group * n_queries, n_keys), `group` copies over each other.
    """
    position = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
    return hide(position - torch.arange(n_keys, device=device), left, dtype).repeat(group, 1)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a mask first made during inference must also do for training
def _kept_mask(
    n_queries: int, n_keys: int, left: int, group: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    return window_mask(n_queries, n_keys, left, group, dtype, device)


def _mask(n_queries: int, n_keys: int, left: int, group: int, like: Tensor) -> Tensor:
    """`window_mask`, made only once; a compiled graph has its own."""
    make = window_mask if torch.compiler.is_compiling() else _kept_mask
    return make(n_queries, n_keys, left, group, like.dtype, like.device)


def hide(distance: Tensor, left: int, dtype: torch.dtype) -> Tensor:
    """0 where the distance from query back to key is in the window, else -inf; negative `left` is no window."""
    hidden = (distance < 0) | (distance > left) if left >= 0 else distance < 0
    return torch.zeros(distance.shape, dtype=dtype, device=distance.device).masked_fill_(hidden, float("-inf"))


class BlockAttention(Function):
    """Attention on a CPU: blocks of queries, each against the keys that its window reaches.

    Much faster than torch's own CPU kernel, which computes what a mask hides and all probabilities twice. Those are
    kept for the backward pass here.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, left: int) -> Tensor:
        K = k.size(2)
        keys, values = _by_kv_head(k), _by_kv_head(v)
        y = torch.empty_like(q)
        kept = []
        for rows, cols in _blocks(q.size(1), left):
            queries = _group(q[:, rows], K)
            p = _block_probabilities(queries, keys[:, cols], rows.stop - rows.start, left)
            _ungroup(torch.bmm(p, values[:, cols]), K, y[:, rows])
            if any(ctx.needs_input_grad):
                kept += [queries, p]
        ctx.left, ctx.K = left, K
        ctx.save_for_backward(keys, values, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        keys, values, *kept = ctx.saved_tensors
        dq = torch.empty_like(dy)
        dk, dv = (torch.zeros_like(keys, dtype=wide_dtype(dy.dtype)) for _ in "kv")
        blocks = _blocks(dy.size(1), ctx.left)
        for (rows, cols), queries, p in zip(blocks, kept[::2], kept[1::2], strict=True):
            dy_block = _group(dy[:, rows], ctx.K)
            dp = torch.bmm(dy_block, values[:, cols].transpose(1, 2))  # (B * K, G * rows, cols)
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            _ungroup(torch.bmm(ds, keys[:, cols]), ctx.K, dq[:, rows])
            dk[:, cols] += torch.bmm(ds.transpose(1, 2), queries)
            dv[:, cols] += torch.bmm(p.transpose(1, 2), dy_block)
        scale = dy.size(-1) ** -0.5
        return dq.mul_(scale), _as_rows(dk.mul_(scale), ctx.K, dy.dtype), _as_rows(dv, ctx.K, dy.dtype), None


def _blocks(T: int, left: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of query positions with the key positions that they see."""
    for first in range(0, T, QUERY_BLOCK):
        end = min(first + QUERY_BLOCK, T)
        yield slice(first, end), slice(max(0, first - left) if left >= 0 else 0, end)


def _block_probabilities(queries: Tensor, keys: Tensor, n_queries: int, left: int) -> Tensor:
    """Softmax of the masked scores: queries (B * K, G * n, D), keys (B * K, m, D) -> (B * K, G * n, m)."""
    group = queries.size(1) // n_queries
    mask = _mask(n_queries, keys.size(1), left, group, queries)
    scores = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=queries.size(-1) ** -0.5)
    return torch.softmax(scores, dim=-1)


def _by_kv_head(x: Tensor) -> Tensor:
    """(B, T, K, D) -> (B * K, T, D), contiguous."""
    return x.transpose(1, 2).reshape(-1, x.size(1), x.size(3))


def _as_rows(x: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """(B * K, T, D) -> (B, T, K, D), contiguous."""
    rows = x.view(-1, K, *x.shape[1:]).transpose(1, 2)
    return torch.empty(rows.shape, dtype=dtype, device=x.device).copy_(rows)


def _group(x: Tensor, K: int) -> Tensor:
    """(B, n, H, D) -> (B * K, G * n, D): the G = H/K query heads of a key head over each other."""
    B, n, H, D = x.shape
    return x.view(B, n, K, H // K, D).permute(0, 2, 3, 1, 4).reshape(B * K, -1, D)


def _ungroup(x: Tensor, K: int, out: Tensor) -> None:
    """Undo `_group` into out (B, n, H, D)."""
    B, n, H, D = out.shape
    out.view(B, n, K, H // K, D).copy_(x.view(B, K, H // K, n, D).permute(0, 3, 1, 2, 4))


def attend_stored(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of the queries q (R, T, H, D) over stored keys and values k, v (R, K, S, D): (R, T, H, D).

    `mask` (R, 1, T, S) is added to the scores, see `hide`.
    """
    if q.size(1) == 1 and q.device.type == "cpu" and q.dtype != torch.float32:
        return _attend_one(q, k, v, mask)  # torch's CPU kernel is slow for single queries in bf16
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=q.size(2) != k.size(1))
    return y.transpose(1, 2)


def _attend_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`attend_stored` for one query per row, q (R, 1, H, D)."""
    R, K, S, D = k.shape
    queries = q.reshape(R * K, -1, D)  # (R * K, G, D)
    scores = torch.bmm(k.view(R * K, S, D), queries.transpose(1, 2)).mul_(D**-0.5).transpose(1, 2)  # (R * K, G, S)
    scores.view(R, K, -1, S).add_(mask)
    return torch.bmm(torch.softmax(scores, dim=-1), v.view(R * K, S, D)).view(q.shape)

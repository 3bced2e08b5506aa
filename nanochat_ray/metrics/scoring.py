"""Logits of several continuations of one beginning, with the beginning read once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat_ray.engine.kv_cache import KVCache
from nanochat_ray.model.gpt import GPT

LOGITS_FRAC = 1 / 8  # of the tokens of a batch, at most, have their logits computed


@dataclass(frozen=True)
class Continuations:
    """A beginning and what may follow it. The beginning may be empty, a tail may not."""

    stem: list[int]
    tails: list[list[int]]

    @property
    def max_tail(self) -> int:
        return max(map(len, self.tails))

    @property
    def max_len(self) -> int:
        return len(self.stem) + self.max_tail


def batches(groups: Sequence[Continuations], max_rows: int, max_tokens: int) -> Iterator[list[int]]:
    """Positions of groups that go together, of similar length; a group beyond the limits is alone.

    A batch has at most `max_rows` tails, and `max_tokens` places when each is padded to the longest.
    """
    batch: list[int] = []
    rows = longest = longest_tail = 0
    for position in sorted(range(len(groups)), key=lambda k: groups[k].max_len):
        group = groups[position]
        new_rows = rows + len(group.tails)
        new_longest, new_tail = max(longest, group.max_len), max(longest_tail, group.max_tail)
        fits = new_rows <= max_rows and new_rows * max(new_longest, new_tail / LOGITS_FRAC) <= max_tokens
        if batch and not fits:
            yield batch
            batch, new_rows, new_longest, new_tail = [], len(group.tails), group.max_len, group.max_tail
        batch.append(position)
        rows, longest, longest_tail = new_rows, new_longest, new_tail
    if batch:
        yield batch


@torch.inference_mode()
def tail_logits(model: GPT, groups: Sequence[Continuations]) -> Tensor:
    """Logits (rows, S, V) fp32 at every position of every tail, in order of groups and tails; S is the longest tail.

    What stands behind a shorter tail's end has no meaning.
    """
    tails = [tail for group in groups for tail in group.tails]
    owner = [k for k, group in enumerate(groups) for _ in group.tails]
    lengths = [len(group.stem) for group in groups]
    capacity = max(lengths) + max(map(len, tails))
    cache = KVCache(model.config, len(groups), capacity, model.device, model.compute_dtype)
    if max(lengths):
        model(_padded([group.stem for group in groups], model.device), cache=cache, last_only=True)
        # What the padding left in the cache lies behind the row's end, where it is overwritten or never looked at.
        cache.lengths = lengths
        last = [group.stem[-1] if group.stem else 0 for group in groups]
        cache.prev_ids = torch.tensor(last, device=model.device)  # (groups,)
    if len(tails) > len(groups):
        cache = cache.select(owner)
    return model(_padded(tails, model.device), cache=cache)


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(B, T) int64, filled up on the right with zeros."""
    tensors = [torch.tensor(list(row), dtype=torch.int64) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(device)

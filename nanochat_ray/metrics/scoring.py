"""Logits of several continuations of one beginning, with the beginning read once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat_ray.engine.kv_cache import KVCache, Row
from nanochat_ray.model.gpt import GPT

LOGITS_FRAC = 1 / 8  # of the tokens of a batch, at most, have their logits computed
BLOCK_SIZE = 16  # positions; beginnings are shared in whole blocks


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
    shared = [len(group.stem) // BLOCK_SIZE * BLOCK_SIZE for group in groups]
    rests = [group.stem[n:] for group, n in zip(groups, shared, strict=True)]
    tails = [rest + tail for group, rest in zip(groups, rests, strict=True) for tail in group.tails]
    T = max(map(len, tails))
    n_blocks = len(groups) * max(shared) // BLOCK_SIZE + len(tails) * -(-T // BLOCK_SIZE)
    n_pages, n_rows = model.config.n_layer * n_blocks, len(groups) + len(tails)
    cache = KVCache(
        model.config, n_pages, n_rows, max(shared) + T, BLOCK_SIZE, model.device, model.compute_dtype
    )
    stems = [cache.open() for _ in groups]
    if max(shared):
        nothing = torch.empty(len(groups), 0, dtype=torch.int64)
        _forward(model, cache, stems, [group.stem[:n] for group, n in zip(groups, shared, strict=True)], nothing)
        for stem, group, n in zip(stems, groups, shared, strict=True):  # what the padding left is given up
            cache.trim(stem, n)
            stem.last = group.stem[n - 1] if n else 0
    rows = [cache.fork(stem) for stem, group in zip(stems, groups, strict=True) for _ in group.tails]
    longest = max(group.max_tail for group in groups)
    begins = torch.tensor([len(rest) for group, rest in zip(groups, rests, strict=True) for _ in group.tails])
    return _forward(model, cache, rows, tails, (begins[:, None] + torch.arange(longest)).clamp(max=T - 1))


def _forward(
    model: GPT, cache: KVCache, rows: Sequence[Row], tokens: Sequence[list[int]], offsets: Tensor
) -> Tensor:
    """Put tokens, filled up on the right with zeros to the same number, behind each row.

    Logits (rows, S, V) at `offsets` (rows, S) from where each row's new tokens begin.
    """
    T = max(map(len, tokens))
    for row in rows:
        cache.extend(row, row.n + T)
    step = cache.step([(row, new + [0] * (T - len(new))) for row, new in zip(rows, tokens, strict=True)])
    places = torch.tensor(step.order).argsort()[:, None] * T + offsets  # (rows, S)
    logits = model(step.idx, cache=step, at=places.flatten().to(model.device))
    step.done()
    return logits.unflatten(0, offsets.shape)

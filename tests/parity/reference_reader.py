"""The golden runs' rank-strided readers, which the product does not have: it has one reader. They drive its packer."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np

from nanochat_ray.text.packing import BestFit


def strided_slices(
    shards: list[list[list[np.ndarray]]], read_batch: int, rank: int, world: int, resume: list[int] | None, state: list
) -> Iterator[list[np.ndarray]]:
    """Slices of the row groups rank, rank + world, ... of each shard, without end; `state` is what was read last.

    `state` and `resume` are [shard, group, epoch]; reading goes on behind that row group (whole rounds of ranks).
    """
    first_shard, first_epoch, first_group = 0, 1, rank
    if resume is not None:
        first_shard, group, first_epoch = resume
        first_group = (group // world + 1) * world + rank
        if first_group >= len(shards[first_shard]):
            first_shard, first_group = first_shard + 1, rank
    for epoch in count(first_epoch):
        for shard in range(first_shard, len(shards)):
            for group in range(first_group, len(shards[shard]), world):
                for start in range(0, len(shards[shard][group]), read_batch):
                    state[:] = [shard, group, epoch]
                    yield shards[shard][group][start : start + read_batch]
            first_group = rank
        first_shard = 0


def wrapped_rows(
    lengths: list[int], capacity: int, buffer_size: int, rank: int, world: int
) -> Iterator[tuple[list[tuple[int, int]], int, int]]:
    """Rows of (conversation, length), placed so far and epoch: conversations rank, rank + world, ... without end."""
    best: BestFit[tuple[int, int]] = BestFit()
    at, epoch, consumed = rank, 1, rank
    while True:
        row: list[tuple[int, int]] = []
        while True:
            while len(best) < buffer_size:
                best.add(lengths[at], (at, lengths[at]))
                at += world
                if at >= len(lengths):
                    at, epoch = at % len(lengths), epoch + 1
            placed = best.pop_longest_fitting(capacity - sum(length for _, length in row))
            if placed is None:
                break
            row.append(placed)
            consumed += world
        yield row, consumed, epoch

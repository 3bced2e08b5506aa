"""Work items and their order: numbers only, no reading.

The order of an epoch is a pure function of (seed, epoch), so any process can continue the stream from a cursor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import numpy as np

from nanochat_ray.messages import Cursor, PackedRows
from nanochat_ray.text.packing import RowBlock

INDEX_ITEM_SIZE = 1024  # mixture indices per SFT item, as many as documents in a row group of the published shards


@dataclass(frozen=True)
class WorkItem:
    """One row group of one training shard."""

    shard: int  # place in the manifest's list
    row_group: int


@dataclass(frozen=True)
class IndexItem:
    """The mixture's indices start, start + 1, ..., stop - 1."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class Visit(NamedTuple):
    """One item at its place in the stream."""

    epoch: int
    position: int  # in the epoch's order; what Cursor.item counts
    item: int  # which item that is
    start_frac: float  # share of the epoch's documents that come before it
    stop_frac: float  # the same with it


def index_items(n: int, size: int = INDEX_ITEM_SIZE) -> list[IndexItem]:
    """A mixture of `n` conversations as items of `size` consecutive indices; the last may be shorter."""
    return [IndexItem(start, min(start + size, n)) for start in range(0, n, size)]


def item_order(n_items: int, seed: int, epoch: int) -> np.ndarray:
    """The items in the order of an epoch: a permutation that depends on nothing but the arguments."""
    return np.random.default_rng([seed % 2**64, epoch % 2**64]).permutation(n_items)  # (n_items,)


def items_from(cursor: Cursor, sizes: int | Sequence[int], seed: int, epochs: int | None = None) -> Iterator[Visit]:
    """The items from the cursor's on, over epochs 0, 1, ... `epochs` - 1, or without end when that is None.

    `sizes` is the number of items, or the number of documents in each, which makes the shares exact. ValueError when
    there are no documents, or when the cursor is no place among these items.
    """
    weights = None if isinstance(sizes, int) else np.asarray(sizes, dtype=np.int64)
    n_items = sizes if isinstance(sizes, int) else len(sizes)
    total = n_items if weights is None else int(weights.sum())
    if total <= 0:
        raise ValueError(f"no documents in {n_items} work items: there is nothing to train on")
    if cursor.item > n_items or min(cursor.epoch, cursor.item, cursor.row) < 0:
        raise ValueError(f"{cursor} is no place in {n_items} work items: the checkpoint belongs to other data")
    first = cursor.item
    for epoch in count(cursor.epoch):
        if epochs is not None and epoch >= epochs:
            return
        order = item_order(n_items, seed, epoch).astype(np.int32)  # the largest thing that grows with the data
        done = first if weights is None else int(weights[order[:first]].sum())
        for position in range(first, n_items):
            item = int(order[position])
            before, done = done, done + (1 if weights is None else int(weights[item]))
            yield Visit(epoch, position, item, before / total, done / total)
        first = 0


def row_block(rows: PackedRows, visit: Visit, first_row: int = 0) -> RowBlock:
    """The packed rows of an item, from row `first_row` on, as a block of the stream.

    ValueError if the item has fewer rows than that: it was packed from other documents or with other settings.
    """
    n = len(rows)
    if first_row > n:
        raise ValueError(
            f"item {visit.position} of epoch {visit.epoch} has {n} rows, the checkpoint is behind {first_row} of it: "
            "the data, the tokenizer or the row length is not the one that it was written with"
        )
    consumed = np.arange(1, n + 1) if rows.consumed is None else rows.consumed
    done = consumed / max(consumed[-1], 1) if n else np.zeros(0)  # (n,) share of the item
    progress = visit.epoch + visit.start_frac * (1 - done) + visit.stop_frac * done  # (n,)
    mask = None if rows.mask is None else rows.mask[first_row:]
    kept = PackedRows(rows.tokens[first_row:], mask)
    cursor = Cursor(visit.epoch, visit.position, first_row)
    return RowBlock(kept, cursor, progress[first_row:], rows.counts, n)

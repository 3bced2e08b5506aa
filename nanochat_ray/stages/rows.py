"""Where a training stage's rows come from: numbered work items, each packed on its own, in one order for everybody."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from nanochat_ray.corpus.items import INDEX_ITEM_SIZE, Visit, index_items, items_from, row_block
from nanochat_ray.corpus.reader import DataManifest, Packing, pack_item
from nanochat_ray.messages import Cursor, PackedRows
from nanochat_ray.tasks.catalog import Split, parse_mixture
from nanochat_ray.tasks.rows import TaskSources
from nanochat_ray.tasks.task import Mixture
from nanochat_ray.text.conversation import render
from nanochat_ray.text.packing import RowBlock, pack_conversations
from nanochat_ray.text.tokenizer import Tokenizer, token_dtype


class RowSource(Protocol):
    """Numbered work items. It crosses to other processes, so it holds names and loads what they name on first use."""

    @property
    def seed(self) -> int: ...

    @property
    def epochs(self) -> int | None:
        """Passes over the items; None is without end."""
        ...

    @property
    def n_items(self) -> int: ...

    def sizes(self) -> int | Sequence[int]:
        """The documents of each item, for its share of an epoch; the number of items where all count the same."""
        ...

    def pack(self, item: int) -> PackedRows:
        """The rows of an item: a pure function of this source and the number."""
        ...


@functools.lru_cache(maxsize=4)
def _tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@functools.lru_cache(maxsize=4)
def _mixture(specs: tuple[str, ...], split: Split, sources: TaskSources) -> Mixture:
    return parse_mixture(specs, split, sources)


@dataclass(frozen=True)
class CorpusRows:
    """Rows of pretraining text; an item is one row group of one data shard."""

    manifest: DataManifest
    tokenizer_folder: Path
    sequence_len: int
    seed: int
    epochs: int | None = None
    packing: Packing = "best-fit"

    @property
    def n_items(self) -> int:
        return self.manifest.n_items

    def sizes(self) -> int:
        return self.n_items

    def pack(self, item: int) -> PackedRows:
        tokenizer = _tokenizer(self.tokenizer_folder)
        return pack_item(self.manifest, self.manifest.item(item), tokenizer, self.sequence_len, self.packing)


@dataclass(frozen=True)
class MixtureRows:
    """Rows of conversations; an item is 1,024 consecutive places of the mixture."""

    specs: tuple[str, ...]
    split: Split
    sources: TaskSources
    tokenizer_folder: Path
    sequence_len: int
    seed: int
    epochs: int | None = 1

    @property
    def n_items(self) -> int:
        return len(self.sizes())

    def sizes(self) -> list[int]:
        return [len(item) for item in index_items(len(_mixture(self.specs, self.split, self.sources)))]

    def pack(self, item: int) -> PackedRows:
        tokenizer = _tokenizer(self.tokenizer_folder)
        mixture = _mixture(self.specs, self.split, self.sources)
        capacity, first = self.sequence_len + 1, item * INDEX_ITEM_SIZE
        places = range(first, min(first + INDEX_ITEM_SIZE, len(mixture)))
        rendered = (render(tokenizer, mixture[i], max_tokens=capacity) for i in places)
        return pack_conversations(rendered, capacity, tokenizer.bos_id, token_dtype(tokenizer.vocab_size))

    def first_rows(self, n: int) -> PackedRows:
        """The first `n` rows in the mixture's own order, fewer if there are no more: the fixed set of validation."""
        parts: list[PackedRows] = []
        for item in range(self.n_items):
            if sum(map(len, parts)) < n:
                parts.append(self.pack(item))
        masks = [part.mask for part in parts if part.mask is not None]
        return PackedRows(np.concatenate([part.tokens for part in parts])[:n], np.concatenate(masks)[:n])


def visits_from(source: RowSource, cursor: Cursor) -> Iterator[Visit]:
    """The items to pack from the cursor on, in the order of the stream."""
    return items_from(cursor, source.sizes(), source.seed, source.epochs)


def row_blocks(packed: Iterable[tuple[Visit, PackedRows]], cursor: Cursor, n_items: int) -> Iterator[RowBlock]:
    """The stream of rows from items packed in the order of `visits_from`, begun at the cursor's row.

    Raises ValueError when as many items as an epoch has give no row: each holds too few documents for one. An item
    without rows is an empty block, which carries its counts.
    """
    barren = 0
    for visit, rows in packed:
        barren = 0 if len(rows) else barren + 1
        if barren >= n_items:
            raise ValueError(
                f"none of the {n_items} work items fills a row; write larger row groups or shorten --max-seq-len"
            )
        resumed = (visit.epoch, visit.position) == (cursor.epoch, cursor.item)
        yield row_block(rows, visit, cursor.row if resumed else 0)


def plain_row_blocks(source: RowSource, cursor: Cursor) -> Iterator[RowBlock]:
    """The stream of rows, packed in this process."""
    packed = ((visit, source.pack(visit.item)) for visit in visits_from(source, cursor))
    return row_blocks(packed, cursor, source.n_items)

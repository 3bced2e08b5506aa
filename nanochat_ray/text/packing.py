"""Documents into rows of T+1 tokens without padding, conversations into padded rows, and rows into optimizer steps.

All packers but `pack_stream` share one best-fit structure. Training items are packed statelessly, each on its own, so
that the stream of rows does not depend on who packs them; `reference_rows` is the buffered loader of validation.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import DTypeLike

from nanochat_ray.messages import Cursor, PackCounts, PackedBatch, PackedRows

Item = TypeVar("Item")
Tokens = Sequence[int] | np.ndarray


class BestFit(Generic[Item]):
    """Items waiting for a place, in order of length; among equal lengths the one added first comes first.

    Every search is a bisection.
    """

    def __init__(self) -> None:
        self._keys: list[tuple[int, int]] = []  # (length, -number): the last of equal lengths is the one added first
        self._items: dict[int, Item] = {}
        self._added = 0

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, length: int, item: Item) -> None:
        insort(self._keys, (length, -self._added))
        self._items[self._added] = item
        self._added += 1

    def pop_longest_fitting(self, room: int) -> Item | None:
        """Take out the longest item of at most `room`; None if there is none."""
        fitting = self._count_fitting(room)
        return self._pop(fitting - 1) if fitting else None

    def pop_shortest(self) -> Item:
        """Take out the shortest item."""
        return self._pop(self._count_fitting(self._keys[0][0]) - 1)

    def pop_least_waste(self, room: int) -> Item:
        """Take out the item that should come next into `room` when an item that is too long is cut to it.

        That is the longest that fits, unless the gap behind it would have to be filled by cutting more off the
        shortest item than cutting the next longer item to `room` right now costs.
        """
        fitting = self._count_fitting(room)
        if fitting == 0:
            return self.pop_shortest()
        if fitting == len(self._keys):
            return self._pop(fitting - 1)
        gap = room - self._keys[fitting - 1][0]
        shortest = self._keys[0][0]
        cut_later = shortest - gap if 0 < gap < shortest else 0
        longer = self._keys[fitting][0]
        return self._pop(self._count_fitting(longer) - 1 if longer - room < cut_later else fitting - 1)

    def _count_fitting(self, room: int) -> int:
        return bisect_right(self._keys, (room, 1))

    def _pop(self, index: int) -> Item:
        return self._items.pop(-self._keys.pop(index)[1])


def pack_documents(documents: Sequence[np.ndarray], row_capacity: int) -> PackedRows:
    """Pack one training item: whole documents where they fit, cut where a row must be filled, no padding.

    `documents` begin with BOS; every row holds `row_capacity` tokens and begins with BOS. What fills no row is left
    over, and so is what lies beyond the first row of a longer document. The rows are then shuffled, by their number
    alone, because rows of long documents come first.
    """
    best: BestFit[np.ndarray] = BestFit()
    left = empty = overlong = read = 0
    for document in documents:
        read += len(document)
        if len(document) == 1:
            empty += 1
            continue
        overlong += len(document) > row_capacity
        usable = document[:row_capacity]
        left += len(usable)
        best.add(len(usable), usable)
    beyond = read - empty - left
    rows = np.empty((left // row_capacity, row_capacity), dtype=_dtype(documents))  # (n, T+1)
    placed = np.zeros(len(rows), dtype=np.int32)  # (n,) documents per row
    n_rows = 0
    while left >= row_capacity:
        end = 0
        while end < row_capacity:
            document = best.pop_least_waste(row_capacity - end)
            left -= len(document)
            piece = document[: row_capacity - end]
            rows[n_rows, end : end + len(piece)] = piece
            end += len(piece)
            placed[n_rows] += 1
        n_rows += 1
    order = _shuffled(n_rows)
    counts = PackCounts(len(documents), empty, overlong, read, n_rows * row_capacity, beyond, int(n_rows == 0))
    return PackedRows(rows[order], consumed=placed[order].cumsum(dtype=np.int32), counts=counts)


def pack_stream(documents: Sequence[np.ndarray], row_capacity: int) -> PackedRows:
    """Pack one training item as one stream of tokens, its documents one after another, cut into rows of T+1.

    A row's last token is the next row's first one, so that each token behind the stream's first is a target exactly
    once; only what is too short for a last row, less than T tokens an item, is left over. Rows begin anywhere. They
    are shuffled, by their number alone: in order, a long document would fill whole steps by itself.
    """
    texts = [document for document in documents if len(document) > 1]
    read = sum(map(len, documents))
    stream = np.concatenate(texts) if texts else np.empty(0, dtype=_dtype(documents))  # (tokens,)
    n_targets = row_capacity - 1
    n_rows = max(0, len(stream) - 1) // n_targets
    rows = np.empty((0, row_capacity), dtype=stream.dtype)
    if n_rows:
        rows = sliding_window_view(stream, row_capacity)[::n_targets][_shuffled(n_rows)]  # (n, T+1)
    used = n_rows * n_targets + (n_rows > 0)
    overlong = sum(len(document) > row_capacity for document in texts)
    empty = len(documents) - len(texts)
    return PackedRows(rows, counts=PackCounts(len(documents), empty, overlong, read, used, 0, int(n_rows == 0)))


def _dtype(documents: Sequence[np.ndarray]) -> np.dtype:
    return documents[0].dtype if documents else np.dtype(np.uint16)


def _shuffled(n_rows: int) -> np.ndarray:
    return np.random.default_rng(n_rows).permutation(n_rows)  # (n,)


def reference_rows(
    slices: Iterable[Sequence[np.ndarray]], row_capacity: int, buffer_size: int = 1000
) -> Iterator[np.ndarray]:
    """Rows of `row_capacity` tokens from a buffer of documents: nanochat's loader, kept for validation.

    Before every placement the buffer takes whole slices until it holds `buffer_size` documents. The longest that fits
    goes in; if none fits, the shortest is cut to fill the row and the rest of it is lost. A last row that cannot be
    filled, once `slices` has ended, is not given.
    """
    source = iter(slices)
    best: BestFit[np.ndarray] = BestFit()
    while True:
        pieces: list[np.ndarray] = []
        room = row_capacity
        while room:
            while len(best) < buffer_size:
                documents = next(source, None)
                if documents is None:
                    break
                for document in documents:
                    best.add(len(document), document)
            if not len(best):
                return
            piece = best.pop_longest_fitting(room)
            if piece is None:
                piece = best.pop_shortest()[:room]
            pieces.append(piece)
            room -= len(piece)
        yield np.concatenate(pieces)  # (T+1,)


def pack_conversations(
    items: Iterable[tuple[Tokens, Tokens]],
    row_capacity: int,
    pad_id: int,
    dtype: DTypeLike = np.uint16,
    buffer_size: int = 100,
) -> PackedRows:
    """Pack the rendered conversations (ids, mask) of one SFT item; nothing is cut, what stays free is padding.

    A buffer of `buffer_size` is refilled in order before every placement and emptied at the end. The mask is False on
    padding. A row that trains nothing is left out, but counts in `consumed`. ValueError for a conversation longer than
    a row (it would wait for ever): render with `max_tokens=row_capacity`. Padding is no waste in the counts.
    """
    source = iter(items)
    best: BestFit[tuple[Tokens, Tokens]] = BestFit()
    tokens: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    consumed: list[int] = []
    done = read = used = 0
    while True:
        row = np.full(row_capacity, pad_id, dtype=dtype)  # (T+1,)
        mask = np.zeros(row_capacity, dtype=bool)  # (T+1,)
        end = 0
        while True:
            while len(best) < buffer_size and (item := next(source, None)) is not None:
                length = len(item[0])
                if length > row_capacity:
                    raise ValueError(f"a conversation of {length} tokens does not fit a row of {row_capacity}")
                best.add(length, item)
            fitting = best.pop_longest_fitting(row_capacity - end)
            if fitting is None:
                break
            length = len(fitting[0])
            row[end : end + length] = fitting[0]
            mask[end : end + length] = fitting[1]
            end += length
            done += 1
        if end == 0:
            break
        read += end
        if mask[1:].any():
            used += end
            tokens.append(row)
            masks.append(mask)
            consumed.append(done)
    if consumed:
        consumed[-1] = done
    shape = (len(tokens), row_capacity)
    return PackedRows(
        np.array(tokens, dtype=dtype).reshape(shape),
        np.array(masks, dtype=bool).reshape(shape),
        np.array(consumed, dtype=np.int32),
        PackCounts(documents=done, tokens_read=read, tokens_used=used, barren_items=int(not tokens)),
    )


# ---- from rows to steps


@dataclass(frozen=True)
class RowBlock:
    """Consecutive rows of one work item, in the order of the global stream."""

    rows: PackedRows
    cursor: Cursor  # of the first of them
    progress: np.ndarray  # (n,) float64: epochs done after each row, with the share of the running one
    item_counts: PackCounts = field(default_factory=PackCounts)
    item_rows: int = 0  # rows of the whole item

    @property
    def counts(self) -> PackCounts:
        """The part of the item's counts that these rows stand for."""
        return self.item_counts.share(self.cursor.row, self.cursor.row + len(self.rows), self.item_rows)


@dataclass(frozen=True)
class Step:
    """The rows of one optimizer step."""

    rows: PackedRows
    cursor: Cursor  # where the stream goes on after them
    progress: float
    counts: PackCounts  # of its rows, and of items without rows before them

    def batch(self, number: int, rank: int, world_size: int) -> PackedBatch:
        """What one rank trains on of this step, which is number `number` of the stage."""
        part = rank_part(len(self.rows), rank, world_size)
        mask = None if self.rows.mask is None else self.rows.mask[part]
        return PackedBatch(number, self.rows.tokens[part], mask, self.cursor, self.progress, self.counts)


def cut_steps(blocks: Iterable[RowBlock], rows_per_step: int) -> Iterator[Step]:
    """Cut the ordered stream of rows into steps of `rows_per_step`; the last step of a finite stream may be shorter.

    How the stream is cut into blocks makes no difference. A step's cursor is the place behind its last row, also where
    an item ends: a stream started there drops that whole item and goes on with the next.
    """
    pending: list[RowBlock] = []
    n_rows = 0
    for block in blocks:
        if not len(block.rows):
            pending.append(block)  # its counts go to the next step
        while len(block.rows):
            taken, block = _split(block, rows_per_step - n_rows)
            pending.append(taken)
            n_rows += len(taken.rows)
            if n_rows == rows_per_step:
                yield _step(pending)
                pending, n_rows = [], 0
    if n_rows:
        yield _step(pending)


def step_batches(
    blocks: Iterable[RowBlock], rows_per_step: int, rank: int = 0, world_size: int = 1, start_step: int = 0
) -> Iterator[PackedBatch]:
    """What one rank trains on, step by step: its part of every step that `cut_steps` makes."""
    for number, step in enumerate(cut_steps(blocks, rows_per_step), start_step):
        yield step.batch(number, rank, world_size)


def rank_part(n_rows: int, rank: int, world_size: int) -> slice:
    """The rows of a step that `rank` gets: consecutive, and ranks differ by at most one."""
    each, extra = divmod(n_rows, world_size)
    start = rank * each + min(rank, extra)
    return slice(start, start + each + (rank < extra))


def _split(block: RowBlock, n_rows: int) -> tuple[RowBlock, RowBlock]:
    rows, at = block.rows, block.cursor

    def half(part: slice, first_row: int) -> RowBlock:
        kept = PackedRows(rows.tokens[part], None if rows.mask is None else rows.mask[part])
        cursor = Cursor(at.epoch, at.item, first_row)
        return RowBlock(kept, cursor, block.progress[part], block.item_counts, block.item_rows)

    return half(slice(n_rows), at.row), half(slice(n_rows, None), at.row + n_rows)


def _step(pending: list[RowBlock]) -> Step:
    blocks = [block for block in pending if len(block.rows)]
    tokens = np.concatenate([block.rows.tokens for block in blocks])  # (G, T+1)
    masks = [block.rows.mask for block in blocks if block.rows.mask is not None]
    last = blocks[-1]
    after = Cursor(last.cursor.epoch, last.cursor.item, last.cursor.row + len(last.rows))
    counts = sum((block.counts for block in pending), PackCounts())
    rows = PackedRows(tokens, np.concatenate(masks) if masks else None)
    return Step(rows, after, float(last.progress[-1]), counts)

"""Documents into rows of T+1 tokens without padding, conversations into padded rows, and rows into optimizer steps.

All three packers share one best-fit structure. Training items are packed statelessly, each on its own, so that the
stream of rows does not depend on who packs them; `reference_rows` is the buffered loader of validation.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from nanochat_ray.messages import Cursor, PackedBatch, PackedRows

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


@dataclass(frozen=True)
class PackCounts:
    """What packing made of its documents. Tokens include each document's BOS."""

    documents: int = 0
    empty: int = 0  # documents without text: never trained on
    overlong: int = 0  # documents longer than a row: the first row of each is used
    tokens_read: int = 0
    tokens_used: int = 0  # in rows
    tokens_beyond_row: int = 0  # of overlong documents, beyond their first row

    def __add__(self, other: PackCounts) -> PackCounts:
        return PackCounts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def waste_frac(self) -> float:
        """Share of the tokens read that is not trained on."""
        return 1 - self.tokens_used / max(self.tokens_read, 1)

    @property
    def floor_frac(self) -> float:
        """The part of the waste that documents longer than a row impose on any packer."""
        return self.tokens_beyond_row / max(self.tokens_read, 1)


def pack_documents(documents: Sequence[np.ndarray], row_capacity: int) -> tuple[PackedRows, PackCounts]:
    """Pack one training item: whole documents where they fit, cut where a row must be filled, no padding.

    `documents` begin with BOS; every row holds `row_capacity` tokens and begins with BOS. What fills no row is left
    over. The rows are then shuffled, by their number alone, because rows of long documents come first.
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
    dtype = documents[0].dtype if documents else np.dtype(np.uint16)
    rows = np.empty((left // row_capacity, row_capacity), dtype=dtype)  # (n, T+1)
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
    order = np.random.default_rng(n_rows).permutation(n_rows)
    packed = PackedRows(rows[order], consumed=placed[order].cumsum(dtype=np.int32))
    return packed, PackCounts(len(documents), empty, overlong, read, n_rows * row_capacity, beyond)


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
    a row (it would wait for ever): render with `max_tokens=row_capacity`.
    """
    source = iter(items)
    best: BestFit[tuple[Tokens, Tokens]] = BestFit()
    tokens: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    consumed: list[int] = []
    done = 0
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
        if mask[1:].any():
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
    )


# ---- from rows to steps


@dataclass(frozen=True)
class RowBlock:
    """Consecutive rows of one work item, in the order of the global stream."""

    rows: PackedRows
    cursor: Cursor  # of the first of them
    progress: np.ndarray  # (n,) float64: epochs done after each row, with the share of the running one


@dataclass(frozen=True)
class Step:
    """The rows of one optimizer step."""

    rows: PackedRows
    cursor: Cursor  # where the stream goes on after them
    progress: float


def cut_steps(blocks: Iterable[RowBlock], rows_per_step: int) -> Iterator[Step]:
    """Cut the ordered stream of rows into steps of `rows_per_step`; the last step of a finite stream may be shorter.

    How the stream is cut into blocks makes no difference. A step's cursor is the place behind its last row, also where
    an item ends: a stream started there drops that whole item and goes on with the next.
    """
    pending: list[RowBlock] = []
    count = 0
    for block in blocks:
        while len(block.rows):
            taken, block = _split(block, rows_per_step - count)
            pending.append(taken)
            count += len(taken.rows)
            if count == rows_per_step:
                yield _step(pending)
                pending, count = [], 0
    if pending:
        yield _step(pending)


def step_batches(
    blocks: Iterable[RowBlock], rows_per_step: int, rank: int = 0, world_size: int = 1, start_step: int = 0
) -> Iterator[PackedBatch]:
    """What one rank trains on, step by step: its part of every step that `cut_steps` makes."""
    for number, step in enumerate(cut_steps(blocks, rows_per_step), start_step):
        part = rank_part(len(step.rows), rank, world_size)
        mask = None if step.rows.mask is None else step.rows.mask[part]
        yield PackedBatch(number, step.rows.tokens[part], mask, step.cursor, step.progress)


def rank_part(n_rows: int, rank: int, world_size: int) -> slice:
    """The rows of a step that `rank` gets: consecutive, and ranks differ by at most one."""
    each, extra = divmod(n_rows, world_size)
    start = rank * each + min(rank, extra)
    return slice(start, start + each + (rank < extra))


def _split(block: RowBlock, n_rows: int) -> tuple[RowBlock, RowBlock]:
    rows, at = block.rows, block.cursor

    def half(part: slice, first_row: int) -> RowBlock:
        kept = PackedRows(rows.tokens[part], None if rows.mask is None else rows.mask[part])
        return RowBlock(kept, Cursor(at.epoch, at.item, first_row), block.progress[part])

    return half(slice(n_rows), at.row), half(slice(n_rows, None), at.row + n_rows)


def _step(blocks: list[RowBlock]) -> Step:
    tokens = np.concatenate([block.rows.tokens for block in blocks])  # (G, T+1)
    masks = [block.rows.mask for block in blocks if block.rows.mask is not None]
    last = blocks[-1]
    after = Cursor(last.cursor.epoch, last.cursor.item, last.cursor.row + len(last.rows))
    return Step(PackedRows(tokens, np.concatenate(masks) if masks else None), after, float(last.progress[-1]))

"""Keys and values of all computed positions, in pages that sequences share; and one forward pass over them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nanochat_ray.config import ModelConfig
from nanochat_ray.engine.blocks import Block, BlockPool, Node, first_block, publish
from nanochat_ray.model.attention import attend, attend_stored, hide, windows_of

PADDED_POSITIONS = 256  # a padded step reads at least so many of each row


@dataclass(eq=False)
class Row:
    """One sequence's place in the cache: `n` positions are computed, the last of them is of the token `last`."""

    slot: int
    n: int = 0
    last: int = 0
    first: list[int] = field(default_factory=list)  # by kind: number of the first block that is still held
    blocks: list[list[Block]] = field(default_factory=list)  # by kind: the held blocks, from `first` on
    node: Node | None = None  # the published beginning
    published: int = 0  # its blocks


class KVCache:
    """Pages of `block_size` positions for `max_rows` sequences of up to `max_len` positions.

    A layer with a window keeps only the blocks that its window can still reach.
    """

    def __init__(
        self, config: ModelConfig, n_pages: int, max_rows: int, max_len: int, block_size: int,
        device: str | torch.device, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        c = config
        self.block_size, self.device, self.dtype = block_size, torch.device(device), dtype
        self.n_heads, self.head_dim = c.n_kv_head, c.head_dim
        self.lefts, layers = kinds_of(config)
        self.place = {layer: (kind, k) for kind, those in enumerate(layers) for k, layer in enumerate(those)}
        self.pool = BlockPool(n_pages, [len(those) for those in layers])
        shape = n_pages, 2, c.n_kv_head, block_size, c.head_dim  # keys and values
        self.store = torch.empty(shape, device=self.device, dtype=dtype)  # a page is cleared before its first use
        n_blocks = -(-max_len // block_size)
        # by kind (slots, blocks, layers): page numbers
        self._pages = [np.zeros((max_rows, n_blocks, len(those)), dtype=np.int64) for those in layers]
        self._slots = list(range(max_rows - 1, -1, -1))
        self._unclean: list[int] = []  # pages given out since the last step

    def open(self) -> Row:
        """A place for a new sequence."""
        kinds = range(len(self.lefts))
        return Row(self._slots.pop(), first=[0 for _ in kinds], blocks=[[] for _ in kinds])

    def close(self, row: Row) -> None:
        """Give up a sequence's place and its share of all blocks."""
        for blocks in row.blocks:
            while blocks:
                self.pool.release(blocks.pop())
        self._slots.append(row.slot)

    def adopt(self, row: Row, nodes: Sequence[Node], tokens: Sequence[int]) -> None:
        """Let a new row begin with what is known: `nodes` are a path that `known_beginning` found for its tokens."""
        row.n = len(nodes) * self.block_size
        if not nodes:
            return
        row.last, row.node, row.published = tokens[row.n - 1], nodes[-1], len(nodes)
        for kind, left in enumerate(self.lefts):
            row.first[kind] = first_block(row.n, left, self.block_size)
            for node in nodes[row.first[kind] :]:
                block = node.blocks[kind]
                self.pool.hold(block)
                self._append(row, kind, block)

    def missing_pages(self, row: Row, stop: int) -> int:
        """Pages to be had before the row's positions up to `stop` can be computed."""
        n_blocks = -(-stop // self.block_size)
        return sum(
            self.pool.layers[kind] * max(0, n_blocks - first - len(blocks))
            for kind, (first, blocks) in enumerate(zip(row.first, row.blocks, strict=True))
        )

    def most_pages(self, n: int, chunk: int) -> int:
        """The most pages that a row of n positions holds at a time when at most `chunk` are computed at once."""
        return pages_needed(self.lefts, self.pool.layers, n, chunk, self.block_size)

    def held_pages(self, row: Row) -> int:
        return sum(n * len(blocks) for n, blocks in zip(self.pool.layers, row.blocks, strict=True))

    def extend(self, row: Row, stop: int) -> None:
        """Get blocks for the positions up to `stop`; there must be enough pages."""
        n_blocks = -(-stop // self.block_size)
        for kind, blocks in enumerate(row.blocks):
            while row.first[kind] + len(blocks) < n_blocks:
                block = self.pool.allocate(kind)
                self._unclean += block.pages
                self._append(row, kind, block)

    def _append(self, row: Row, kind: int, block: Block) -> None:
        row.blocks[kind].append(block)
        self._pages[kind][row.slot, row.first[kind] + len(row.blocks[kind]) - 1] = block.pages

    def trim(self, row: Row, n: int) -> None:
        """Count the first `n` positions as all there is; give up blocks beyond them and those no window reaches."""
        row.n = n
        n_blocks = -(-n // self.block_size)
        for kind, (left, blocks) in enumerate(zip(self.lefts, row.blocks, strict=True)):
            while row.first[kind] + len(blocks) > n_blocks:
                self.pool.release(blocks.pop())
            gone = first_block(n, left, self.block_size) - row.first[kind]
            for block in reversed(blocks[: max(gone, 0)]):
                self.pool.release(block)
            if gone > 0:
                del blocks[:gone]
                row.first[kind] += gone

    def publish(self, row: Row, tokens: Sequence[int]) -> None:
        """Let other sequences find the blocks that are complete. `tokens` are all of the row's; before `trim`."""
        size = self.block_size
        assert row.node is not None, "the row has no root to begin from"
        while (row.published + 1) * size <= row.n:
            at = row.published
            whole = [
                blocks[at - first] for first, blocks in zip(row.first, row.blocks, strict=True) if at >= first
            ]
            row.node = publish(row.node, tuple(tokens[at * size : (at + 1) * size]), whole)
            row.published += 1

    def fork(self, row: Row) -> Row:
        """A second row that shares all blocks; the row must end with a whole block."""
        assert row.n % self.block_size == 0, "only whole blocks can be shared"
        new = self.open()
        new.n, new.last, new.first, new.node, new.published = row.n, row.last, [*row.first], row.node, row.published
        for kind, blocks in enumerate(row.blocks):
            for block in blocks:
                self.pool.hold(block)
                self._append(new, kind, block)
        return new

    def step(self, parts: Sequence[tuple[Row, Sequence[int]]], padded: bool = False) -> Step:
        """A forward pass over the next tokens of some rows, whose blocks are there (`extend`); `padded`: see `Step`."""
        if self._unclean:  # what an earlier holder left must not be seen, not even with weight 0: it could be NaN
            self.store.index_fill_(0, torch.tensor(self._unclean, device=self.device), 0)
            self._unclean = []
        return Step(self, parts, padded)

    def pages(self, kind: int, slots: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """Page numbers (..., layers) of a kind's blocks by slot and number, two arrays of one shape."""
        return self._pages[kind][slots, blocks]


def kinds_of(config: ModelConfig) -> tuple[list[int], list[list[int]]]:
    """The different windows of the layers, the widest first, and the layers of each."""
    windows = windows_of(config)
    lefts = sorted(set(windows), reverse=True)
    return lefts, [[layer for layer, left in enumerate(windows) if left == want] for want in lefts]


def page_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    return 2 * config.n_kv_head * block_size * config.head_dim * dtype.itemsize


def pages_needed(lefts: Sequence[int], layers: Sequence[int], n: int, chunk: int, block_size: int) -> int:
    """See `KVCache.most_pages`; `layers` counts those of each kind."""
    whole = -(-n // block_size)
    return sum(
        those * min(whole, (left + chunk) // block_size + 2) for left, those in zip(lefts, layers, strict=True)
    )


def _power_of_two(n: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (n - 1).bit_length()


class Group:
    """Rows that get the same number T of new tokens, next to each other in the step."""

    def __init__(self, cache: KVCache, rows: Sequence[Row], T: int, padded: bool) -> None:
        self.T, self.R = T, len(rows)
        starts = np.array([row.n for row in rows])  # (R,)
        slots = np.array([row.slot for row in rows])[:, None]  # (R, 1)
        self.positions = starts[:, None] + np.arange(T)  # (R, T)
        self.fresh = not starts.any()
        self.gather: list[Tensor] = []  # by kind (layers, 2 * R * K * blocks): what to read
        self.masks: list[Tensor] = []  # by kind (R, 1, T, S)
        if self.fresh:
            return
        size, K = cache.block_size, cache.n_heads
        last = (starts + T - 1) // size  # (R,) number of the last block
        for kind, left in enumerate(cache.lefts):
            first = np.maximum(0, starts - left) // size  # (R,)
            n_blocks = int((last - first).max()) + 1
            if padded:
                n_blocks = max(_power_of_two(n_blocks), PADDED_POSITIONS // size)
            blocks = first[:, None] + np.arange(n_blocks)  # (R, blocks)
            pages = cache.pages(kind, slots, np.minimum(blocks, last[:, None]))  # (R, blocks, layers)
            heads = (pages.transpose(2, 0, 1)[:, None, :, None] * 2 + np.arange(2)[:, None, None, None]) * K
            heads = heads + np.arange(K)[:, None]  # (layers, 2, R, K, blocks)
            self.gather.append(torch.from_numpy(heads.reshape(len(heads), -1)).to(cache.device, non_blocking=True))
            keys = (blocks[:, :, None] * size + np.arange(size)).reshape(self.R, -1)  # (R, S) positions
            distance = torch.from_numpy(self.positions[:, :, None] - keys[:, None]).to(cache.device, non_blocking=True)
            self.masks.append(hide(distance, left, cache.dtype)[:, None])

    def attend(self, cache: KVCache, kind: int, place: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the group's queries q (R * T, H, D), with its new keys and values k, v (R * T, K, D) stored."""
        q = q.unflatten(0, (self.R, self.T))  # (R, T, H, D)
        if self.fresh:
            k, v = k.unflatten(0, (self.R, self.T)), v.unflatten(0, (self.R, self.T))
            return attend(q, k, v, cache.lefts[kind]).flatten(0, 1)
        by_head = cache.store.view(-1, cache.block_size * cache.head_dim)
        stored = by_head.index_select(0, self.gather[kind][place])
        keys, values = stored.view(2, self.R, cache.n_heads, -1, cache.head_dim)  # (R, K, S, D)
        return attend_stored(q, keys, values, self.masks[kind]).flatten(0, 1)


class Step:
    """The tokens of one forward pass, laid one after the other: a batch of one row for the network (see `Cache`).

    `idx` (1, N); `last` are the places in it of each part's last token, `order` the parts' numbers in that order.
    `padded` is for steps of one token per row: rows are filled up with copies of the last one, and what is read with
    hidden positions, each to a power of two, so that few different shapes occur.
    """

    def __init__(self, cache: KVCache, parts: Sequence[tuple[Row, Sequence[int]]], padded: bool = False) -> None:
        self.cache = cache
        self.order = sorted(range(len(parts)), key=lambda k: (len(parts[k][1]), parts[k][0].n == 0))
        self.parts = [parts[k] for k in self.order]
        n_copies = _power_of_two(len(parts)) - len(parts) if padded else 0
        laid = self.parts + self.parts[-1:] * n_copies
        ids: list[int] = []
        before: list[int] = []
        ends = []
        for row, tokens in laid:
            ids += tokens
            before += [row.last, *tokens[:-1]]
            ends.append(len(ids) - 1)
        self.groups: list[Group] = []
        for (T, _), alike in itertools.groupby(laid, key=lambda part: (len(part[1]), part[0].n == 0)):
            self.groups.append(Group(cache, [row for row, _ in alike], T, padded))
        device = cache.device
        self.idx = torch.tensor([ids], device=device)  # (1, N)
        self.previous = torch.tensor([before], device=device)  # (1, N)
        positions = np.concatenate([group.positions.ravel() for group in self.groups])  # (N,)
        self.positions = torch.from_numpy(positions).to(device)[None]  # (1, N)
        self.last = torch.tensor(ends[: len(parts)], device=device)
        slots = np.repeat([row.slot for row, _ in laid], [len(tokens) for _, tokens in laid])  # (N,)
        self.write = self._places(slots, positions)

    def tensors(self) -> list[Tensor]:
        """All that the forward pass reads of this step, besides the cache's memory."""
        inputs = [self.idx, self.previous, self.positions, *self.write]
        return inputs + [tensor for group in self.groups for tensor in (*group.gather, *group.masks)]

    def _places(self, slots: np.ndarray, positions: np.ndarray) -> list[Tensor]:
        """By kind (layers, 2 * N * K): where the new keys and values go."""
        cache = self.cache
        size, K = cache.block_size, cache.n_heads
        found = []
        for kind in range(len(cache.lefts)):
            pages = cache.pages(kind, slots, positions // size).T[:, None, :, None]  # (layers, 1, N, 1)
            heads = (pages * 2 + np.arange(2)[:, None, None]) * K + np.arange(K)  # (layers, 2, N, K)
            places = heads * size + (positions % size)[:, None]
            found.append(torch.from_numpy(places.reshape(len(places), -1)).to(cache.device, non_blocking=True))
        return found

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Cache.attend`: q (1, N, H, D), k and v (1, N, K, D)."""
        cache = self.cache
        kind, place = cache.place[layer]
        by_position = cache.store.view(-1, cache.head_dim)
        by_position.index_copy_(0, self.write[kind][place], torch.cat([k, v]).view(-1, cache.head_dim))
        y, first = [], 0
        for group in self.groups:
            mine = slice(first, first + group.R * group.T)
            y.append(group.attend(cache, kind, place, q[0, mine], k[0, mine], v[0, mine]))
            first = mine.stop
        return (y[0] if len(y) == 1 else torch.cat(y))[None]

    def done(self) -> None:
        """Count the tokens as computed."""
        for row, tokens in self.parts:
            row.n += len(tokens)
            row.last = tokens[-1]

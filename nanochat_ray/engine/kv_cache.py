"""Keys and values of the positions that have been computed, one row per sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanochat_ray.config import ModelConfig
from nanochat_ray.model.attention import Span


class KVCache:
    """Keys and values (L, rows, capacity, K, D), with the number of filled positions and the last token id of each row.

    Rows may have different lengths; all rows of one forward get the same number of new tokens.
    """

    def __init__(
        self, config: ModelConfig, rows: int, capacity: int, device: str | torch.device, dtype: torch.dtype
    ) -> None:
        if rows < 1 or capacity < 1:
            raise ValueError(f"a cache needs at least one row and one position, not {rows} and {capacity}")
        self.config = config
        self.k, self.v = (self._storage(rows, capacity, device, dtype) for _ in "kv")
        self.lengths: list[int] = [0] * rows
        self.prev_ids = torch.zeros(rows, dtype=torch.int64, device=device)

    def _storage(self, rows: int, capacity: int, device: str | torch.device, dtype: torch.dtype) -> Tensor:
        """(L, rows, capacity, K, D), in memory with all positions of a head together, as attention reads them."""
        c = self.config
        shape = (c.n_layer, rows, c.n_kv_head, capacity, c.head_dim)
        return torch.zeros(shape, device=device, dtype=dtype).transpose(2, 3)

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        return self.k.size(2)

    def write(self, layer: int, k: Tensor, v: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Store k, v (rows, T, K, D) at the span's positions; returns all keys and values up to its end.

        Raises ValueError beyond the capacity.
        """
        rows, T = k.shape[:2]
        if span.end > self.capacity:
            raise ValueError(
                f"{T} tokens behind {span.end - T} do not fit the cache's capacity of {self.capacity} positions"
            )
        if span.level:
            self.k[layer, :, span.end - T : span.end] = k
            self.v[layer, :, span.end - T : span.end] = v
        else:
            row = torch.arange(rows, device=k.device)[:, None]
            self.k[layer][row, span.positions] = k
            self.v[layer][row, span.positions] = v
        return self.k[layer, :, : span.end], self.v[layer, :, : span.end]

    def advance(self, idx: Tensor) -> None:
        """Count the tokens idx (rows, T) as stored."""
        self.lengths = [n + idx.size(1) for n in self.lengths]
        self.prev_ids = idx[:, -1].to(torch.int64)

    def _with(self, rows: int, capacity: int, lengths: Sequence[int], prev_ids: Tensor) -> KVCache:
        """An empty cache like this one, with the given rows' bookkeeping."""
        new = KVCache(self.config, rows, capacity, self.k.device, self.k.dtype)
        new.lengths, new.prev_ids = list(lengths), prev_ids
        return new

    def expand(self, rows: int, capacity: int) -> KVCache:
        """A cache of many rows, each a copy of this one's only row."""
        n = self.lengths[0]
        if self.rows != 1:
            raise ValueError(f"only a cache of one row can be copied to many, this one has {self.rows}")
        if capacity < n:
            raise ValueError(f"a capacity of {capacity} is less than the {n} positions to copy")
        new = self._with(rows, capacity, [n] * rows, self.prev_ids.repeat(rows))
        new.k[:, :, :n] = self.k[:, :, :n]
        new.v[:, :, :n] = self.v[:, :, :n]
        return new

    def select(self, rows: list[int]) -> KVCache:
        """A cache of these rows, in this order."""
        kept = torch.tensor(rows, device=self.k.device)
        lengths = [self.lengths[row] for row in rows]
        new = self._with(len(rows), self.capacity, lengths, self.prev_ids[kept])
        n = max(lengths)
        new.k[:, :, :n] = self.k[:, kept, :n]
        new.v[:, :, :n] = self.v[:, kept, :n]
        return new

    @staticmethod
    def concat(caches: list[KVCache], capacity: int) -> KVCache:
        """One cache with the rows of all, in order."""
        if not caches:
            raise ValueError("no caches to join")
        lengths = [n for cache in caches for n in cache.lengths]
        if capacity < max(lengths):
            raise ValueError(f"a capacity of {capacity} is less than the longest row's {max(lengths)} positions")
        new = caches[0]._with(len(lengths), capacity, lengths, torch.cat([cache.prev_ids for cache in caches]))
        row = 0
        for cache in caches:
            n = max(cache.lengths)
            new.k[:, row : row + cache.rows, :n] = cache.k[:, :, :n]
            new.v[:, row : row + cache.rows, :n] = cache.v[:, :, :n]
            row += cache.rows
        return new

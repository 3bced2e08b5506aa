"""Forward passes through the cache, called like the network itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nanochat_ray.engine.blocks import Node
from nanochat_ray.engine.kv_cache import KVCache
from nanochat_ray.model.gpt import GPT


class Incremental:
    """Rows of one cache. Each call continues some of them and gives the logits of the new tokens."""

    def __init__(self, model: GPT, n_rows: int, max_len: int, block_size: int = 16) -> None:
        n_pages = model.config.n_layer * n_rows * -(-max_len // block_size)
        self.model = model
        self.cache = KVCache(
            model.config, n_pages, n_rows, max_len, block_size, model.device, model.compute_dtype
        )
        self.rows = [self.cache.open() for _ in range(n_rows)]
        for row in self.rows:
            row.node = Node()

    @torch.inference_mode()
    def feed(self, new: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """New tokens of each row, of any number or none: logits (T, V) of each."""
        parts = [(row, list(tokens)) for row, tokens in zip(self.rows, new, strict=True) if len(tokens)]
        for row, tokens in parts:
            self.cache.extend(row, row.n + len(tokens))
        step = self.cache.step(parts)
        logits = self.model(step.idx, cache=step)[0].split([len(tokens) for _, tokens in step.parts])
        step.done()
        for row, _ in parts:
            self.cache.trim(row, row.n)
        by_row = {id(row): found for (row, _), found in zip(step.parts, logits, strict=True)}
        return [by_row.get(id(row), logits[0][:0]) for row in self.rows]

    def __call__(self, idx: torch.Tensor) -> torch.Tensor:
        """The same number of tokens for each row: (B, T) -> (B, T, V)."""
        return torch.stack(self.feed(idx.tolist()))

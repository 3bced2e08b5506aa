"""The judges of the plan's memory: what autograd keeps, and the peak of all live storages, on the meta device too."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from nanochat_ray.config import ModelConfig
from nanochat_ray.model import attention
from nanochat_ray.model.gpt import GPT


class LiveBytes(TorchDispatchMode):
    """Follows storages that operators make from their birth to their end; `peak` is the most at one time."""

    def __init__(self, there: Iterable[Tensor] = ()) -> None:
        """`there` are tensors that do not count, though operators give views of them."""
        super().__init__()
        self.now = self.peak = 0
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary({t.untyped_storage(): 0 for t in there})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.note, out)
        return out

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        n_bytes = storage.nbytes()
        self._known[storage] = n_bytes
        weakref.finalize(storage, self._gone, n_bytes)
        self.now += n_bytes
        self.peak = max(self.peak, self.now)

    def _gone(self, n_bytes: int) -> None:
        self.now -= n_bytes


class Kept:
    """The storages that autograd keeps for the backward pass, each counted once; parameters apart."""

    def __init__(self, model: GPT) -> None:
        self._own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self._seen: dict[int, Any] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._seen[storage._cdata] = storage  # held, so that no other one gets its address
        return tensor

    @property
    def n_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._seen.values())


def flash_attention(q: Tensor, k: Tensor, v: Tensor, left: int) -> Tensor:
    """`sdpa_attention` by the kernels that CUDA takes, which the meta device has by name only."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if left < 0:
        y = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
    else:
        T = q.size(2)
        mask = attention._mask(T, T, left, 1, q).expand(q.size(0), q.size(1), T, T)
        y = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True)[0]
    return y.transpose(1, 2)


@contextlib.contextmanager
def gpu_kernels() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "sdpa_attention", flash_attention)
        attention._kept_mask.cache_clear()
        yield
    attention._kept_mask.cache_clear()


def network(config: ModelConfig, dtype: torch.dtype, device: str) -> GPT:
    return GPT.build(config, device=device, compute_dtype=dtype)


def rows(config: ModelConfig, n: int, device: str) -> tuple[Tensor, Tensor]:
    shape = n, config.sequence_len
    if device == "meta":
        ids = torch.empty(shape, dtype=torch.int64, device=device)
        return ids.int(), ids
    ids = torch.randint(0, config.vocab_size, shape)
    return ids.int(), ids

"""Packed rows to the device, one micro-batch ahead of the computation.

On CUDA the ids cross as they lie, in 2 or 4 bytes, through two pinned buffers in turn: micro-batch k+1 is copied on a
stream of its own while k computes, and a buffer is filled again only when its last copy has ended. Widening the ids
and masking the targets happen on the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nanochat_ray.messages import PackedBatch, PackedRows

N_BUFFERS = 2
Rows = tuple[np.ndarray, np.ndarray | None]  # tokens (b, T+1) and mask (b, T+1) or None


class Copy(Protocol):
    """A copy to the device that is under way."""

    def wait(self) -> None:
        """Block until the source may be written again."""
        ...

    def result(self) -> Tensor:
        """The copy, for work that the current stream is given from now on."""
        ...


class Device(Protocol):
    """Where copies go."""

    def buffer(self, like: np.ndarray) -> Tensor:
        """Memory of this process, of an array's shape and type, that the device reads while the process goes on."""
        ...

    def copy(self, source: Tensor) -> Copy:
        """Begin to copy part of such a buffer."""
        ...


def micro_batches(
    rows: PackedBatch | PackedRows, device_batch_size: int, device: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs (b, T) int32 and targets (b, T) int64 with -1 where unsupervised, `device_batch_size` rows at a time.

    No tensor given out is written again.
    """
    if torch.device(device).type == "cuda":
        yield from staged(_chunks(rows, device_batch_size), CudaDevice(device))
        return
    for tokens, mask in _chunks(rows, device_batch_size):
        ids = torch.from_numpy(tokens.astype(np.int32)).to(device)  # (b, T+1)
        yield inputs_and_targets(ids, None if mask is None else torch.from_numpy(mask.copy()).to(device))


def _chunks(rows: PackedBatch | PackedRows, size: int) -> Iterator[Rows]:
    for start in range(0, len(rows.tokens), size):
        at = slice(start, start + size)
        yield rows.tokens[at], None if rows.mask is None else rows.mask[at]


def inputs_and_targets(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Split rows (b, T+1) int32 into what goes in and what should come out, -1 where the mask (b, T+1) is False."""
    targets = tokens[:, 1:].long()
    if mask is not None:
        targets.masked_fill_(~mask[:, 1:], -1)
    return tokens[:, :-1].contiguous(), targets


def staged(chunks: Iterable[Rows], device: Device) -> Iterator[tuple[Tensor, Tensor]]:
    """Micro-batches of rows in order, each on its way to the device before the one before it is given out."""
    slots = [Slot(device) for _ in range(N_BUFFERS)]
    under_way: deque[Slot] = deque()
    for k, (tokens, mask) in enumerate(chunks):
        slot = slots[k % N_BUFFERS]
        slot.send(tokens, mask)
        under_way.append(slot)
        if len(under_way) == N_BUFFERS:
            yield under_way.popleft().receive()
    while under_way:
        yield under_way.popleft().receive()


class Slot:
    """A pinned buffer for the tokens of one micro-batch, one for its mask, and the copies made from them last."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.buffers: list[Tensor] = []
        self.copies: list[Copy] = []

    def send(self, tokens: np.ndarray, mask: np.ndarray | None) -> None:
        """Begin to copy rows; no more of them than the first time."""
        arrays = [_signed(tokens)] if mask is None else [_signed(tokens), mask]
        if not self.buffers:
            self.buffers = [self.device.buffer(array) for array in arrays]
        for copy in self.copies:
            copy.wait()
        self.copies = []
        for array, buffer in zip(arrays, self.buffers, strict=True):
            filled = buffer[: len(array)]
            filled.numpy()[:] = array
            self.copies.append(self.device.copy(filled))

    def receive(self) -> tuple[Tensor, Tensor]:
        tokens, *mask = [copy.result() for copy in self.copies]
        if tokens.dtype == torch.int16:
            tokens = tokens.int().bitwise_and_(0xFFFF)  # the upper half of uint16 came as negative numbers
        return inputs_and_targets(tokens, mask[0] if mask else None)


def _signed(tokens: np.ndarray) -> np.ndarray:
    """The same bytes as int16 or int32: torch computes with few unsigned types."""
    return tokens.view(np.int16 if tokens.itemsize == 2 else np.int32)


class CudaDevice:
    """Copies on a stream of their own."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.stream = torch.cuda.Stream(self.device)

    def buffer(self, like: np.ndarray) -> Tensor:
        return torch.from_numpy(np.empty_like(like)).pin_memory()

    def copy(self, source: Tensor) -> CudaCopy:
        with torch.cuda.stream(self.stream):
            target = source.to(self.device, non_blocking=True)
            return CudaCopy(target, self.stream.record_event())


class CudaCopy:
    def __init__(self, target: Tensor, done: torch.cuda.Event) -> None:
        self.target, self.done = target, done

    def wait(self) -> None:
        self.done.synchronize()

    def result(self) -> Tensor:
        stream = torch.cuda.current_stream(self.target.device)
        stream.wait_event(self.done)
        self.target.record_stream(stream)  # its memory came from the other stream, which must not take it back early
        return self.target

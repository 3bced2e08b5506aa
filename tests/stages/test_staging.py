"""Micro-batches arrive in order and whole, and no buffer is written while it is still being copied from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanochat_ray.messages import Cursor, PackedBatch, PackedRows
from nanochat_ray.stages.staging import Rows, micro_batches, staged


def rows_of(n: int, length: int, dtype: type = np.uint16, masked: bool = False) -> PackedRows:
    rng = np.random.default_rng(n * 1000 + length)
    tokens = rng.integers(0, 2**16 if dtype is np.uint16 else 2**31, (n, length + 1)).astype(dtype)
    mask = rng.random(tokens.shape) < 0.6 if masked else None
    for array in (tokens, mask):
        if array is not None:
            array.flags.writeable = False  # as arrays from Ray's object store are
    return PackedRows(tokens, mask)


def naive(rows: PackedRows, size: int) -> list[tuple[Tensor, Tensor]]:
    found = []
    for start in range(0, len(rows), size):
        chunk = rows.tokens[start : start + size].astype(np.int64)
        targets = chunk[:, 1:].copy()
        if rows.mask is not None:
            targets[~rows.mask[start : start + size, 1:]] = -1
        found.append((torch.tensor(chunk[:, :-1], dtype=torch.int32), torch.tensor(targets)))
    return found


def check(found: list[tuple[Tensor, Tensor]], wanted: list[tuple[Tensor, Tensor]]) -> None:
    assert len(found) == len(wanted)
    for pair, expected in zip(found, wanted, strict=True):
        for ours, theirs in zip(pair, expected, strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs) and ours.is_contiguous()


@dataclass
class SlowDevice:
    """Copies that may last until somebody waits for them; tells when their source was written before that."""

    copies: list[SlowCopy] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)

    def buffer(self, like: np.ndarray) -> Tensor:
        self.buffers.append(torch.from_numpy(np.empty_like(like)))
        return self.buffers[-1]

    def copy(self, source: Tensor) -> SlowCopy:
        self.copies.append(SlowCopy(source, source.clone()))
        return self.copies[-1]


@dataclass
class SlowCopy:
    source: Tensor
    at_start: Tensor
    waited: bool = False

    def wait(self) -> None:
        self.check()
        self.waited = True

    def check(self) -> None:
        assert self.waited or torch.equal(self.source, self.at_start), "the buffer was written during the copy"

    def result(self) -> Tensor:
        self.check()
        return self.at_start.clone()


shapes = dict(
    n=st.integers(0, 17),
    length=st.integers(1, 9),
    size=st.integers(1, 20),
    dtype=st.sampled_from([np.uint16, np.uint32]),
    masked=st.booleans(),
)


@settings(deadline=None)
@given(**shapes)
def test_equal_to_a_plain_loop(n, length, size, dtype, masked):
    rows = rows_of(n, length, dtype, masked)
    wanted = naive(rows, size)
    check(list(micro_batches(rows, size, "cpu")), wanted)
    batch = PackedBatch(0, rows.tokens, rows.mask, Cursor(), 0.0)
    check(list(micro_batches(batch, size, "cpu")), wanted)


def parts(rows: PackedRows, size: int) -> Iterator[Rows]:
    for start in range(0, len(rows), size):
        at = slice(start, start + size)
        yield rows.tokens[at], None if rows.mask is None else rows.mask[at]


@settings(deadline=None)
@given(**shapes)
def test_staged_copies_are_whole_whenever_they_end(n, length, size, dtype, masked):
    rows, device = rows_of(n, length, dtype, masked), SlowDevice()
    check(list(staged(parts(rows, size), device)), naive(rows, size))
    for copy in device.copies:
        copy.check()
    n_batches = -(-n // size)
    assert len(device.copies) == n_batches * (1 + masked)
    assert len(device.buffers) == min(n_batches, 2) * (1 + masked)


def test_the_next_copy_is_under_way_before_a_micro_batch_is_given_out():
    device, begun = SlowDevice(), []
    for _ in staged(parts(rows_of(9, 3), 2), device):
        begun.append(len(device.copies))
    assert begun == [2, 3, 4, 5, 5]
    waited = [copy.waited for copy in device.copies]
    assert waited == [True, True, True, False, False]  # nobody waits for what nobody overwrites


def test_a_copy_that_nobody_waits_for_is_noticed():
    """The law of the fake itself: a buffer filled again without waiting is caught."""
    device = SlowDevice()
    buffer = device.buffer(np.zeros(3))
    copy = device.copy(buffer)
    buffer.fill_(7)
    with pytest.raises(AssertionError, match="written during the copy"):
        copy.result()


@pytest.mark.parametrize("device", ["cpu", "slow"])
def test_what_was_given_out_stays_as_it_was(device):
    rows = rows_of(12, 5, masked=True)
    batches = micro_batches(rows, 1, "cpu") if device == "cpu" else staged(parts(rows, 1), SlowDevice())
    kept, copies = [], []
    for inputs, targets in batches:
        kept.append((inputs, targets))
        copies.append((inputs.clone(), targets.clone()))
        check(kept, copies)
    storages = [tensor.untyped_storage().data_ptr() for tensor in itertools.chain(*kept)]
    assert len(set(storages)) == len(storages)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("masked", [False, True])
def test_on_a_gpu(dtype, masked):
    rows = rows_of(37, 513, dtype, masked)
    burden = torch.ones(2048, 2048, device="cuda")
    found = []
    for inputs, targets in micro_batches(rows, 4, "cuda"):
        burden = burden @ burden * 0  # the consumer's stream is behind the host
        found.append((inputs, targets))
    check([(inputs.cpu(), targets.cpu()) for inputs, targets in found], naive(rows, 4))

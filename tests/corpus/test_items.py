"""Laws of the order of work items: pure functions of (seed, epoch), resumable anywhere."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.corpus.items import IndexItem, Visit, index_items, item_order, items_from, row_block
from nanochat_ray.messages import Cursor, PackedRows

anywhere = st.integers(-(2**70), 2**70)


@given(n=st.integers(0, 200), seed=anywhere, epoch=anywhere)
def test_an_order_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    order = item_order(n, seed, epoch)
    assert sorted(order.tolist()) == list(range(n))
    assert np.array_equal(order, item_order(n, seed, epoch))


def test_seeds_and_epochs_have_their_own_orders() -> None:
    orders = {tuple(item_order(50, seed, epoch)) for seed in (-1, 0, 1, 42) for epoch in range(4)}
    assert len(orders) == 16


def test_another_process_finds_the_same_order() -> None:
    code = "from nanochat_ray.corpus.items import item_order; print(item_order(20, 42, 3).tolist())"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == str(item_order(20, 42, 3).tolist())


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any), seed=anywhere, skip=st.integers(0, 40))
def test_the_stream_goes_on_from_any_cursor(sizes: list[int], seed: int, skip: int) -> None:
    whole = list(islice(items_from(Cursor(), sizes, seed), skip + 30))
    at = whole[skip]
    again = items_from(Cursor(at.epoch, at.position, 7), sizes, seed)
    assert list(islice(again, 30)) == whole[skip:]
    finite = list(items_from(Cursor(at.epoch, at.position), sizes, seed, epochs=at.epoch + 2))
    assert len(finite) == 2 * len(sizes) - at.position
    beyond = items_from(Cursor(at.epoch, len(sizes)), sizes, seed)
    assert next(beyond)[:2] == (at.epoch + 1, 0)


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any), seed=anywhere)
def test_shares_are_those_of_the_documents(sizes: list[int], seed: int) -> None:
    visits = list(items_from(Cursor(), sizes, seed, epochs=2))
    assert [visit.epoch for visit in visits] == [0] * len(sizes) + [1] * len(sizes)
    before = 0
    for visit in visits[: len(sizes)]:
        assert visit.start_frac == pytest.approx(before / sum(sizes))
        before += sizes[visit.item]
        assert visit.stop_frac == pytest.approx(before / sum(sizes))
    assert (visits[0].start_frac, visits[len(sizes) - 1].stop_frac) == (0.0, 1.0)
    assert list(items_from(Cursor(), 3, seed, epochs=1)) == list(items_from(Cursor(), [5, 5, 5], seed, epochs=1))


def test_no_documents_is_an_error() -> None:
    for sizes in (0, [], [0, 0]):
        with pytest.raises(ValueError, match="nothing to train on"):
            next(items_from(Cursor(), sizes, 0))


@pytest.mark.parametrize("cursor", [Cursor(0, 6), Cursor(1, -1), Cursor(-1, 0), Cursor(0, 0, -1)])
def test_a_cursor_that_is_no_place_is_an_error(cursor: Cursor) -> None:
    for sizes in (5, [1, 2, 3, 4, 5]):
        with pytest.raises(ValueError, match="no place in 5 work items"):
            next(items_from(cursor, sizes, 0))


def test_the_order_of_a_large_set_takes_four_bytes_an_item() -> None:
    n_items = 6000 * 50
    tracemalloc.start()
    visits = items_from(Cursor(3, 1000), n_items, seed=42)
    for _ in range(100):
        next(visits)
    now, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert now < 1.2 * 4 * n_items + 100_000


@given(n=st.integers(0, 100), size=st.integers(1, 30))
def test_index_items_cover_the_mixture(n: int, size: int) -> None:
    items = index_items(n, size)
    assert [i for item in items for i in range(item.start, item.stop)] == list(range(n))
    assert all(len(item) == size for item in items[:-1])
    assert index_items(1500) == [IndexItem(0, 1024), IndexItem(1024, 1500)]


def test_a_block_knows_its_place_and_progress() -> None:
    tokens = np.arange(12, dtype=np.uint16).reshape(4, 3)
    rows = PackedRows(tokens, mask=tokens > 5, consumed=np.array([1, 2, 2, 4], dtype=np.int32))
    visit = Visit(epoch=2, position=5, item=0, start_frac=0.5, stop_frac=0.9)
    block = row_block(rows, visit)
    assert block.cursor == Cursor(2, 5, 0)
    assert block.progress.tolist() == pytest.approx([2.6, 2.7, 2.7, 2.9])
    rest = row_block(rows, visit, first_row=3)
    assert rest.cursor == Cursor(2, 5, 3)
    assert rest.rows.tokens.tolist() == tokens[3:].tolist() and rest.progress.tolist() == block.progress[3:].tolist()
    assert rest.rows.mask is not None and rest.rows.mask.tolist() == [[True] * 3]
    behind = row_block(rows, visit, first_row=4)  # where a step ended with the item
    assert len(behind.rows) == 0 and behind.cursor == Cursor(2, 5, 4)
    assert len(row_block(PackedRows(tokens[:0]), visit).rows) == 0
    with pytest.raises(ValueError, match="has 4 rows, the checkpoint is behind 5"):
        row_block(rows, visit, first_row=5)
    assert row_block(PackedRows(tokens), visit).progress.tolist() == pytest.approx([2.6, 2.7, 2.8, 2.9])

"""Laws of the packers (no token lost or invented, BOS first, always an end) and of cutting rows into steps."""

from __future__ import annotations

from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_ray.messages import Cursor, PackCounts, PackedBatch, PackedRows
from nanochat_ray.text.packing import (
    BestFit,
    RowBlock,
    cut_steps,
    pack_conversations,
    pack_documents,
    pack_stream,
    rank_part,
    reference_rows,
    step_batches,
)

BOS = 60_000
doc_lengths = st.lists(st.integers(1, 60), max_size=80)


def documents(lengths: list[int]) -> list[np.ndarray]:
    """Documents whose every token but BOS is unique."""
    first, out = 1, []
    for length in lengths:
        out.append(np.array([BOS, *range(first, first + length - 1)], dtype=np.uint16))
        first += length
    return out


def pieces_of(row: np.ndarray) -> list[list[int]]:
    starts = [*np.flatnonzero(row == BOS), len(row)]
    return [row[a:b].tolist() for a, b in pairwise(starts)]


# ---- the structure that all packers share


@given(steps=st.lists(st.tuples(st.sampled_from(["add", "longest", "shortest"]), st.integers(1, 9)), max_size=60))
def test_best_fit_does_what_a_scan_does(steps: list[tuple[str, int]]) -> None:
    best: BestFit[int] = BestFit()
    waiting: list[tuple[int, int]] = []  # (length, number) in the order added
    for number, (what, length) in enumerate(steps):
        if what == "add":
            best.add(length, number)
            waiting.append((length, number))
        elif what == "longest":
            fitting = [item for item in waiting if item[0] <= length]
            expected = max(fitting, key=lambda item: item[0], default=None)  # the first among equals
            assert best.pop_longest_fitting(length) == (expected and expected[1])
            if expected:
                waiting.remove(expected)
        elif waiting:
            shortest = min(waiting, key=lambda item: item[0])
            assert best.pop_shortest() == shortest[1]
            waiting.remove(shortest)
        assert len(best) == len(waiting)


@pytest.mark.parametrize(
    ("lengths", "room", "taken"),
    [
        ([3, 5, 9], 5, 5),  # an exact fit
        ([7, 8], 5, 7),  # nothing fits: the shortest is cut
        ([3, 4], 9, 4),  # everything fits
        ([5, 5, 9], 8, 9),  # 5 now means cutting 5 to 3 later; 9 now costs one token
        ([1, 5, 9], 8, 5),  # a short one is there for the gap of 3
        ([6, 20], 8, 6),  # cutting 20 would cost more than the gap
    ],
)
def test_the_choice_of_least_waste(lengths: list[int], room: int, taken: int) -> None:
    best: BestFit[int] = BestFit()
    for length in lengths:
        best.add(length, length)
    assert best.pop_least_waste(room) == taken


# ---- training items


@given(lengths=doc_lengths, capacity=st.integers(2, 70))
def test_training_rows_are_made_of_document_heads(lengths: list[int], capacity: int) -> None:
    docs = documents(lengths)
    rows = pack_documents(docs, capacity)
    counts = rows.counts
    assert rows.tokens.shape == (len(rows), capacity)
    assert rows.tokens.dtype == np.uint16 and rows.mask is None and rows.consumed is not None
    whole = {tuple(doc[:2].tolist()): doc.tolist() for doc in docs if len(doc) > 1}
    used: Counter[tuple[int, ...]] = Counter()
    cut = 0
    for row in rows.tokens:
        assert row[0] == BOS
        pieces = pieces_of(row)
        if pieces[-1] == [BOS]:
            pieces.pop()  # a document of which only BOS had room
            cut += 1
        for piece in pieces:
            doc = whole[tuple(piece[:2])]
            assert piece == doc[: len(piece)]
            if len(piece) < len(doc):
                assert piece is pieces[-1]  # only the end of a row cuts
                cut += 1
            used[tuple(piece[:2])] += 1
    assert max(used.values(), default=1) == 1
    assert cut <= len(rows)
    assert counts.documents == len(docs) and counts.empty == lengths.count(1)
    assert counts.overlong == sum(length > capacity for length in lengths)
    assert counts.tokens_read == sum(lengths)
    assert counts.tokens_used == rows.tokens.size
    assert counts.tokens_beyond_row == sum(max(0, length - capacity) for length in lengths)
    assert counts.waste_frac >= counts.floor_frac - 1e-12
    steps = np.diff(rows.consumed, prepend=0)
    assert (steps >= 1).all() and steps.sum() <= len(docs) - counts.empty


@given(lengths=doc_lengths, capacity=st.integers(2, 70))
def test_what_is_left_over_fills_no_row(lengths: list[int], capacity: int) -> None:
    rows = pack_documents(documents(lengths), capacity)
    counts = rows.counts
    if len(rows) == 0:
        assert sum(min(length, capacity) for length in lengths if length > 1) < capacity
        assert counts.tokens_used == 0


def test_documents_that_fit_together_are_not_cut() -> None:
    rows = pack_documents(documents([30, 20, 10, 35, 25, 1, 60]), 60)
    counts = rows.counts
    assert len(rows) == 3
    assert counts.tokens_used == 180 and counts.empty == 1 and counts.overlong == 0
    assert counts.waste_frac == pytest.approx(1 / 181)


def test_waste_stays_near_the_floor() -> None:
    """On log-normal lengths, as text has them: at most four points, also for small row groups."""
    generator = np.random.default_rng(0)
    for n_documents, capacity, points in ((1024, 2049, 1), (256, 2049, 2), (256, 513, 2), (64, 513, 4)):
        counts = PackCounts()
        for _ in range(2048 // n_documents):
            lengths = np.clip(generator.lognormal(6, 1.1, n_documents).astype(int), 2, 30_000)
            docs = [np.zeros(length, dtype=np.uint16) for length in lengths]
            counts += pack_documents(docs, capacity).counts
        assert 100 * (counts.waste_frac - counts.floor_frac) < points


def test_packing_depends_on_its_documents_alone() -> None:
    lengths = np.random.default_rng(1).integers(1, 400, 300).tolist()
    first, second = (pack_documents(documents(lengths), 129) for _ in range(2))
    assert np.array_equal(first.tokens, second.tokens)
    assert pack_documents([], 129).counts == pack_stream([], 129).counts == PackCounts(barren_items=1)


# ---- one stream


@given(lengths=doc_lengths, capacity=st.integers(2, 70))
def test_a_stream_trains_on_every_token_once(lengths: list[int], capacity: int) -> None:
    """Put in order, the rows are the documents one after another; neighbours share one token; the tail is left."""
    docs = documents(lengths)
    packed = pack_stream(docs, capacity)
    stream = np.concatenate([*(doc for doc in docs if len(doc) > 1), np.zeros(0, dtype=np.uint16)])
    n_targets = capacity - 1
    n_rows = max(0, len(stream) - 1) // n_targets
    assert packed.tokens.shape == (n_rows, capacity) and packed.tokens.dtype == np.uint16 and packed.mask is None
    wanted = [stream[k * n_targets : k * n_targets + capacity].tolist() for k in range(n_rows)]
    assert sorted(packed.tokens.tolist()) == sorted(wanted)
    targets = Counter(packed.tokens[:, 1:].ravel().tolist())
    assert targets == Counter(stream[1 : n_rows * n_targets + 1].tolist())
    counts = packed.counts
    assert (counts.documents, counts.empty) == (len(docs), lengths.count(1))
    assert counts.overlong == sum(length > capacity for length in lengths)
    assert counts.tokens_read == sum(lengths) and counts.tokens_beyond_row == 0
    assert counts.tokens_used == (n_rows * n_targets + 1 if n_rows else 0)
    assert counts.tokens_read - counts.empty - counts.tokens_used <= n_targets
    assert counts.barren_items == (n_rows == 0)


def test_a_long_document_is_cut_in_best_fit_and_not_in_a_stream() -> None:
    docs = documents([10_000])
    assert pack_documents(docs, 101).counts.waste_frac == pytest.approx(0.9899)
    assert pack_stream(docs, 101).counts.waste_frac == pytest.approx(0.0099 - 0.0001, abs=1e-3)
    rows = pack_stream(docs, 101).tokens
    assert not (np.diff(rows[:, 1].astype(int)) > 0).all()  # shuffled
    assert np.array_equal(rows, pack_stream(documents([10_000]), 101).tokens)


# ---- counts


counts_of = st.builds(PackCounts, *[st.integers(0, 10**12)] * 7)


@given(counts=counts_of, n_rows=st.integers(1, 500), cuts=st.lists(st.integers(0, 500)))
def test_shares_of_counts_add_up(counts: PackCounts, n_rows: int, cuts: list[int]) -> None:
    edges = sorted({0, n_rows, *(cut for cut in cuts if cut < n_rows)})
    parts = [counts.share(a, b, n_rows) for a, b in pairwise(edges)]
    assert sum(parts, PackCounts()) == counts
    assert counts.share(0, 0, 0) == counts


# ---- the reference loader


def test_worked_example() -> None:
    """The one of the specification: T 7, buffer of 4, slices of 2, row groups of 6; ^ is BOS."""
    lengths = dict(a=5, b=3, c=5, d=10, e=2, f=1, g=7, h=3, i=4, j=13, k=6, l=2)
    docs = [np.array([ord("^")] + [ord(letter)] * (length - 1)) for letter, length in lengths.items()]
    epoch = [docs[k : k + 2] for k in range(0, 12, 2)]
    rows = reference_rows(epoch * 3, 8, buffer_size=4)
    text = ["".join(map(chr, row)) for row in islice(rows, 6)]
    assert text == ["^aaaa^bb", "^cccc^hh", "^gggggg^", "^iii^e^l", "^kkkkk^b", "^aaaa^cc"]


@given(lengths=doc_lengths, capacity=st.integers(2, 70), buffer_size=st.integers(1, 20), slice_size=st.integers(1, 9))
def test_the_reference_loader_ends_with_its_documents(
    lengths: list[int], capacity: int, buffer_size: int, slice_size: int
) -> None:
    docs = documents(lengths)
    slices = [docs[k : k + slice_size] for k in range(0, len(docs), slice_size)]
    rows = list(reference_rows(slices, capacity, buffer_size))
    tokens = [int(token) for row in rows for token in row if token != BOS]
    assert all(len(row) == capacity and row[0] == BOS for row in rows)
    assert len(tokens) == len(set(tokens))
    assert set(tokens) <= {int(token) for doc in docs for token in doc}


# ---- conversations


def conversations(lengths: list[int]) -> list[tuple[list[int], list[int]]]:
    return [(doc.tolist(), [j % 3 // 2 for j in range(len(doc))]) for doc in documents(lengths)]


@given(lengths=st.lists(st.integers(1, 30), max_size=60), buffer_size=st.integers(1, 20))
def test_conversations_are_all_placed_whole(lengths: list[int], buffer_size: int) -> None:
    items = conversations(lengths)
    packed = pack_conversations(items, 30, BOS, np.uint16, buffer_size)
    assert packed.mask is not None and packed.consumed is not None
    trained = [tuple(ids) for ids, mask in items if any(mask)]
    for row, mask in zip(packed.tokens, packed.mask, strict=True):
        assert mask[1:].any() and row[0] == BOS
    # every conversation that trains anything is in some row, whole and once, with its mask
    found = Counter(tuple(piece) for row in packed.tokens for piece in pieces_of(row))
    assert all(found[ids] == 1 for ids in trained)
    wanted = sorted(t for ids, mask in items for t, m in zip(ids, mask, strict=True) if m)
    assert sorted(packed.tokens[packed.mask].tolist()) == wanted
    if len(packed):
        assert packed.consumed[-1] == len(items) and (np.diff(packed.consumed) >= 0).all()


@pytest.mark.parametrize("T", [128, 512, 2048])
def test_packing_ends_when_most_conversations_are_too_long(T: int) -> None:
    """Cut to a row, as rendering does; the packer that kept longer ones in its buffer stood still here."""
    lengths = np.clip(np.random.default_rng(T).lognormal(np.log(750), 1, 1024).astype(int), 5, T + 1)
    items = [(np.zeros(n, dtype=np.uint16), np.arange(n) % 2) for n in lengths]
    packed = pack_conversations(items, T + 1, BOS)
    assert packed.consumed is not None and packed.consumed[-1] == 1024
    padding = 1 - lengths.sum() / packed.tokens.size
    assert padding < 0.06


def test_conversation_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="31 tokens does not fit a row of 30"):
        pack_conversations(conversations([3, 31]), 30, BOS)


def test_rows_that_train_nothing_are_left_out_but_counted() -> None:
    silent = ([BOS, 1, 2], [0, 0, 0])
    spoken = ([BOS, 3, 4], [0, 1, 1])
    packed = pack_conversations([silent, spoken, silent], 3, BOS, buffer_size=1)
    assert packed.consumed is not None
    assert packed.tokens.tolist() == [spoken[0]] and packed.consumed.tolist() == [3]
    assert len(pack_conversations([silent], 3, BOS)) == len(pack_conversations([], 3, BOS)) == 0


# ---- steps


def stream(sizes: list[int], cuts: list[int], masked: bool) -> tuple[list[RowBlock], np.ndarray]:
    """Items of the given numbers of rows, as blocks cut further at multiples of `cuts`; and all rows in order."""
    blocks: list[RowBlock] = []
    everything, number = [], 0
    for item, size in enumerate(sizes):
        tokens = np.arange(number, number + size, dtype=np.uint16)[:, None].repeat(3, axis=1)  # (n, T+1)
        mask = tokens % 2 == 1 if masked else None
        progress = (item + np.arange(1, size + 1) / max(size, 1)) / len(sizes)
        counts = PackCounts(documents=1 + 7 * item, tokens_read=3 * size + item, tokens_used=3 * size)
        everything.append(tokens)
        number += size
        edges = sorted({0, size, *(cut for cut in cuts if cut < size)})
        for a, b in pairwise(edges):
            part = PackedRows(tokens[a:b], None if mask is None else mask[a:b])
            blocks.append(RowBlock(part, Cursor(0, item, a), progress[a:b], counts, size))
        if size == 0:
            blocks.append(RowBlock(PackedRows(tokens), Cursor(0, item, 0), progress, counts))
    return blocks, np.concatenate([*everything, np.zeros((0, 3), dtype=np.uint16)])


item_sizes = st.lists(st.integers(0, 9), min_size=1, max_size=8)


@given(sizes=item_sizes, cuts=st.lists(st.integers(1, 8)), rows_per_step=st.integers(1, 12), masked=st.booleans())
def test_steps_are_the_stream_cut_evenly(sizes: list[int], cuts: list[int], rows_per_step: int, masked: bool) -> None:
    whole, rows = stream(sizes, [], masked)
    blocks, _ = stream(sizes, cuts, masked)
    steps = list(cut_steps(blocks, rows_per_step))
    assert [len(step.rows) for step in steps[:-1]] == [rows_per_step] * (len(steps) - 1)
    assert sum(len(step.rows) for step in steps) == len(rows)
    for k, (step, same) in enumerate(zip(steps, cut_steps(whole, rows_per_step), strict=True)):
        end = (k + 1) * rows_per_step
        assert np.array_equal(step.rows.tokens, rows[k * rows_per_step : end])
        assert (step.cursor, step.progress, step.counts) == (same.cursor, same.progress, same.counts)
        assert step.rows.mask is None or np.array_equal(step.rows.mask, step.rows.tokens % 2 == 1)
        # the cursor names the place behind the step's last row
        rest = [row for block in whole if block.cursor.item == step.cursor.item for row in block.rows.tokens]
        later = [row for block in whole if block.cursor.item > step.cursor.item for row in block.rows.tokens]
        assert np.array_equal([*rest[step.cursor.row :], *later], rows[end:]) or end >= len(rows)
    assert steps == [] or steps[-1].progress <= 1
    counted = sum((step.counts for step in steps), PackCounts())
    every = [PackCounts(1 + 7 * k, tokens_read=3 * n + k, tokens_used=3 * n) for k, n in enumerate(sizes)]
    filled = max((k for k, n in enumerate(sizes) if n), default=-1)  # items behind it come too late for the last step
    short = len(steps) > 0 and len(steps[-1].rows) < rows_per_step
    assert counted == sum(every if short else every[: filled + 1], PackCounts())


@given(sizes=item_sizes, rows_per_step=st.integers(1, 12), masked=st.booleans())
def test_any_number_of_ranks_trains_on_the_same_rows(sizes: list[int], rows_per_step: int, masked: bool) -> None:
    blocks, _ = stream(sizes, [], masked)
    alone = list(step_batches(blocks, rows_per_step, start_step=5))
    assert [batch.step for batch in alone] == list(range(5, 5 + len(alone)))
    for world_size in (1, 2, 3, 4, 8):
        ranks = [list(step_batches(blocks, rows_per_step, rank, world_size, 5)) for rank in range(world_size)]
        for together, parts in zip(alone, zip(*ranks, strict=True), strict=True):
            assert np.array_equal(np.concatenate([part.tokens for part in parts]), together.tokens)
            assert {(p.step, p.cursor, p.progress, p.counts) for p in (*parts, together)} == {
                (together.step, together.cursor, together.progress, together.counts)
            }
            assert max(len(p.tokens) for p in parts) - min(len(p.tokens) for p in parts) <= 1
            assert masks(parts) == masks((together,))


def masks(parts: tuple[PackedBatch, ...]) -> list[list[bool]]:
    return [row for part in parts if part.mask is not None for row in part.mask.tolist()]


@given(n_rows=st.integers(0, 100), world_size=st.integers(1, 12))
def test_ranks_share_the_rows(n_rows: int, world_size: int) -> None:
    parts = [range(n_rows)[rank_part(n_rows, rank, world_size)] for rank in range(world_size)]
    assert [row for part in parts for row in part] == list(range(n_rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1

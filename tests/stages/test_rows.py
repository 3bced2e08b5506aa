"""The law of rows: what a step trains on is the same for every number of ranks, batch size, resume and packing."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache, cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat_ray.corpus.items import item_order
from nanochat_ray.corpus.reader import scan_data
from nanochat_ray.messages import Cursor, PackCounts, PackedBatch, PackedRows
from nanochat_ray.stages.rows import CorpusRows, MixtureRows, RowSource, plain_row_blocks
from nanochat_ray.stages.step import micro_batches
from nanochat_ray.tasks.rows import TaskSources
from nanochat_ray.text.packing import step_batches
from nanochat_ray.text.tokenizer import Tokenizer
from tests.conftest import sentences, write_shards

T = 24
WORLDS = (1, 2, 3, 4, 8)


class Packed:
    """A source that packs each item once, so that a law can be asked a thousand times."""

    def __init__(self, source: RowSource):
        self.source, self.seed, self.epochs, self.n_items = source, source.seed, source.epochs, source.n_items
        self.pack = cache(source.pack)
        self.sizes = source.sizes

    @cached_property
    def alone(self) -> list[PackedRows]:
        return [self.pack(item) for item in range(self.n_items)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Packed]:
    root = tmp_path_factory.mktemp("rows")
    write_shards(root / "text", shards=3, documents=60, row_group=8)
    write_shards(root / "text", shards=1, documents=5, row_group=1)  # single documents: items that fill no row
    Tokenizer.train(iter(sentences(150)), 300).save(root / "tokenizer")
    text = CorpusRows(scan_data(str(root / "text")), root / "tokenizer", T, seed=3)
    talk = root / "talk.jsonl"
    talk.write_text("".join(
        json.dumps([{"role": "user", "content": f"say {k}"}, {"role": "assistant", "content": f"{k} " * (1 + k % 5)}])
        + "\n" for k in range(1500)
    ))  # fmt: skip
    specs = (f"json={talk}",)
    chat = MixtureRows(specs, "train", TaskSources(), root / "tokenizer", T, seed=3, epochs=2)
    found = {"best-fit": text, "stream": replace(text, packing="stream"), "conversations": chat}
    return {name: Packed(source) for name, source in found.items()}


def batches(source: Packed, cursor: Cursor, rows_per_step: int, rank: int = 0, world: int = 1, start: int = 0):
    return step_batches(plain_row_blocks(source, cursor), rows_per_step, rank, world, start)


def joined(parts: list[PackedBatch]) -> tuple:
    """What the ranks hold together, and what they all say."""
    masks = [part.mask for part in parts if part.mask is not None]
    tokens = np.concatenate([part.tokens for part in parts])
    mask = np.concatenate(masks).tobytes() if masks else None
    said = {(part.step, part.cursor, part.progress, part.counts) for part in parts}
    assert len(said) == 1
    assert max(len(part.tokens) for part in parts) - min(len(part.tokens) for part in parts) <= 1
    return tokens.tobytes(), tokens.shape, tokens.dtype, mask, said.pop()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["best-fit", "stream", "conversations"]),
    rows_per_step=st.integers(1, 19),
    runs=st.lists(st.tuples(st.sampled_from(WORLDS), st.integers(0, 9)), min_size=1, max_size=5),
)
def test_rows_of_a_step_depend_on_nothing_else(
    sources: dict[str, Packed], name: str, rows_per_step: int, runs: list[tuple[int, int]]
) -> None:
    """Runs of some steps each, every one resumed at the last one's cursor with its own number of ranks."""
    source = sources[name]
    n_steps = sum(length for _, length in runs)
    wanted = [joined([batch]) for batch in islice(batches(source, Cursor(), rows_per_step), n_steps)]
    found: list[tuple] = []
    cursor = Cursor()
    for world, length in runs:
        start = len(found)
        ranks = [islice(batches(source, cursor, rows_per_step, rank, world, start), length) for rank in range(world)]
        for parts in zip(*ranks, strict=True):
            found.append(joined(list(parts)))
            cursor = Cursor.from_json(json.loads(json.dumps(parts[0].cursor.to_json())))
    assert found == wanted


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["best-fit", "stream", "conversations"]), world=st.sampled_from(WORLDS),
    rows_per_step=st.integers(1, 12), device_batch_size=st.integers(1, 15),
)
def test_micro_batches_are_the_step_in_pieces(
    sources: dict[str, Packed], name: str, world: int, rows_per_step: int, device_batch_size: int
) -> None:
    """Also where ranks outnumber the rows and some get none."""
    source = sources[name]
    alone = next(batches(source, Cursor(), rows_per_step))
    inputs, targets = [], []
    for rank in range(world):
        part = next(batches(source, Cursor(), rows_per_step, rank, world))
        for x, y in micro_batches(part, device_batch_size, "cpu"):
            assert 1 <= len(x) <= device_batch_size
            inputs.append(x.numpy())
            targets.append(y.numpy())
    assert np.array_equal(np.concatenate(inputs), alone.tokens[:, :-1])
    wanted = alone.tokens[:, 1:].astype(np.int64)
    if alone.mask is not None:
        wanted[~alone.mask[:, 1:]] = -1
    assert np.array_equal(np.concatenate(targets), wanted)


@pytest.mark.parametrize("name", ["best-fit", "stream", "conversations"])
@pytest.mark.parametrize("rows_per_step", [1, 7, 40])
def test_counts_are_those_of_the_items_passed(sources: dict[str, Packed], name: str, rows_per_step: int) -> None:
    """After every step: all items before the cursor, those without rows too, and the share of the running one."""
    source = sources[name]
    orders = [item_order(source.n_items, source.seed, epoch) for epoch in range(2)]
    found, seen_barren = PackCounts(), 0
    for batch in batches(source, Cursor(), rows_per_step):
        at = batch.cursor
        if at.epoch > 1:
            break
        found += batch.counts
        passed = [*(orders[0] if at.epoch else []), *orders[at.epoch][: at.item]]
        running = source.pack(orders[at.epoch][at.item])
        share = running.counts.share(0, at.row, len(running))
        assert found == sum((source.pack(item).counts for item in passed), share)
        seen_barren = found.barren_items
    assert seen_barren > 0 or name == "conversations"


def test_finite_rows_are_counted_to_the_end(sources: dict[str, Packed]) -> None:
    source = sources["conversations"]
    found = sum((batch.counts for batch in batches(source, Cursor(), 7)), PackCounts())
    assert found == sum((rows.counts for rows in source.alone * 2), PackCounts())
    assert found.documents == 2 * sum(source.source.sizes()) and found.waste_frac == 0


def test_packings_differ_and_stream_wastes_less(sources: dict[str, Packed]) -> None:
    best, stream = (sum((r.counts for r in sources[n].alone), PackCounts()) for n in ("best-fit", "stream"))
    assert best.tokens_read == stream.tokens_read
    assert stream.waste_frac < best.waste_frac


def test_no_item_that_fills_a_row_is_an_error(sources: dict[str, Packed]) -> None:
    text = sources["best-fit"].source
    assert isinstance(text, CorpusRows)
    with pytest.raises(ValueError, match=r"fills a row.*--max-seq-len"):
        next(batches(Packed(replace(text, sequence_len=2**14)), Cursor(), 2))


def test_a_cursor_of_other_data_is_an_error(sources: dict[str, Packed]) -> None:
    for name in ("best-fit", "conversations"):
        with pytest.raises(ValueError, match="no place in"):
            next(batches(sources[name], Cursor(0, 10_000, 0), 2))
        with pytest.raises(ValueError, match="checkpoint is behind"):
            next(batches(sources[name], Cursor(0, 0, 10_000), 2))


def test_a_source_crosses_to_another_process_small(sources: dict[str, Packed], tmp_path: Path) -> None:
    import pickle

    for packed in sources.values():
        copy = pickle.loads(pickle.dumps(packed.source))
        assert copy == packed.source
        assert np.array_equal(copy.pack(2 % copy.n_items).tokens, packed.pack(2 % copy.n_items).tokens)

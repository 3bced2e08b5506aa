"""The rows that the dealer hands out over Ray Data are the plain ones, whatever is killed, and every wait ends."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_ray.corpus.reader import scan_data
from nanochat_ray.messages import ClusterError, Cursor, PackedBatch
from nanochat_ray.stages.rows import CorpusRows, plain_row_blocks
from nanochat_ray.text.packing import step_batches
from nanochat_ray.text.tokenizer import Tokenizer
from tests.conftest import sentences, write_shards

pytestmark = pytest.mark.usefixtures("ray_cluster")

T, ROWS_PER_STEP, FIRST_STEP = 32, 7, 3


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(iter(sentences(200)), 300).save(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> CorpusRows:
    """Items of many sizes, some of which fill no row."""
    folder = tmp_path_factory.mktemp("uneven")
    write_shards(folder, shards=3, documents=400, row_group=25)
    pq.write_table(pa.table({"text": sentences(9)}), folder / "a_small.parquet", row_group_size=1)
    return CorpusRows(scan_data(str(folder)), tokenizer_folder, T, seed=5)


def plain(rows: CorpusRows, cursor: Cursor, world: int, n_steps: int) -> list[list[PackedBatch]]:
    ranks = range(world)
    streams = [step_batches(plain_row_blocks(rows, cursor), ROWS_PER_STEP, r, world, FIRST_STEP) for r in ranks]
    return [list(islice(stream, n_steps)) for stream in streams]


def assert_same(got: PackedBatch, want: PackedBatch) -> None:
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert got.tokens.dtype == want.tokens.dtype
    assert (got.step, got.cursor, got.progress, got.counts) == (want.step, want.cursor, want.progress, want.counts)


def start(rows: CorpusRows, world: int, actors: int = 2, per_execution: int = 1024):
    from nanochat_ray.data.dealer import start_dealer

    return start_dealer(rows, ROWS_PER_STEP, world, actors, "test", per_execution)


def deal(dealer, stream: str, cursor: Cursor, world: int) -> list[Iterator[PackedBatch]]:
    import ray

    from nanochat_ray.data.dealer import batches_from

    ray.get(dealer.open.remote(stream, cursor, FIRST_STEP, world), timeout=60)
    return [batches_from(dealer, stream, FIRST_STEP, rank, wait_s=120) for rank in range(world)]


def packers() -> list[psutil.Process]:
    """Ray Data's packing processes of this session's cluster."""
    mine = psutil.Process().children(recursive=True)
    return [process for process in mine if "MapWorker" in " ".join(process.cmdline())]


def test_every_world_and_resume_gets_the_plain_rows(rows: CorpusRows) -> None:
    """One dealer, opened again at a cursor of the stream for other numbers of ranks."""
    import ray

    alone = plain(rows, Cursor(), 1, 60)[0]
    cuts = np.random.default_rng(1).integers(1, 50, 2)
    dealer = start(rows, 3)
    starts = (3, Cursor()), (1, alone[cuts[0]].cursor), (2, alone[cuts[1]].cursor)
    for number, (world, cursor) in enumerate(starts):
        compare(rows, deal(dealer, f"s{number}", cursor, world), cursor, world)
    ray.kill(dealer)


def test_the_other_packing_gets_its_plain_rows(rows: CorpusRows) -> None:
    import ray

    source = replace(rows, packing="stream")
    dealer = start(source, 2, actors=1)
    compare(source, deal(dealer, "s", Cursor(0, 9, 2), 2), Cursor(0, 9, 2), 2)
    ray.kill(dealer)


def compare(rows: CorpusRows, dealt: list[Iterator[PackedBatch]], cursor: Cursor, world: int, n_steps: int = 8) -> None:
    for wanted in zip(*plain(rows, cursor, world, n_steps), strict=True):
        for got, want in zip((next(rank) for rank in dealt), wanted, strict=True):
            assert_same(got, want)


@pytest.mark.slow
def test_a_killed_packing_process_changes_nothing(rows: CorpusRows) -> None:
    import ray

    dealer = start(rows, 2)
    dealt = deal(dealer, "s", Cursor(), 2)
    wanted = plain(rows, Cursor(), 2, 100)
    killed = []
    for step, pair in enumerate(zip(*wanted, strict=True)):
        if step in (5, 40):
            victim = packers()[0]
            victim.kill()
            killed.append(victim.pid)
        for got, want in zip((next(rank) for rank in dealt), pair, strict=True):
            assert_same(got, want)
    assert len(set(killed)) == 2
    ray.kill(dealer)


@pytest.mark.slow
def test_the_stream_goes_on_behind_an_execution(rows: CorpusRows) -> None:
    """Ray Data's executions end, also with an item that fills no row; epochs do too."""
    import ray

    dealer = start(rows, 1, per_execution=23)
    batches = deal(dealer, "s", Cursor(), 1)[0]
    for got, want in zip(batches, plain(rows, Cursor(), 1, 90)[0], strict=False):
        assert_same(got, want)
    assert want.cursor.epoch == 1
    ray.kill(dealer)


def test_a_dead_dealer_is_a_clear_error(rows: CorpusRows) -> None:
    import ray

    dealer = start(rows, 1)
    batches = deal(dealer, "s", Cursor(), 1)[0]
    next(batches)
    workers = packers()
    assert workers
    ray.kill(dealer)
    with pytest.raises(ClusterError, match=r"dealer died; rank 0 was to get step \d"):
        list(batches)
    psutil.wait_procs(workers, timeout=30)
    assert not any(process.is_running() for process in workers)  # nobody packs on for nobody


def test_what_packing_raises_reaches_the_rank_as_it_is(tmp_path: Path, tokenizer_folder: Path) -> None:
    """A shard that is gone is a FileNotFoundError, a damaged one a ValueError: what a person can do something about."""
    import ray

    for number, (damage, error) in enumerate(((None, FileNotFoundError), (b"\xff", ValueError))):
        folder = write_shards(tmp_path / str(number))
        source = CorpusRows(scan_data(str(folder)), tokenizer_folder, T, seed=5)
        for path in folder.iterdir():
            whole = path.read_bytes()
            path.unlink() if damage is None else path.write_bytes(whole[:4] + damage * 400 + whole[404:])
        dealer = start(source, 1, actors=1)
        batches = deal(dealer, "s", Cursor(), 1)[0]
        try:
            with pytest.raises(error, match="shard_0000"):
                deque(batches, maxlen=0)  # until the damaged item's turn has come
        finally:
            ray.kill(dealer)


def test_a_cursor_of_other_data_is_an_error(rows: CorpusRows) -> None:
    import ray

    dealer = start(rows, 1, actors=1)
    with pytest.raises(ValueError, match="is no place in 41 work items"):
        next(deal(dealer, "a", Cursor(0, 99, 0), 1)[0])
    with pytest.raises(ValueError, match="the checkpoint is behind 500"):
        next(deal(dealer, "b", Cursor(0, 0, 500), 1)[0])
    ray.kill(dealer)


def test_no_wait_is_endless(rows: CorpusRows, monkeypatch, caplog) -> None:
    """Without a CPU for packing the rank is told why, again and again, and gives up at its deadline."""
    import ray

    from nanochat_ray.data import dealer as module

    monkeypatch.setattr(module, "SAY_EVERY_S", 1.0)
    blocker = ray.remote(num_cpus=4)(Sleeper).remote()
    ray.get(blocker.ready.remote(), timeout=60)
    dealer = start(rows, 2)
    ray.get(dealer.open.remote("s", Cursor(), 0, 2), timeout=60)
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"no rows for step 0 within 3 s: nothing packed yet; 2 data processes need"):
        next(module.batches_from(dealer, "s", 0, 1, wait_s=3))
    assert time.monotonic() - began < 20
    assert "rank 1: waiting for the rows of step 0" in caplog.text
    ray.kill(dealer)
    ray.kill(blocker)


class Sleeper:
    def ready(self) -> bool:
        return True

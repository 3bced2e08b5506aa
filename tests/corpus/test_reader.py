"""Reading parquet shards, what is wrong with them, and the stream of rows that is packed from them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from nanochat_ray.corpus import reader
from nanochat_ray.corpus.items import WorkItem, items_from, row_block
from nanochat_ray.corpus.reader import (
    DataManifest,
    changed_shards,
    iter_documents,
    pack_item,
    read_row_group,
    read_slices,
    scan_data,
    validation_rows,
)
from nanochat_ray.messages import Cursor, PackCounts
from nanochat_ray.text.packing import RowBlock, cut_steps, reference_rows, step_batches
from nanochat_ray.text.tokenizer import Tokenizer, training_texts
from tests.real_data import needs_real_data, real_data

T = 24


def write_shard(path: Path, texts: Sequence[str | None], row_group: int = 8, column: str = "text") -> None:
    pq.write_table(pa.table({column: pa.array(texts, pa.string()), "id": range(len(texts))}), path, row_group)


def texts(first: int, n: int) -> list[str]:
    return [" ".join(f"w{k}" for k in range(first + i, first + i + (i * 7) % 11)) for i in range(n)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_shard(folder / "b.parquet", texts(100, 30))
    write_shard(folder / "a.parquet", texts(0, 21))
    write_shard(folder / "val.parquet", texts(500, 40), row_group=9)
    (folder / "notes.txt").write_text("not a shard")
    (folder / "sub").mkdir()
    return folder


@pytest.fixture(scope="module")
def manifest(folder: Path) -> DataManifest:
    return scan_data(str(folder))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(iter(texts(0, 40)), 300)


def blocks(
    manifest: DataManifest, tokenizer: Tokenizer, cursor: Cursor, epochs: int | None = None
) -> Iterator[RowBlock]:
    for visit in items_from(cursor, manifest.n_items, seed=42, epochs=epochs):
        rows = pack_item(manifest, manifest.item(visit.item), tokenizer, T)
        resumed = (visit.epoch, visit.position) == (cursor.epoch, cursor.item)
        yield row_block(rows, visit, cursor.row if resumed else 0)


# ---- what is there


def test_scan(manifest: DataManifest) -> None:
    assert [(s.name, s.row_groups, s.rows) for s in manifest.train] == [("a.parquet", 3, 21), ("b.parquet", 4, 30)]
    assert (manifest.val.name, manifest.val.rows) == ("val.parquet", 40)
    assert manifest.n_items == 7
    assert [manifest.item(k) for k in (0, 2, 3, 6)] == [WorkItem(0, 0), WorkItem(0, 2), WorkItem(1, 0), WorkItem(1, 3)]
    assert all(Path(shard.path).stat().st_size == shard.bytes for shard in manifest.train)


def test_manifest_survives_json(manifest: DataManifest) -> None:
    again = DataManifest.from_json(json.loads(json.dumps(manifest.to_json())))
    assert again == manifest and again.hash == manifest.hash


def test_the_hash_follows_the_data_not_the_place(folder: Path, manifest: DataManifest, tmp_path: Path) -> None:
    for name in ("a", "b", "val"):
        (tmp_path / f"{name}.parquet").write_bytes((folder / f"{name}.parquet").read_bytes())
    assert scan_data(str(tmp_path)).hash == manifest.hash
    assert scan_data(tmp_path.as_uri()).hash == manifest.hash
    assert scan_data(str(tmp_path), max_shards=1).hash != manifest.hash
    write_shard(tmp_path / "a.parquet", texts(1, 21))
    assert scan_data(str(tmp_path)).hash != manifest.hash


def test_validation_is_pinned_by_name(folder: Path) -> None:
    manifest = scan_data(str(folder), val_shard="a.parquet")
    assert manifest.val.name == "a.parquet"
    assert [shard.name for shard in manifest.train] == ["b.parquet", "val.parquet"]
    assert [shard.name for shard in scan_data(str(folder), val_shard="a.parquet", max_shards=1).train] == ["b.parquet"]


def test_documents_in_order(folder: Path, manifest: DataManifest) -> None:
    assert list(iter_documents(manifest, "train")) == texts(0, 21) + texts(100, 30)
    assert list(iter_documents(manifest, "val")) == texts(500, 40)
    slices = list(read_slices(manifest, "val", 4))
    assert [len(piece) for piece in slices] == [4, 4, 1] * 4 + [4]
    assert [text for piece in slices for text in piece] == texts(500, 40)
    by_item = [text for k in range(7) for text in read_row_group(manifest, manifest.item(k))]
    assert by_item == texts(0, 21) + texts(100, 30)
    uri = scan_data(folder.as_uri())
    assert list(iter_documents(uri, "train")) == list(iter_documents(manifest, "train"))


# ---- what is wrong with it


def test_missing_and_empty_folders(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        scan_data(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        scan_data((tmp_path / "nowhere").as_uri())
    with pytest.raises(FileNotFoundError, match="not a folder"):
        scan_data(str(folder / "a.parquet"))
    with pytest.raises(FileNotFoundError, match=r"no \*\.parquet"):
        scan_data(str(tmp_path))


def test_one_shard_leaves_nothing_to_validate_on(tmp_path: Path) -> None:
    write_shard(tmp_path / "only.parquet", texts(0, 5))
    with pytest.raises(ValueError, match=r"only\.parquet.*second"):
        scan_data(str(tmp_path))


def test_wrong_column(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no column 'content'.*\['text', 'id'\]"):
        scan_data(str(folder), text_column="content")
    with pytest.raises(ValueError, match="holds int64, not text"):
        scan_data(str(folder), text_column="id")


def test_the_nearest_validation_shard_is_named(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nearest name is 'val\.parquet'"):
        scan_data(str(folder), val_shard="vel.parquet")


def test_no_documents(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", [])
    write_shard(tmp_path / "b.parquet", texts(0, 3))
    with pytest.raises(ValueError, match=r"training shards .* hold no documents"):
        scan_data(str(tmp_path))
    with pytest.raises(ValueError, match=r"a\.parquet .* holds no documents"):
        scan_data(str(tmp_path), val_shard="a.parquet")


def test_corrupt_shards_are_named_and_skipped_only_if_asked(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_shard(tmp_path / f"{name}.parquet", texts(0, 20))
    half = (tmp_path / "b.parquet").read_bytes()[:-100]
    (tmp_path / "b.parquet").write_bytes(half)
    with pytest.raises(ValueError, match=r"b\.parquet is not a readable parquet file.*--skip-corrupt"):
        scan_data(str(tmp_path))
    with pytest.warns(UserWarning, match=r"b\.parquet is left out"):
        manifest = scan_data(str(tmp_path), skip_corrupt=True)
    assert [shard.name for shard in manifest.train] == ["a.parquet"] and manifest.skipped == ("b.parquet",)
    with pytest.raises(ValueError, match=r"b\.parquet.*validation shard"):
        scan_data(str(tmp_path), val_shard="b.parquet", skip_corrupt=True)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="hold no documents"):
        scan_data(str(tmp_path), skip_corrupt=True)


def test_a_row_group_that_cannot_be_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A good footer over damaged pages: found when the row group is read."""
    for name in ("a", "b"):
        write_shard(tmp_path / f"{name}.parquet", texts(0, 20))
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:4] + b"\xff" * 200 + whole[204:])
    manifest = scan_data(str(tmp_path))
    with pytest.raises(ValueError, match=r"row group 0 of data shard .*a\.parquet cannot be read"):
        read_row_group(manifest, WorkItem(0, 0))
    assert len(read_row_group(manifest, WorkItem(0, 2))) == 4
    tolerant = scan_data(str(tmp_path), skip_corrupt=True)
    with pytest.warns(UserWarning, match="row group 0"):
        rows = pack_item(tolerant, WorkItem(0, 0), tokenizer, T)
    assert len(rows) == 0 and rows.counts == PackCounts(barren_items=1)
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(FileNotFoundError):  # gone is not corrupt
        read_row_group(tolerant, WorkItem(0, 2))


class Far:
    """A store that shows a local folder, and whose connections break after some reads."""

    type_name = "far"

    def __init__(self, reads: int | None = None):
        self.reads, self.near = reads, fs.LocalFileSystem()

    def get_file_info(self, what):
        return self.near.get_file_info(what)

    def open_input_file(self, path: str):
        if self.reads == 0:
            raise OSError("could not connect")
        file, far = self.near.open_input_file(path), self

        class Connection:
            closed = False
            close, seek, tell, size = file.close, file.seek, file.tell, file.size

            def read_buffer(self, n: int) -> pa.Buffer:
                if far.reads is not None:
                    far.reads -= 1
                    if far.reads < 1:
                        raise OSError("connection reset")
                return file.read_buffer(n)

        return Connection()


@pytest.mark.parametrize("skip_corrupt", [False, True])
def test_a_connection_that_breaks_is_no_corrupt_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skip_corrupt: bool
) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / f"{name}.parquet", [text * 500 for text in texts(0, 200)], row_group=50)
    far = Far()
    monkeypatch.setattr(reader, "_file_system", lambda source: (far, str(tmp_path)))
    manifest = scan_data("far://x", skip_corrupt=skip_corrupt)
    wanted = read_row_group(manifest, WorkItem(0, 1))
    assert wanted == [text * 500 for text in texts(0, 200)[50:100]]
    broken = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for far.reads in range(5):
            try:
                assert read_row_group(manifest, WorkItem(0, 1)) == wanted
            except ConnectionError as error:
                assert "a.parquet" in str(error)
                broken += 1
        assert 1 < broken < 5
        far.reads = 1
        with pytest.raises(ConnectionError):
            scan_data("far://x", skip_corrupt=skip_corrupt)
        far.reads = 1
        with pytest.raises(ConnectionError):
            changed_shards(manifest)
    far.reads = None
    assert not changed_shards(manifest)


def test_a_corrupt_shard_far_away_is_still_corrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        write_shard(tmp_path / f"{name}.parquet", texts(0, 20))
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:4] + b"\xff" * 200 + whole[204:])
    (tmp_path / "b.parquet").write_bytes(whole[:-100])
    monkeypatch.setattr(reader, "_file_system", lambda source: (Far(), str(tmp_path)))
    with pytest.raises(ValueError, match=r"b\.parquet is not a readable parquet file"):
        scan_data("far://x")
    with pytest.warns(UserWarning, match=r"b\.parquet is left out"):
        manifest = scan_data("far://x", skip_corrupt=True)
    with pytest.warns(UserWarning, match="row group 0"):
        assert read_row_group(manifest, WorkItem(0, 0)) == []
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(FileNotFoundError):
        read_row_group(manifest, WorkItem(0, 2))


def test_missing_values_are_empty_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_shard(tmp_path / "a.parquet", ["one two", None, "", "three"])
    write_shard(tmp_path / "b.parquet", ["val"])
    manifest = scan_data(str(tmp_path))
    assert read_row_group(manifest, WorkItem(0, 0)) == ["one two", "", "", "three"]
    rows = pack_item(manifest, WorkItem(0, 0), tokenizer, 4)
    counts = rows.counts
    assert (counts.documents, counts.empty) == (4, 2)
    assert not (rows.tokens == tokenizer.bos_id).all(axis=1).any()


def test_shards_that_changed_since_are_named(tmp_path: Path) -> None:
    for k in range(14):
        write_shard(tmp_path / f"s{k:02d}.parquet", texts(k, 20))
    for source in (str(tmp_path), tmp_path.as_uri()):
        manifest = scan_data(source)
        manifest.check()
        (tmp_path / "new.parquet").write_bytes(b"not ours")
        manifest.check()
        (tmp_path / "new.parquet").unlink()
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "s00.parquet").unlink()
    write_shard(tmp_path / "s01.parquet", texts(1, 60))
    (tmp_path / "s02.parquet").write_bytes(b"\0" * len(whole["s02.parquet"]))
    (tmp_path / "s13.parquet").unlink()  # the validation shard counts too
    changed = changed_shards(manifest)
    assert [line.split(":")[0] for line in changed] == ["s00.parquet", "s01.parquet", "s02.parquet", "s13.parquet"]
    assert "missing" in changed[0] and "bytes, was" in changed[1] and "no readable parquet" in changed[2]
    with pytest.raises(ValueError, match=r"(?s)s00\.parquet: missing.*s13\.parquet.*--model-tag"):
        manifest.check()
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="and 4 more"):
        manifest.check()


def test_shards_of_equal_size_with_other_row_groups_are_told_apart(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", texts(0, 20))
    write_shard(tmp_path / "b.parquet", texts(0, 20))
    manifest = scan_data(str(tmp_path))
    write_shard(tmp_path / "a.parquet", texts(0, 20), row_group=5)
    now = (tmp_path / "a.parquet").stat().st_size
    same_size = replace(manifest, train=(replace(manifest.train[0], bytes=now),))
    assert changed_shards(same_size) == ["a.parquet: 4 row groups and 20 documents, was 3 row groups and 20 documents"]


# ---- the stream of rows


def test_the_stream_is_resumed_at_every_cursor(manifest: DataManifest, tokenizer: Tokenizer) -> None:
    rows_per_step = 3
    steps = list(islice(cut_steps(blocks(manifest, tokenizer, Cursor()), rows_per_step), 40))
    assert steps[-1].cursor.epoch >= 1
    for k, step in enumerate(steps[:-1]):
        resumed = next(cut_steps(blocks(manifest, tokenizer, step.cursor), rows_per_step))
        assert np.array_equal(resumed.rows.tokens, steps[k + 1].rows.tokens)
        assert (resumed.cursor, resumed.progress) == (steps[k + 1].cursor, steps[k + 1].progress)
    assert all(a.progress < b.progress for a, b in pairwise(steps))


@settings(max_examples=20, deadline=None)
@given(
    worlds=st.lists(st.sampled_from([1, 2, 3, 8]), min_size=2, max_size=4),
    rows_per_step=st.integers(1, 7),
    length=st.integers(1, 5),
)
def test_rows_of_a_step_do_not_depend_on_workers_or_resumes(
    manifest: DataManifest, tokenizer: Tokenizer, worlds: list[int], rows_per_step: int, length: int
) -> None:
    """The run changes its number of workers every `length` steps and still trains on what one process would."""
    n_steps = length * len(worlds)
    alone = list(islice(step_batches(blocks(manifest, tokenizer, Cursor()), rows_per_step), n_steps))
    cursor, found = Cursor(), []
    for start, world_size in zip(range(0, n_steps, length), worlds, strict=True):
        ranks = [
            list(islice(step_batches(blocks(manifest, tokenizer, cursor), rows_per_step, r, world_size, start), length))
            for r in range(world_size)
        ]
        for parts in zip(*ranks, strict=True):
            assert len({(part.step, part.cursor, part.progress) for part in parts}) == 1
            found.append((parts[0].step, parts[0].cursor, np.concatenate([part.tokens for part in parts])))
        cursor = found[-1][1]
    for batch, (step, at, tokens) in zip(alone, found, strict=True):
        assert (batch.step, batch.cursor) == (step, at)
        assert np.array_equal(batch.tokens, tokens)


def test_a_finite_stream_ends_with_a_short_step(manifest: DataManifest, tokenizer: Tokenizer) -> None:
    n_rows = sum(len(block.rows) for block in blocks(manifest, tokenizer, Cursor(), epochs=1))
    batches = list(step_batches(blocks(manifest, tokenizer, Cursor(), epochs=1), n_rows - 1))
    assert [len(batch.tokens) for batch in batches] == [n_rows - 1, 1]
    assert batches[-1].progress == 1.0
    assert list(blocks(manifest, tokenizer, batches[-1].cursor, epochs=1))[-1].rows.tokens.size == 0


def test_an_item_is_packed_the_same_every_time(manifest: DataManifest, tokenizer: Tokenizer) -> None:
    again = DataManifest.from_json(manifest.to_json())
    for k in range(manifest.n_items):
        first = pack_item(manifest, manifest.item(k), tokenizer, T)
        second = pack_item(again, again.item(k), tokenizer, T, num_threads=3)
        assert np.array_equal(first.tokens, second.tokens)
        assert (first.tokens[:, 0] == tokenizer.bos_id).all()


# ---- validation


def test_validation_rows_are_a_fixed_set(manifest: DataManifest, tokenizer: Tokenizer) -> None:
    """A small split is gone through once by the reference loader, each document at most once."""
    rows = validation_rows(manifest, tokenizer, T, 10**6)
    documents = tokenizer.encode_to_arrays(texts(500, 40))
    expected = list(reference_rows([documents], T + 1))
    assert np.array_equal(rows.tokens, np.stack(expected))
    assert 5 < len(rows) <= sum(map(len, documents)) // (T + 1)
    assert np.array_equal(validation_rows(manifest, tokenizer, T, 5).tokens, rows.tokens[:5])
    assert len(validation_rows(manifest, tokenizer, T, 3, split="train")) == 3


def test_large_validation_goes_round(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_shard(tmp_path / "a.parquet", ["x"])
    write_shard(tmp_path / "b.parquet", [f"{k} " * (k % 9) for k in range(1300)], row_group=300)
    manifest = scan_data(str(tmp_path))
    documents = [tokenizer.encode_to_arrays(piece) for piece in read_slices(manifest, "val")]
    once = len(list(reference_rows(documents, T + 1)))
    rows = validation_rows(manifest, tokenizer, T, once + 20)
    expected = list(islice(reference_rows(documents * 2, T + 1), once + 20))
    assert np.array_equal(rows.tokens, np.stack(expected))


def test_too_little_to_validate_on(manifest: DataManifest, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="do not fill 1 row of 5001 tokens"):
        validation_rows(manifest, tokenizer, 5000, 10)


@needs_real_data
def test_waste_on_real_text() -> None:
    manifest = scan_data(str(real_data() / "base_data"))
    assert len(manifest.train) == 6 and manifest.val.name == "shard_00006.parquet"
    tokenizer = Tokenizer.train(training_texts(iter_documents(manifest, "train"), 2_000_000, 10_000), 4096)
    items = [manifest.item(k) for k in range(0, manifest.n_items, 2)]
    for sequence_len in (512, 2048):
        counts = sum((pack_item(manifest, item, tokenizer, sequence_len).counts for item in items), PackCounts())
        assert counts.waste_frac - counts.floor_frac < 0.02

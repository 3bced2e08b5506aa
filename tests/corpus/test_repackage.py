"""Any data set becomes shards: each document once, in row groups of 1,024, in bounded memory, whole or not at all."""

from __future__ import annotations

import gzip
import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat_ray.corpus import repackage as module
from nanochat_ray.corpus.download import file_sha256
from nanochat_ray.corpus.fetching import download
from nanochat_ray.corpus.reader import iter_documents, scan_data
from nanochat_ray.corpus.repackage import ROW_GROUP_DOCS, Repackaged, read_documents, repackage
from nanochat_ray.corpus.shards import list_source, read_checksums

ODD = ["", "one", "zwei\nLines\r\n", "ünïcödé 漢字 🎈", "\u2028 not a line's end \x00", " ", "x" * 3000]


def documents(n: int) -> list[str]:
    return [f"{ODD[i % len(ODD)]} {i}" if i % len(ODD) else "" for i in range(n)]


def write_parquet(path: Path, texts: list[str | None], column: str = "text", kind: pa.DataType = pa.string()) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": list(range(len(texts))), column: pa.array(texts, kind)}), path, row_group_size=100)


def written(folder: Path) -> list[str]:
    manifest = scan_data(str(folder))
    return [*iter_documents(manifest, "val"), *iter_documents(manifest, "train")]


@pytest.fixture
def made(tmp_path) -> Path:
    """5,000 documents in three parquet files, one of them below."""
    texts = documents(5000)
    write_parquet(tmp_path / "in" / "a.parquet", texts[:2000])
    write_parquet(tmp_path / "in" / "b" / "c.parquet", texts[2000:2001], kind=pa.large_string())
    write_parquet(tmp_path / "in" / "d.parquet", texts[2001:])
    return tmp_path / "in"


def test_every_document_once_in_order(made, tmp_path):
    texts = documents(5000)
    result = repackage(str(made), tmp_path / "out", chars_per_shard=500_000, val_docs=700)
    assert written(tmp_path / "out") == texts  # validation has the first
    assert result == Repackaged(
        tmp_path / "out", 5000, sum(map(len, texts)), sum(not text for text in texts), result.shards
    )
    manifest = scan_data(str(tmp_path / "out"))
    assert manifest.val.name == f"shard_{result.shards - 1:05d}.parquet" and manifest.val.rows == 700
    assert [shard.name for shard in manifest.train] == [f"shard_{k:05d}.parquet" for k in range(result.shards - 1)]
    for shard in manifest.train[:-1]:  # each ends with the row group that reaches the size
        chars = [sum(map(len, group)) for group in groups(Path(shard.path))]
        assert sum(chars) >= 500_000 > sum(chars[:-1])
        assert shard.rows % ROW_GROUP_DOCS == 0
    assert result.shards > 2


def groups(path: Path) -> list[list[str]]:
    file = pq.ParquetFile(path)
    return [file.read_row_group(k)["text"].to_pylist() for k in range(file.num_row_groups)]


def test_the_format_of_a_shard(made, tmp_path):
    repackage(str(made), tmp_path / "out", chars_per_shard=1e9, val_docs=1500)
    sizes = {}
    for path in sorted((tmp_path / "out").glob("*.parquet")):
        file = pq.ParquetFile(path)
        assert file.schema_arrow.names == ["text"] and file.schema_arrow.field("text").type == pa.string()
        for k in range(file.num_row_groups):
            column = file.metadata.row_group(k).column(0)
            assert column.compression == "ZSTD" and not column.is_stats_set and not column.has_dictionary_page
        sizes[path.name] = [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)]
    assert sizes == {"shard_00000.parquet": [1024, 1024, 1024, 428], "shard_00001.parquet": [1024, 476]}


def test_the_record_makes_the_folder_a_source(made, tmp_path):
    result = repackage(str(made), tmp_path / "out", chars_per_shard=500_000, val_docs=700)
    record = json.loads((tmp_path / "out" / "checksums.json").read_text())
    assert (record["documents"], record["val_shard"]) == (5000, f"shard_{result.shards - 1:05d}.parquet")
    for name, file in read_checksums(tmp_path / "out").items():
        assert (file.size_bytes, file.sha256) == (
            (tmp_path / "out" / name).stat().st_size, file_sha256(tmp_path / "out" / name)
        )
    names, checksums = list_source(str(tmp_path / "out"))
    assert len(names) == len(checksums) == result.shards
    download(str(tmp_path / "out"), names, tmp_path / "mirror", checksums=checksums)
    assert written(tmp_path / "mirror") == documents(5000)


def test_the_same_input_gives_the_same_bytes(made, tmp_path):
    for seed in (None, 42):
        for k in range(2):
            repackage(str(made), tmp_path / f"{seed}{k}", chars_per_shard=500_000, val_docs=700, seed=seed)
        assert read_checksums(tmp_path / f"{seed}0") == read_checksums(tmp_path / f"{seed}1")
    assert read_checksums(tmp_path / "None0") != read_checksums(tmp_path / "420")


def test_a_shuffle_is_the_one_of_the_published_sets(made, tmp_path):
    repackage(str(made), tmp_path / "out", chars_per_shard=500_000, val_docs=700, seed=42)
    texts = documents(5000)
    assert written(tmp_path / "out") == [texts[i] for i in np.random.default_rng(42).permutation(5000)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=20), min_size=2, max_size=60),
    val_docs=st.integers(1, 8), chars=st.integers(1, 200), seed=st.none() | st.integers(0, 3), group=st.integers(1, 9),
)  # fmt: skip
def test_nothing_is_lost_whatever_the_sizes(tmp_path_factory, texts, val_docs, chars, seed, group):
    folder = tmp_path_factory.mktemp("any")
    write_parquet(folder / "in" / "x.parquet", texts)
    val_docs = min(val_docs, len(texts) - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROW_GROUP_DOCS", group)
        repackage(str(folder / "in"), folder / "out", chars_per_shard=chars, val_docs=val_docs, seed=seed)
    paths = sorted((folder / "out").glob("*.parquet"))
    found = [text for path in (paths[-1], *paths[:-1]) for part in groups(path) for text in part]
    order = range(len(texts)) if seed is None else np.random.default_rng(seed).permutation(len(texts))
    assert found == [texts[i] for i in order]
    assert all(len(part) == group for path in paths[:-2] for part in groups(path))


# --- what can be read


LINES = "".join(json.dumps({"body": text, "n": i}) + ("\n\n" if i % 3 else "\r\n") for i, text in enumerate(ODD))


def compressed(content: bytes, kind: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, kind) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "name, content",
    [
        ("x.jsonl", LINES.encode()),
        ("x.jsonl", LINES.encode("utf-8-sig").rstrip()),  # a mark at the beginning, no newline at the end
        ("x.jsonl", "".join(json.dumps({"body": t}, ensure_ascii=False) + "\n" for t in ODD).encode()),
        ("x.jsonl.gz", gzip.compress(LINES.encode())),
        ("x.jsonl.zst", compressed(LINES.encode(), "zstd")),
        ("x.jsonl.gz", b"".join(gzip.compress(line.encode()) for line in LINES.splitlines(keepends=True))),
    ],
)
def test_json_lines(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert list(read_documents(str(tmp_path), "body")) == ODD


def test_long_lines(tmp_path):
    texts = ["y" * 5_000_000, "漢" * 1_000_000]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert list(read_documents(str(tmp_path))) == texts


def test_a_text_file_is_a_document_and_files_come_in_order(tmp_path):
    write_parquet(tmp_path / "b.parquet", ["second", None, "third"])
    (tmp_path / "a.txt").write_text("first\nwith two lines")
    (tmp_path / "c.jsonl").write_text('{"text": "fourth"}\n{"text": null}\n')
    (tmp_path / "README.md").write_text("not a document")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.txt").write_text("not one either")
    assert list(read_documents(str(tmp_path))) == ["first\nwith two lines", "second", "", "third", "fourth", ""]
    assert list(read_documents(str(tmp_path), pattern="*.txt")) == ["first\nwith two lines"]
    assert list(read_documents(str(tmp_path / "b.parquet"))) == ["second", "", "third"]


def test_a_hub_folder_by_pattern(tmp_path):
    for split in ("train", "test"):
        for k in range(2):
            write_parquet(tmp_path / "data" / f"{split}-{k:05d}-of-00002.parquet", [f"{split} {k}"])
    assert list(read_documents(str(tmp_path), pattern="train-*")) == ["train 0", "train 1"]
    assert list(read_documents(str(tmp_path), pattern="data/test-*")) == ["test 0", "test 1"]


def test_object_storage(s3_server, tmp_path):
    from pyarrow import fs

    write_parquet(tmp_path / "x.parquet", list(documents(50)))
    uri = s3_server("to-repackage")
    system, path = fs.FileSystem.from_uri(uri)
    with system.open_output_stream(f"{path}/deep/x.parquet") as stream:
        stream.write((tmp_path / "x.parquet").read_bytes())
    with system.open_output_stream(f"{path}/y.jsonl.gz", compression="gzip") as stream:
        stream.write(b'{"text": "last"}\n')
    repackage(uri, tmp_path / "out", val_docs=5)
    assert written(tmp_path / "out") == [*documents(50), "last"]


def test_half_a_character_becomes_a_mark(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a\\ud83d"}\n{"text": "\\ud83c\\udf88"}\n')
    for seed in (None, 1):
        repackage(str(tmp_path / "x.jsonl"), tmp_path / f"out{seed}", val_docs=1, seed=seed)
        assert sorted(written(tmp_path / f"out{seed}")) == ["a\ufffd", "🎈"]


# --- what may be wrong


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', r"x\.jsonl, line 2: not JSON"),
        ("x.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', r"line 2: no key 'text'; its keys are \['txt'\]"),
        ("x.jsonl", b'["text"]\n', "line 1: no key 'text'; it is a list"),
        ("x.jsonl", b'{"text": 5}\n', "line 1: 'text' holds 5, not text"),
        ("x.jsonl", b'{"text": "\xff"}\n', r"x\.jsonl cannot be read"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9)[:-12], r"x\.jsonl\.gz cannot be read"),
        ("x.txt", b"\xff", r"x\.txt cannot be read"),
        ("x.parquet", b"PAR1 not really", r"x\.parquet cannot be read"),
        ("x.csv", b"a,b", "has no .parquet"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(tmp_path, name, content, words):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        repackage(str(tmp_path / "in"), tmp_path / "out", val_docs=1)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_wrong_columns(tmp_path):
    write_parquet(tmp_path / "x.parquet", ["a"], column="body")
    with pytest.raises(ValueError, match=r"no column 'text'; its columns are \['id', 'body'\]"):
        list(read_documents(str(tmp_path)))
    with pytest.raises(ValueError, match="holds int64, not text"):
        list(read_documents(str(tmp_path), "id"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        list(read_documents(str(tmp_path / "nowhere")))


def test_a_folder_that_is_there_is_never_touched(made, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out is there already"):
        repackage(str(made), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_too_few_documents(made, tmp_path):
    with pytest.raises(ValueError, match=r"holds 5000 documents and validation takes 5000.*--val-docs"):
        repackage(str(made), tmp_path / "out", val_docs=5000)
    assert not (tmp_path / "out").exists()


# --- killed, full, large


def script(made: Path, out: Path, before: str = "", **options: object) -> list[str]:
    """A program that repackages and prints its peak of resident memory in kB (ru_maxrss would count its parent's)."""
    code = (
        f"import resource, time\nfrom pathlib import Path\nfrom nanochat_ray.corpus import repackage as r\n{before}\n"
        f"r.repackage({str(made)!r}, Path({str(out)!r}), **{options!r})\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    )
    return [sys.executable, "-c", code]


def test_killed_half_way_and_again(made, tmp_path):
    slow = "old = r._Shard.close\nr._Shard.close = lambda self: (time.sleep(0.3), old(self))[1]"
    options = {"chars_per_shard": 100_000, "val_docs": 700, "seed": 1}
    process = subprocess.Popen(script(made, tmp_path / "out", slow, **options))
    work = tmp_path / ".out.repackaging"
    while not (work / "shard_00001.parquet").exists():
        time.sleep(0.02)
        assert process.poll() is None
    with pytest.raises(FileExistsError, match="being written by another process"):
        repackage(str(made), tmp_path / "out", **options)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert work.exists() and not (tmp_path / "out").exists()
    repackage(str(made), tmp_path / "out", **options)
    assert sorted(written(tmp_path / "out")) == sorted(documents(5000))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["checksums.json", *sorted(read_checksums(tmp_path / "out"))]


def test_a_full_disk_leaves_nothing(tmp_path):
    noise = np.random.default_rng(0).bytes(1_500_000).hex()
    write_parquet(tmp_path / "in" / "x.parquet", [noise[i : i + 1000] for i in range(0, len(noise), 1000)])
    full = f"resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, {resource.RLIM_INFINITY}))"
    for seed in (None, 1):
        done = subprocess.run(script(tmp_path / "in", tmp_path / "out", full, val_docs=10, seed=seed),
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 1 and "File too large" in done.stderr, done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("seed", [None, 7])
def test_ten_times_the_data_needs_no_more_memory(tmp_path, seed):
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, 8))) for _ in range(5000)]
    texts = [" ".join(words[i] for i in rng.integers(0, 5000, 250)) for _ in range(2000)]  # 4.5 MB
    write_parquet(tmp_path / "x.parquet", texts)
    peaks = []
    for n, size in ((1, "small"), (10, "large")):
        (tmp_path / size).mkdir()
        for k in range(n):
            (tmp_path / size / f"{k:02d}.parquet").hardlink_to(tmp_path / "x.parquet")
        command = script(tmp_path / size, tmp_path / f"{size}.out", val_docs=100, chars_per_shard=4e6, seed=seed)
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 1024)  # MB
    assert scan_data(str(tmp_path / "large.out")).val.rows == 100
    assert peaks[1] < peaks[0] + 20, peaks  # the large one has 45 MB of text

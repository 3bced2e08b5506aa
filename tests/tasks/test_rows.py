"""Where rows are found on the disk, how they are fetched, and what a person is told when there are none."""

from __future__ import annotations

import hashlib
import json
import pickle
import time

import pytest

from nanochat_ray.corpus import download
from nanochat_ray.corpus.download import DownloadError, fetch
from nanochat_ray.tasks.rows import DataSet, JsonlRows, TaskDataMissing, TaskSources, open_rows, permutation
from tests.tasks.conftest import Hub, serve, write_jsonl, write_parquet

ROWS = [{"n": i, "text": f"row {i}", "list": [{"a": str(i)}] * (i % 3)} for i in range(11)]
DATA = DataSet("fruit/apples", "someone/fruit", "apples", "test", local_file="fruit/All.jsonl")
CACHE = "someone--fruit/apples/test"
LISTING = "/api/datasets/someone/fruit/parquet/apples/test"
SHUFFLED = [ROWS[i] for i in permutation(len(ROWS))]


def rows_of(sources: TaskSources) -> list[dict]:
    rows = open_rows(DATA, sources)
    return [rows[i] for i in range(len(rows))]


LAYOUTS = {
    "jsonl": lambda d: write_jsonl(d / "fruit/apples/test.jsonl", ROWS),
    "parquet": lambda d: write_parquet(d / "fruit/apples/test.parquet", ROWS),
    "by config": lambda d: write_parquet(d / "fruit/apples/apples/test.parquet", ROWS),
    "other name": lambda d: write_jsonl(d / "fruit/All.jsonl", ROWS),
    "cloned": lambda d: [
        write_parquet(d / "fruit/apples/test-00000-of-00002.parquet", ROWS[:4]),
        write_parquet(d / "fruit/apples/test-00001-of-00002.parquet", ROWS[4:]),
    ],
    "folder": lambda d: [
        write_jsonl(d / "fruit/apples/test/a.jsonl", ROWS[:5]), write_jsonl(d / "fruit/apples/test/b.jsonl", ROWS[5:])
    ],
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_storage", [True, False])
def test_every_layout_gives_the_same_rows(layout, with_storage, tmp_path, offline):
    LAYOUTS[layout](tmp_path / "data")
    storage = tmp_path / "storage" if with_storage else None
    assert rows_of(TaskSources(tmp_path / "data", storage)) == SHUFFLED


def test_rows_are_found_below_the_storage_too(tmp_path, offline):
    LAYOUTS["jsonl"](tmp_path / "task_data")
    assert rows_of(TaskSources(storage=tmp_path)) == SHUFFLED


def test_parquet_rows_are_mapped_not_loaded(tmp_path, offline):
    LAYOUTS["cloned"](tmp_path / "data")
    rows = open_rows(DATA, TaskSources(tmp_path / "data", tmp_path))
    assert rows[0] == SHUFFLED[0]
    (arrow,) = (tmp_path / "task_data" / "arrow").iterdir()
    with open("/proc/self/maps") as maps:
        assert str(arrow) in maps.read()


def test_rows_are_pickled_as_names_of_files(tmp_path, offline):
    for layout in ("jsonl", "parquet"):
        LAYOUTS[layout](tmp_path / layout)
        rows = open_rows(DATA, TaskSources(tmp_path / layout))
        pickled = pickle.dumps(rows)
        assert len(pickled) < 1000
        assert pickle.loads(pickled)[3] == rows[3]


def test_missing_data_says_what_to_do(tmp_path, offline):
    before = time.monotonic()
    with pytest.raises(TaskDataMissing) as caught:
        open_rows(DATA, TaskSources(tmp_path / "data", tmp_path))
    assert time.monotonic() - before < 1
    for wanted in ("fruit/apples", "apples, test", str(tmp_path / "data"), "someone/fruit", "--task-data", "OFFLINE=1"):
        assert wanted in str(caught.value)
    assert list(tmp_path.iterdir()) == []  # nothing was made


def test_a_host_that_does_not_answer_is_asked_once(monkeypatch, tmp_path):
    monkeypatch.delenv(download.OFFLINE_VARIABLE, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    download._host_answers.cache_clear()
    for _ in range(2):
        with pytest.raises(TaskDataMissing, match=r"127\.0\.0\.1:9 does not answer"):
            open_rows(DATA, TaskSources(storage=tmp_path))
    assert download._host_answers.cache_info().misses == 1


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n\n  \n{"a": 2}\n{"a": \n')
    rows = JsonlRows(path)
    assert len(rows) == 3
    assert [rows[0], rows[1]] == [{"a": 1}, {"a": 2}]
    with pytest.raises(ValueError, match=r"x\.jsonl, line 5"):
        rows[2]


def test_an_empty_file_has_no_rows(tmp_path):
    (tmp_path / "x.jsonl").touch()
    assert len(JsonlRows(tmp_path / "x.jsonl")) == 0


# --- the hub


def put(hub: Hub, tmp_path, parts=(ROWS[:4], ROWS[4:])) -> None:
    names = [f"/files/{k}.parquet" for k in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        hub.files[name] = write_parquet(tmp_path / "made.parquet", part).read_bytes()
    hub.files[LISTING] = json.dumps([hub.url + name for name in names]).encode()


def test_download(hub, tmp_path):
    put(hub, tmp_path)
    sources = TaskSources(storage=tmp_path)
    assert rows_of(sources) == SHUFFLED
    manifest = json.loads((tmp_path / "task_data" / CACHE / "manifest.json").read_text())
    assert [entry["name"] for entry in manifest["files"]] == ["00000.parquet", "00001.parquet"]
    for entry in manifest["files"]:
        content = (tmp_path / "task_data" / CACHE / entry["name"]).read_bytes()
        assert (entry["size_bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert manifest["rows"] == len(ROWS)
    asked = len(hub.asked)
    assert rows_of(sources) == SHUFFLED
    assert len(hub.asked) == asked  # from the disk now


def test_a_failing_server_is_asked_again(hub, tmp_path):
    put(hub, tmp_path)
    hub.failures = {LISTING: [503], "/files/1.parquet": [500, 429]}
    assert rows_of(TaskSources(storage=tmp_path)) == SHUFFLED


def test_what_is_not_there_is_not_asked_for_again(hub, tmp_path):
    put(hub, tmp_path)
    del hub.files["/files/1.parquet"]
    with pytest.raises(TaskDataMissing, match="404"):
        rows_of(TaskSources(storage=tmp_path))
    assert [path for path, _ in hub.asked].count("/files/1.parquet") == 1
    assert not (tmp_path / "task_data" / CACHE / "manifest.json").exists()


def test_a_dropped_connection_leaves_no_file(hub, tmp_path):
    hub.files["/x"] = b"content"
    hub.truncate = {"/x"}
    with pytest.raises(DownloadError, match="/x"):
        fetch(f"{hub.url}/x", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_the_token_stays_with_the_first_host(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    put(hub, tmp_path)
    other = Hub()
    server = serve(other)
    other.files["/moved"] = hub.files.pop("/files/0.parquet")
    hub.redirects["/files/0.parquet"] = f"{other.url}/moved"
    assert rows_of(TaskSources(storage=tmp_path)) == SHUFFLED
    server.shutdown()
    server.server_close()
    assert {authorization for _, authorization in hub.asked} == {"Bearer secret"}
    assert other.asked == [("/moved", None)]
    manifest = json.loads((tmp_path / "task_data" / CACHE / "manifest.json").read_text())
    assert [entry["revision"] for entry in manifest["files"]] == ["c0ffee", None]


def test_a_cache_that_was_changed_is_refused(hub, tmp_path, offline):
    folder = tmp_path / "task_data" / CACHE
    write_parquet(folder / "00000.parquet", ROWS)
    (folder / "manifest.json").write_text('["00000.parquet"]')  # as nanochat writes it
    sources = TaskSources(storage=tmp_path)
    assert rows_of(sources) == SHUFFLED
    entry = {"name": "00000.parquet", "size_bytes": 1}
    (folder / "manifest.json").write_text(json.dumps({"files": [entry], "permutation_sha256": ""}))
    with pytest.raises(TaskDataMissing, match=r"00000\.parquet"):
        rows_of(sources)
    del entry["size_bytes"]
    (folder / "manifest.json").write_text(json.dumps({"files": [entry], "permutation_sha256": "other"}))
    with pytest.raises(ValueError, match="another order"):
        rows_of(sources)

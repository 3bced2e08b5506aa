"""Downloads as Ray tasks: a few at a time, and gone on with when the process under one is killed."""

from __future__ import annotations

import hashlib
import threading
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from _data import RunData
from _runtime import Job, open_job

from nanochat_ray.config import RunSettings
from nanochat_ray.corpus.download import OFFLINE_VARIABLE, Cancelled, DownloadError, Retry
from nanochat_ray.corpus.fetching import download
from nanochat_ray.corpus.shards import PUBLISHED, read_checksums
from nanochat_ray.data.download import in_ray_tasks
from tests.corpus.shard_server import ShardServer, serving

FAST = Retry(tries=4, first_wait_s=0.01, longest_wait_s=0.02)
pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> dict[str, bytes]:
    """Five parquet files of a megabyte that does not compress."""
    path, found = tmp_path_factory.mktemp("made") / "x.parquet", {}
    for k in range(5):
        noise = hashlib.shake_256(bytes([k])).hexdigest(500_000)
        pq.write_table(pa.table({"text": [noise]}), path, compression="none", use_dictionary=False)
        found[f"shard_{k:05d}.parquet"] = path.read_bytes()
    return found


@pytest.fixture
def server(monkeypatch, shards):
    monkeypatch.delenv(OFFLINE_VARIABLE, raising=False)
    with serving(ShardServer({f"/set/{name}": body for name, body in shards.items()})) as server:
        yield server


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def holder(path: Path) -> psutil.Process | None:
    """The process of this test's cluster that has a file open."""
    for process in psutil.Process().children(recursive=True):
        try:
            if any(file.path == str(path) for file in process.open_files()):
                return process
        except psutil.Error:
            continue
    return None


def test_shards_arrive_a_few_at_a_time(server, shards, tmp_path):
    server.bytes_per_s = 3_000_000
    server.drop_after = {"/set/shard_00001.parquet": [400_000]}
    server.statuses = {"/set/shard_00002.parquet": [(503, {"Retry-After": "0"}), (500, {})]}
    results = []
    download(f"{server.url}/set", list(shards), tmp_path, in_ray_tasks, 2, FAST, on_result=results.append)
    assert contents(tmp_path) == shards
    assert server.most_at_once == 2
    assert sorted(result.name for result in results) == list(shards)
    assert list(read_checksums(tmp_path)) == list(shards)
    server.forget()
    download(f"{server.url}/set", list(shards), tmp_path, in_ray_tasks, 2, FAST, verify=True)
    assert server.asked == []


def test_what_cannot_be_had_is_named(server, shards, tmp_path):
    del server.files["/set/shard_00003.parquet"]
    with pytest.raises(DownloadError, match=r"1 of 5 shards could not be had:\n  shard_00003.parquet: .*404"):
        download(f"{server.url}/set", list(shards), tmp_path, in_ray_tasks, 3, FAST)
    assert len(contents(tmp_path)) == 4


def test_a_killed_task_goes_on_where_it_was(server, shards, tmp_path):
    name = "shard_00000.parquet"
    server.bytes_per_s = 600_000
    part = tmp_path / f".{name}.part"
    killed = []

    def kill() -> None:
        while not (part.exists() and part.stat().st_size > 500_000):
            time.sleep(0.02)
        process = holder(part)
        killed.append(process)
        process.kill()
        server.bytes_per_s = None

    killer = threading.Thread(target=kill)
    killer.start()
    download(f"{server.url}/set", [name], tmp_path, in_ray_tasks, 1, FAST)
    killer.join()
    assert killed[0] is not None and contents(tmp_path) == {name: shards[name]}
    ranges = [int(wanted.removeprefix("bytes=").removesuffix("-")) for _, wanted in server.asked if wanted]
    assert len(server.asked) == 2 and len(ranges) == 1 and ranges[0] >= 500_000


def test_cancelled_tasks_end_soon(server, shards, tmp_path):
    server.bytes_per_s = 50_000  # half a minute each
    stop = threading.Event()
    threading.Timer(2.0, stop.set).start()
    with pytest.raises(Cancelled, match="what has come is kept"):
        download(f"{server.url}/set", list(shards), tmp_path, in_ray_tasks, 2, FAST, stop=stop)
    assert contents(tmp_path) == {}
    deadline = time.monotonic() + 15
    while (found := [path for path in tmp_path.glob(".*.part") if holder(path)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found == []  # nobody writes any more
    server.bytes_per_s = None
    download(f"{server.url}/set", list(shards), tmp_path, in_ray_tasks, 4, FAST)
    assert contents(tmp_path) == shards


# --- the rest of a run's data


@pytest.fixture
def job(server, shards, tmp_path, monkeypatch):
    """A job on a published set of three training shards, of which the tokenizer needs one; the cluster is there."""
    published = PUBLISHED["climbmix"]
    names = [*published.names[:3], published.val_shard]
    folder = f"/datasets/{published.repo}/resolve/main"
    server.files = {f"{folder}/{name}": body for name, body in zip(names, shards.values(), strict=False)}
    server.held = {f"{folder}/{name}": threading.Event() for name in names[1:3]}
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    with open_job(RunSettings(storage=str(tmp_path), data="climbmix", device_type="cpu"), "d1") as job:
        job._has_ray = True
        yield job


def names_there(job: Job) -> list[str]:
    folder = job.run_dir.root.parent / PUBLISHED["climbmix"].folder
    return sorted(path.name for path in folder.glob("*.parquet"))


def test_the_rest_arrives_in_ray_tasks(job, server):
    published = PUBLISHED["climbmix"]
    data = RunData(job, 3)
    first = data.for_tokenizer(1000)
    assert [shard.name for shard in first.train] == published.names[:1] and first.val.name == published.val_shard
    assert names_there(job) == [published.names[0], published.val_shard]
    for event in server.held.values():
        event.set()
    assert [shard.name for shard in data.whole().train] == published.names[:3]
    asked = len(server.asked)
    again = RunData(job, 3)
    assert again.for_tokenizer(1000) == first and again.whole() == data.whole()
    assert len(server.asked) == asked


def test_the_rest_that_fails_is_told_when_it_is_needed(job, server):
    published = PUBLISHED["climbmix"]
    del server.files[f"/datasets/{published.repo}/resolve/main/{published.names[2]}"]
    for event in server.held.values():
        event.set()
    data = RunData(job, 3)
    data.for_tokenizer(1000)
    with pytest.raises(DownloadError, match=rf"pretraining needs shards.*\n  {published.names[2]}: .*404"):
        data.whole()
    assert names_there(job) == [*published.names[:2], published.val_shard]

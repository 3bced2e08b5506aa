"""Shards arrive whole or not at all, whatever the server or the disk does, and a second call goes on."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_ray.corpus import download as downloading
from nanochat_ray.corpus import part
from nanochat_ray.corpus import source as opening
from nanochat_ray.corpus.download import OFFLINE_VARIABLE, Cancelled, DownloadError, Fetched, Retry, fetch
from nanochat_ray.corpus.fetching import GIVE_UP_AFTER, ShardTask, download, in_threads
from nanochat_ray.corpus.shards import (
    CHECKSUMS_FILE,
    PUBLISHED,
    choose,
    list_source,
    parse_checksums,
    read_checksums,
    tokenizer_shards,
)
from tests.corpus.shard_server import ShardServer, serving

FAST = Retry(tries=4, first_wait_s=0.01, longest_wait_s=0.02)
BODY = hashlib.shake_256(b"body").digest(100_000)


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv(OFFLINE_VARIABLE, raising=False)
    with serving(ShardServer({"/x": BODY})) as server:
        yield server


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> dict[str, bytes]:
    """Six small parquet files by name."""
    path, found = tmp_path_factory.mktemp("made") / "x.parquet", {}
    for k in range(6):
        pq.write_table(pa.table({"text": [f"document {k}.{i}" for i in range(2000)]}), path, compression="none")
        found[f"shard_{k:05d}.parquet"] = path.read_bytes()
    return found


def put(server: ShardServer, shards: dict[str, bytes], folder: str = "/set") -> str:
    server.files = {f"{folder}/{name}": content for name, content in shards.items()}
    return server.url + folder


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- one file


def test_a_file_arrives_with_its_size_and_hash(server, tmp_path):
    assert fetch(f"{server.url}/x", tmp_path / "deep" / "x") == Fetched(len(BODY), sha(BODY))
    assert (tmp_path / "deep" / "x").read_bytes() == BODY
    assert names_in(tmp_path / "deep") == ["x"]


def test_a_dropped_connection_is_gone_on_with(server, tmp_path):
    server.drop_after = {"/x": [30_000, 30_000]}
    fetch(f"{server.url}/x", tmp_path / "x", retry=FAST)
    assert (tmp_path / "x").read_bytes() == BODY
    assert [wanted for _, wanted in server.asked] == [None, "bytes=30000-", "bytes=60000-"]
    assert server.sent["/x"] == len(BODY)  # nothing twice


def test_drops_that_bring_something_each_time_do_not_count_as_tries(server, tmp_path):
    server.drop_after = {"/x": [9_000] * 11}
    fetch(f"{server.url}/x", tmp_path / "x", retry=Retry(2, 0.0))
    assert (tmp_path / "x").read_bytes() == BODY and len(server.asked) == 12


@pytest.mark.parametrize("lack", ["ranges", "tags"])
def test_a_server_that_cannot_go_on_begins_anew(server, tmp_path, lack):
    setattr(server, lack, False)
    server.drop_after = {"/x": [30_000, 50_000]}
    fetch(f"{server.url}/x", tmp_path / "x", retry=FAST)
    assert (tmp_path / "x").read_bytes() == BODY
    assert server.sent["/x"] == len(BODY) + 80_000


def test_a_server_that_always_drops_at_one_place_is_given_up(server, tmp_path):
    server.ranges = False
    server.drop_after = {"/x": [30_000] * 100}
    with pytest.raises(DownloadError, match=r"/x: 30000 of 100000 bytes arrived"):
        fetch(f"{server.url}/x", tmp_path / "x", retry=FAST)
    assert len(server.asked) == FAST.tries
    assert not (tmp_path / "x").exists()


def test_a_file_that_changes_on_the_way_is_begun_anew(server, tmp_path):
    other = BODY[::-1]
    server.drop_after = {"/x": [30_000]}
    server.instead = {"/x": [other]}
    fetch(f"{server.url}/x", tmp_path / "x", retry=FAST)
    assert (tmp_path / "x").read_bytes() == BODY


def test_what_another_call_left_is_gone_on_with(server, tmp_path):
    server.drop_after = {"/x": [70_000, 0]}
    with pytest.raises(DownloadError):
        fetch(f"{server.url}/x", tmp_path / "x", retry=Retry(1, 0.0))
    assert names_in(tmp_path) == [".x.part", ".x.part.json"]
    server.forget()
    server.drop_after = {}
    fetch(f"{server.url}/x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY and server.sent["/x"] == 30_000
    assert names_in(tmp_path) == ["x"]


@pytest.mark.parametrize("note", ["", "{", "[]", '{"address": "http://elsewhere/x"}', None])
def test_a_part_of_unknown_origin_is_not_trusted(server, tmp_path, note):
    (tmp_path / ".x.part").write_bytes(b"z" * 500)
    if note is not None:
        (tmp_path / ".x.part.json").write_text(note)
    fetch(f"{server.url}/x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY


@pytest.mark.parametrize("size", [len(BODY), len(BODY) + 10])
def test_a_part_that_is_as_long_as_the_file_or_longer(server, tmp_path, size):
    note = {"address": f"{server.url}/x", "validator": f'"{hashlib.md5(BODY).hexdigest()}"', "size_bytes": len(BODY)}
    (tmp_path / ".x.part").write_bytes((BODY + b"y" * 10)[:size])
    (tmp_path / ".x.part.json").write_text(json.dumps(note))
    fetch(f"{server.url}/x", tmp_path / "x", sha256=sha(BODY), retry=FAST)
    assert (tmp_path / "x").read_bytes() == BODY
    assert (len(server.asked) == 0) == (size == len(BODY))  # killed just before the rename


def test_wrong_bytes_once_are_fetched_again(server, tmp_path):
    server.instead = {"/x": [BODY[:-1] + b"?"]}
    fetch(f"{server.url}/x", tmp_path / "x", sha256=sha(BODY), retry=FAST)
    assert (tmp_path / "x").read_bytes() == BODY


def test_the_hubs_tag_is_the_checksum(server, tmp_path):
    server.is_hub = True
    server.instead = {"/x": [BODY[:-1] + b"?"]}
    fetched = fetch(f"{server.url}/x", tmp_path / "x", retry=FAST)
    assert fetched == Fetched(len(BODY), sha(BODY), "c0ffee") and len(server.asked) == 2


def test_a_checksum_that_never_matches_is_an_error_that_names_the_file(server, tmp_path):
    server.instead = {"/x": [BODY[::-1]] * 100}
    with pytest.raises(DownloadError, match=rf"/x: its content has the SHA-256 {sha(BODY[::-1])}, not {sha(BODY)}"):
        fetch(f"{server.url}/x", tmp_path / "x", sha256=sha(BODY), retry=FAST)
    assert names_in(tmp_path) == [] and len(server.asked) == FAST.tries


@pytest.mark.parametrize("status", [500, 502, 503, 429, 408])
def test_a_server_in_trouble_is_asked_again(server, tmp_path, status):
    server.statuses = {"/x": [(status, {})] * 3}
    fetch(f"{server.url}/x", tmp_path / "x", retry=FAST)
    assert len(server.asked) == 4


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_a_server_that_says_no_is_asked_once(server, tmp_path, status):
    server.statuses = {"/x": [(status, {})] * 3}
    with pytest.raises(DownloadError, match=f"/x: HTTP Error {status}"):
        fetch(f"{server.url}/x", tmp_path / "x", retry=FAST)
    assert len(server.asked) == 1 and names_in(tmp_path) == []


def test_retry_after_is_obeyed(server, tmp_path):
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    server.statuses = {"/x": [(429, {"Retry-After": "1"}), (503, {"Retry-After": later})]}
    fetch(f"{server.url}/x", tmp_path / "x", retry=FAST)
    first, second, third = (when for _, when in server.times)
    assert second - first >= 1.0 and third - first >= 1.0  # a date has whole seconds


def test_a_server_that_asks_to_come_back_tomorrow_is_an_error(server, tmp_path):
    server.statuses = {"/x": [(429, {"Retry-After": "86400"})]}
    with pytest.raises(DownloadError, match="come back in 86400 s"):
        fetch(f"{server.url}/x", tmp_path / "x", retry=FAST)


def test_a_server_that_says_nothing_is_asked_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "READ_TIMEOUT_S", 0.2)
    server.held = {"/x": threading.Event()}
    threading.Timer(0.5, server.held["/x"].set).start()
    fetch(f"{server.url}/x", tmp_path / "x", retry=Retry(20, 0.01))
    assert (tmp_path / "x").read_bytes() == BODY and len(server.asked) > 1


def test_waits_double_vary_and_have_an_end():
    retry = Retry(9, 1.0, 10.0)
    for failures, most in [(1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0), (5, 10.0), (50, 10.0)]:
        waits = {retry.wait_s(failures) for _ in range(50)}
        assert len(waits) > 10 and all(most / 2 <= wait <= most for wait in waits)


def test_a_full_disk_is_one_clear_error_and_no_retry(server, tmp_path, monkeypatch):
    def full(self, chunk):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(part.Part, "append", full)
    with pytest.raises(DownloadError, match=r"cannot be written to .*x: .*No space left"):
        fetch(f"{server.url}/x", tmp_path / "x", retry=FAST)
    assert len(server.asked) == 1 and names_in(tmp_path) == []


def test_a_folder_that_cannot_be_made(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match="cannot be written"):
        fetch(f"{server.url}/x", tmp_path / "file" / "x")


def test_two_at_once_fetch_it_once(server, tmp_path):
    server.bytes_per_s = 200_000
    results: list[Fetched] = []
    threads = [
        threading.Thread(target=lambda: results.append(fetch(f"{server.url}/x", tmp_path / "x"))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [Fetched(len(BODY), sha(BODY))] * 3
    assert server.paths() == ["/x"] and names_in(tmp_path) == ["x"]


def test_waiting_for_another_process_has_an_end(server, tmp_path, monkeypatch):
    monkeypatch.setattr(part, "LOCK_WAIT_S", 0.3)
    with (
        part.Part.locked(tmp_path / "x", "elsewhere"),
        pytest.raises(DownloadError, match="another process has been fetching"),
    ):
        fetch(f"{server.url}/x", tmp_path / "x")


def test_cancelled_keeps_what_has_come(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloading, "CHUNK_BYTES", 10_000)
    stop = threading.Event()
    stop.set()
    with pytest.raises(Cancelled):
        fetch(f"{server.url}/x", tmp_path / "x", stop=stop)
    assert (tmp_path / ".x.part").read_bytes() == BODY[:10_000]


# --- a set of shards


def test_shards_and_their_record(server, tmp_path, shards):
    source = put(server, shards)
    download(source, list(shards), tmp_path, retry=FAST)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.parquet")} == shards
    assert read_checksums(tmp_path) == {name: Fetched(len(body), sha(body)) for name, body in shards.items()}
    server.forget()
    download(source, list(shards), tmp_path)
    download(source, list(shards), tmp_path, verify=True)
    assert server.asked == []


def test_the_network_is_not_needed_for_what_is_there(server, tmp_path, shards, monkeypatch):
    source = put(server, shards)
    download(source, list(shards), tmp_path)
    monkeypatch.setenv(OFFLINE_VARIABLE, "1")
    download(source, list(shards), tmp_path)
    (tmp_path / "shard_00002.parquet").unlink()
    with pytest.raises(DownloadError, match=r"1 of 6 shards are not in .*NANOCHAT_RAY_OFFLINE=1"):
        download(source, list(shards), tmp_path)
    (tmp_path / "shard_00002.parquet").write_bytes(b"damaged")
    with pytest.raises(DownloadError, match=r"shard_00002.parquet: .*NANOCHAT_RAY_OFFLINE=1"):
        download(source, list(shards), tmp_path, verify=True)


def test_never_more_at_once_than_asked_for(server, tmp_path, shards):
    server.bytes_per_s = 500_000
    download(put(server, shards), list(shards), tmp_path, concurrency=2)
    assert server.most_at_once == 2


@pytest.mark.parametrize("verify", [False, True])
def test_a_shard_that_was_damaged_is_fetched_again(server, tmp_path, shards, verify, caplog):
    source, (first, second, *_) = put(server, shards), shards
    download(source, list(shards), tmp_path)
    server.forget()
    (tmp_path / first).write_bytes(shards[first][:-100])  # cut: its size says it
    changed = bytearray(shards[second])
    changed[1000] ^= 1
    (tmp_path / second).write_bytes(changed)
    download(source, list(shards), tmp_path, verify=verify)
    assert (tmp_path / first).read_bytes() == shards[first]
    assert ((tmp_path / second).read_bytes() == shards[second]) == verify  # a flipped bit: only the hash does
    assert len(server.asked) == 1 + verify
    assert (second in caplog.text) == verify


def test_shards_without_a_record_are_kept_if_they_are_whole(server, tmp_path, shards):
    source, (first, second, *_) = put(server, shards), shards
    (tmp_path / first).write_bytes(shards[first])
    (tmp_path / second).write_bytes(shards[second][:-10])  # as a killed program leaves it
    download(source, list(shards), tmp_path)
    assert f"/set/{first}" not in server.paths() and f"/set/{second}" in server.paths()
    assert read_checksums(tmp_path)[first].sha256 == sha(shards[first])


def test_a_content_length_that_lies_is_found_out(server, tmp_path, shards):
    source, (first, *_) = put(server, shards), shards
    server.short = {f"/set/{first}": 5000}
    with pytest.raises(DownloadError, match=rf"1 of 6 shards could not be had:\n.*{first}.*no whole parquet file"):
        download(source, list(shards), tmp_path, retry=FAST)
    assert len(list(tmp_path.glob("shard_*.parquet"))) == 5  # all others came
    server.short = {}
    server.forget()
    download(source, list(shards), tmp_path)
    assert server.paths() == [f"/set/{first}"]


def test_a_source_without_a_single_shard_is_given_up_early(server, tmp_path):
    names = [f"shard_{k:05d}.parquet" for k in range(100)]
    with pytest.raises(DownloadError, match="404"):
        download(f"{server.url}/set", names, tmp_path, retry=FAST)
    assert GIVE_UP_AFTER <= len(server.asked) < 2 * GIVE_UP_AFTER


def test_a_reader_that_goes_away_ends_the_threads(server, tmp_path, shards):
    put(server, shards)
    server.held = {f"/set/{name}": threading.Event() for name in list(shards)[1:]}
    tasks = [ShardTask(f"{server.url}/set/{name}", tmp_path / name, retry=FAST) for name in shards]
    results = in_threads(tasks, 2, threading.Event())
    assert next(results).file is not None
    for event in server.held.values():
        event.set()
    results.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("download")]


def test_a_killed_download_goes_on(server, tmp_path, tmp_path_factory):
    """SIGKILL half-way: the second call fetches what is missing, and of the parts only the rest."""
    path, shards = tmp_path_factory.mktemp("big") / "x.parquet", {}
    for k in range(6):
        noise = hashlib.shake_256(bytes([k])).hexdigest(500_000)
        pq.write_table(pa.table({"text": [noise]}), path, compression="none", use_dictionary=False)
        shards[f"shard_{k:05d}.parquet"] = path.read_bytes()
    source, size = put(server, shards), path.stat().st_size
    assert size > 3 * part.CHUNK_BYTES
    server.bytes_per_s = size / 0.6
    code = (
        "import sys; from pathlib import Path; from nanochat_ray.corpus.fetching import download\n"
        f"download({source!r}, {list(shards)!r}, Path({str(tmp_path)!r}), concurrency=2)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    while sum(server.sent.values()) < 3.4 * size:  # two are there, two are coming
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = [name for name in shards if (tmp_path / name).exists()]
    begun = {path.name[1 : -len(".part")]: path.stat().st_size for path in tmp_path.glob(".*.part")}
    assert 1 <= len(whole) < 6 and any(begun.values())
    assert all((tmp_path / name).read_bytes() == shards[name] for name in whole)
    time.sleep(0.2)  # the server notices
    server.forget()
    server.bytes_per_s = None
    download(source, list(shards), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.parquet")} == shards
    assert not {f"/set/{name}" for name in whole} & set(server.paths())
    for name, size_bytes in begun.items():
        if name not in whole:
            assert server.sent.get(f"/set/{name}", 0) == len(shards[name]) - size_bytes
    assert names_in(tmp_path) == sorted([CHECKSUMS_FILE, *shards])


# --- what is at a source


SUMS = {
    "lines": lambda shards: "".join(f"{sha(body)}  {name}\n" for name, body in shards.items()),
    "binary": lambda shards: "".join(f"{sha(body)} *./{name}\n" for name, body in shards.items()),
    "names": lambda shards: json.dumps({name: sha(body) for name, body in shards.items()}),
    "ours": lambda shards: json.dumps(
        {"files": {name: {"size_bytes": len(body), "sha256": sha(body)} for name, body in shards.items()}}
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", SUMS)
def test_a_checksum_file_lists_and_proves_the_shards_of_a_web_server(server, tmp_path, shards, form):
    source, (first, *_) = put(server, shards), shards
    file = "checksums.json" if form in ("names", "ours") else "SHA256SUMS"
    server.files[f"/set/{file}"] = SUMS[form](shards).encode()
    server.instead = {f"/set/{first}": [shards[first][::-1]]}
    names, checksums = list_source(source, FAST)
    assert names == sorted(shards)
    download(source, names, tmp_path, retry=FAST, checksums=checksums)
    assert (tmp_path / first).read_bytes() == shards[first]
    assert server.paths().count(f"/set/{first}") == 2


def test_a_web_server_without_checksums_lists_nothing(server, shards):
    assert list_source(put(server, shards), FAST) == ([], {})


@pytest.mark.parametrize("content", ["hello", '{"a": 5}', '{"a.parquet": "ff"}', "zz  shard.parquet"])
def test_what_is_no_checksum_file_is_named(content):
    with pytest.raises(ValueError, match="list of SHA-256"):
        parse_checksums(content, "http://x/SHA256SUMS")


def test_a_mirror_folder_is_a_source_and_its_record_is_believed(tmp_path, shards):
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    for name, body in shards.items():
        (mirror / name).write_bytes(body)
    (mirror / "SHA256SUMS").write_text(SUMS["lines"](shards))
    (mirror / "README.md").touch()
    names, checksums = list_source(str(mirror))
    assert names == sorted(shards) and len(checksums) == 6
    download(str(mirror), names, tmp_path / "to", checksums=checksums)
    assert {path.name: path.read_bytes() for path in (tmp_path / "to").glob("*.parquet")} == shards
    wrong = bytearray(shards["shard_00000.parquet"])
    wrong[1000] ^= 1
    (mirror / "shard_00000.parquet").write_bytes(wrong)
    with pytest.raises(DownloadError, match=r"shard_00000.parquet: its content has the SHA-256"):
        download(str(mirror), names, tmp_path / "other", checksums=checksums, retry=FAST)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        list_source(str(tmp_path / "nowhere"))


def test_object_storage(s3_server, tmp_path, shards):
    from pyarrow import fs

    source = s3_server("shards-to-fetch")
    system, path = fs.FileSystem.from_uri(source)
    for name, body in shards.items():
        with system.open_output_stream(f"{path}/{name}") as stream:
            stream.write(body)
    names, checksums = list_source(source)
    assert names == sorted(shards) and checksums == {}
    # a part that a killed process left
    address = source.replace("shards-to-fetch", f"shards-to-fetch/{names[0]}")
    info = system.get_file_info(f"{path}/{names[0]}")
    note = {"address": address, "validator": f"{info.size} bytes, {info.mtime_ns}", "size_bytes": info.size}
    (tmp_path / f".{names[0]}.part").write_bytes(shards[names[0]][:700])
    (tmp_path / f".{names[0]}.part.json").write_text(json.dumps(note))
    download(source, names, tmp_path, retry=FAST)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.parquet")} == shards
    with pytest.raises(DownloadError, match="no such file"):
        download(source, ["shard_00099.parquet"], tmp_path, retry=FAST)


def test_which_shards():
    names = PUBLISHED["climbmix"].names
    assert choose(names, 2, None, "climbmix") == ["shard_00000.parquet", "shard_00001.parquet", "shard_06542.parquet"]
    assert choose(names, 2, "shard_00000.parquet", "x")[-1] == "shard_00000.parquet"
    assert len(choose(names, None, None, "x")) == 6543 and len(choose(names, 10**6, None, "x")) == 6543
    with pytest.raises(FileNotFoundError, match=r"nearest name is 'shard_00077.parquet'"):
        choose(names, 2, "shard_00077.parq", "x")
    with pytest.raises(FileNotFoundError, match=r"no .*shards"):
        choose([], None, None, "x")
    assert tokenizer_shards(2_000_000_000) == 10 and tokenizer_shards(1) == 1

"""The data's jobs as commands, and stages that start when their shards are there."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from nanochat_ray.corpus.shards import PUBLISHED, read_checksums
from nanochat_ray.run_dir import DATA_FILE, DONE_FILE
from tests.conftest import write_shards
from tests.corpus.shard_server import ShardServer, serving
from tests.jobs.running import run, start

SET = PUBLISHED["climbmix"]
FIRST = (SET.name(0), SET.val_shard)  # what the tokenizer needs
FLAGS = (
    "--no-ray", "--preset", "smoke", "--data", "climbmix", "--max-shards", "3", "--tokenizer.max-chars", "2000",
    "--tokenizer.vocab-size", "300", "--pretrain.depth", "1", "--pretrain.num-iterations", "2",
    "--pretrain.max-seq-len", "32", "--pretrain.total-batch-size", "64", "--pretrain.eval-tokens", "64",
)  # fmt: skip


@pytest.fixture(scope="module")
def bodies(tmp_path_factory) -> dict[str, bytes]:
    """Five training shards of the published set and its validation shard, a few kilobytes each."""
    folder = write_shards(tmp_path_factory.mktemp("made"), shards=6)
    names = [SET.name(0), SET.name(1), SET.name(2), SET.name(3), SET.name(4), SET.val_shard]
    return {name: path.read_bytes() for name, path in zip(names, sorted(folder.iterdir()), strict=True)}


@pytest.fixture
def hub(bodies):
    """A hub on this machine that has these shards."""
    paths = {f"/datasets/{SET.repo}/resolve/main/{name}": body for name, body in bodies.items()}
    with serving(ShardServer(paths, is_hub=True)) as server:
        yield server


def env(hub: ShardServer) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "NANOCHAT_RAY_OFFLINE": "0"}


def path_of(name: str) -> str:
    return f"/datasets/{SET.repo}/resolve/main/{name}"


def asked(hub: ShardServer) -> list[str]:
    return sorted(path.rpartition("/")[2] for path in hub.paths())


def wait_for(path: Path, process, seconds: float = 100.0) -> None:
    begun = time.monotonic()
    while not path.exists():
        time.sleep(0.05)
        assert process.poll() is None and time.monotonic() - begun < seconds, process.stdout.read()


# --- download.py


def test_download_a_published_set_with_nanochats_flags(hub, tmp_path, bodies):
    flags = ("--no-ray", "--num-files", "2", "--num-workers", "2")
    code, out = run(tmp_path, "download.py", *flags, **env(hub))
    folder = tmp_path / SET.folder
    assert code == 0 and "3 of 3 shards (0 were there)" in out, out
    wanted = [SET.name(0), SET.name(1), SET.val_shard]
    assert {path.name: path.read_bytes() for path in folder.glob("*.parquet")} == {n: bodies[n] for n in wanted}
    assert {file.revision for file in read_checksums(folder).values()} == {"c0ffee"}
    code, out = run(tmp_path, "download.py", "-n", "3", "--no-ray", **env(hub))
    assert code == 0 and "4 of 4 shards (3 were there)" in out
    assert asked(hub) == sorted([*wanted, SET.name(2)])
    damaged = bytearray(bodies[SET.name(1)])
    damaged[100] ^= 1
    (folder / SET.name(1)).write_bytes(damaged)
    code, out = run(tmp_path, "download.py", "-n", "3", "--no-ray", "--verify", **env(hub))
    assert code == 0 and "is fetched again: its content has the SHA-256" in out
    assert (folder / SET.name(1)).read_bytes() == bodies[SET.name(1)]


def test_a_download_that_fails_exits_with_an_error_and_keeps_the_rest(hub, tmp_path):
    hub.statuses = {path_of(SET.name(1)): [(500, {})] * 50}
    flags = ("--no-ray", "-n", "3", "--tries", "3", "--backoff-s", "0")
    code, out = run(tmp_path, "download.py", *flags, **env(hub))
    assert code == 1 and "1 of 4 shards could not be had" in out and SET.name(1) in out and "Traceback" not in out
    hub.statuses = {}
    hub.forget()
    assert run(tmp_path, "download.py", *flags, **env(hub))[0] == 0
    assert asked(hub) == [SET.name(1)]


def test_ctrl_c_says_how_far_it_came(hub, tmp_path):
    hub.held = {path_of(SET.name(1)): threading.Event()}
    process = start(tmp_path, "download.py", "--no-ray", "-n", "2", **env(hub))
    wait_for(tmp_path / SET.folder / SET.val_shard, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    hub.held[path_of(SET.name(1))].set()  # else its thread would wait for the server's silence to time out
    out = process.communicate()[0]
    assert process.returncode == 130 and "the same command goes on" in out and "Traceback" not in out
    assert run(tmp_path, "download.py", "--no-ray", "-n", "2", **env(hub))[0] == 0


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--data", "/nowhere", "--to", "x"], "no such folder"),
        (["--data", "/nowhere"], "--to"),
        (["--data", "http://127.0.0.1:9/set", "--to", "x"], "does not answer"),
        (["--data", "nothing://x/y", "--to", "x"], "s3://"),
        (["--to", "s3://bucket/x", "--data", "/nowhere"], "not to a URI"),
        (["--val-shard", "shard_9.parquet"], "nearest name"),
        (["--max-shards", "0"], "must be > 0"),
        (["-n", "1"], "NANOCHAT_RAY_OFFLINE=1"),
    ],
)
def test_what_a_person_may_get_wrong_of_a_download(tmp_path, flags, words):
    offline = "1" if flags == ["-n", "1"] else "0"
    code, out = run(tmp_path, "download.py", "--no-ray", *flags, NANOCHAT_RAY_OFFLINE=offline)
    assert code in (1, 2) and words in out and "Traceback" not in out
    assert not list(tmp_path.rglob("*.parquet"))


# --- stages that start early


def test_the_tokenizer_is_done_before_the_rest_has_arrived(hub, tmp_path, bodies):
    rest = [SET.name(1), SET.name(2)]
    hub.held = {path_of(name): threading.Event() for name in rest}
    process = start(tmp_path, "speedrun.py", *FLAGS, **env(hub))
    root, folder = tmp_path / "smoke", tmp_path / SET.folder
    try:
        wait_for(root / "tokenizer_eval" / DONE_FILE, process)
        assert (root / "tokenizer" / DONE_FILE).exists()
        assert sorted(path.name for path in folder.glob("*.parquet")) == sorted(FIRST)
        assert not (root / "pretrain").exists() and not (root / DATA_FILE).exists()
        for event in hub.held.values():
            event.set()
        wait_for(root / "pretrain" / DONE_FILE, process)
    finally:
        process.send_signal(signal.SIGKILL)
        out = process.communicate()[0]
    assert "2 more shards arrive while the tokenizer trains" in out
    assert asked(hub) == sorted([*FIRST, *rest])
    pinned = json.loads((root / DATA_FILE).read_text())
    assert [shard["name"] for shard in pinned["train"]] == [SET.name(k) for k in range(3)]
    assert pinned["val"]["name"] == SET.val_shard

    # a run for which all shards, and more, were there from the start is the same run
    other = tmp_path / "other"
    (other / SET.folder).mkdir(parents=True)
    for name, body in bodies.items():
        (other / SET.folder / name).write_bytes(body)
    hub.forget()
    process = start(other, "speedrun.py", *FLAGS, **env(hub))
    try:
        wait_for(other / "smoke" / "pretrain" / DONE_FILE, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert hub.asked == []
    for stage in ("tokenizer", "tokenizer_eval", "pretrain"):
        configs = [json.loads((folder / "smoke" / stage / "config.json").read_text()) for folder in (tmp_path, other)]
        assert configs[0] == configs[1], stage
    losses = [(folder / "smoke" / "pretrain" / "metrics.jsonl").read_text() for folder in (tmp_path, other)]
    assert [json.loads(line).get("train/loss") for line in losses[0].splitlines()] == [
        json.loads(line).get("train/loss") for line in losses[1].splitlines()
    ]


def test_a_download_that_fails_in_the_background_is_one_error_of_the_stage_that_needs_it(hub, tmp_path):
    del hub.files[path_of(SET.name(2))]
    code, out = run(tmp_path, "speedrun.py", *FLAGS, **env(hub))
    assert code == 1 and "tokenizer_eval: done" in out and "Traceback" not in out
    assert out.count("error: ") == 1 and "pretraining needs shards that did not arrive" in out
    assert f"{SET.name(2)}: " in out and "404" in out
    assert not (tmp_path / "smoke" / "pretrain").exists()
    code, out = run(tmp_path, "speedrun.py", *FLAGS, **env(hub))
    assert code == 1 and "tokenizer: done before" in out


@pytest.mark.slow
def test_the_tokenizer_alone_fetches_only_its_shards(hub, tmp_path):
    flags = ("--no-ray", "--data", "climbmix", "--model-tag", "d1")
    small = ("--depth=1", "--head-dim=16", "--aspect-ratio=32", "--max-seq-len=32", "--num-iterations=2",
             "--total-batch-size=64", "--device-batch-size=2", "--eval-tokens=64")  # fmt: skip
    code, out = run(tmp_path, "tok_train.py", *flags, "--vocab-size", "300", "--max-chars", "2000", **env(hub))
    assert code == 0 and asked(hub) == sorted(FIRST), out
    assert run(tmp_path, "tok_eval.py", *flags, **env(hub))[0] == 0
    assert asked(hub) == sorted(FIRST)
    code, out = run(tmp_path, "pretrain.py", *flags, *small, "--max-shards", "4", **env(hub))
    assert code == 0, out
    assert asked(hub) == sorted([*FIRST, SET.name(1), SET.name(2), SET.name(3)])
    assert os.listdir(tmp_path / "d1").count("tokenizer_data.json") == 1


# --- repackage.py


def test_repackage_and_train_on_it(tmp_path):
    folder = write_shards(tmp_path / "in", shards=2, documents=1500)
    flags = ("--data", str(folder), "--to", "out", "--val-docs", "100", "--chars-per-shard", "5e4", "--seed", "42")
    code, out = run(tmp_path, "repackage.py", *flags)
    assert code == 0 and "3,000 documents" in out and "for validation" in out, out
    flags_of_training = ("--no-ray", "--data", str(tmp_path / "out"), "--model-tag", "d1", "--vocab-size", "300")
    assert run(tmp_path, "tok_train.py", *flags_of_training)[0] == 0
    code, out = run(tmp_path, "repackage.py", *flags)
    assert code == 1 and "is there already" in out and "Traceback" not in out


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "--data"),
        (["--data", "nowhere", "--to", "out"], "does not exist"),
        (["--data", ".", "--to", "s3://bucket/out"], "not to a URI"),
        (["--data", ".", "--to", "out", "--val-docs", "0"], "must be >= 1"),
        (["--data", "x.txt", "--to", "out"], "--val-docs"),
    ],
)
def test_what_a_person_may_get_wrong_of_a_repackaging(tmp_path, flags, words):
    (tmp_path / "x.txt").write_text("one document")
    code, out = run(tmp_path, "repackage.py", *flags)
    assert code in (1, 2) and words in out and "Traceback" not in out
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]

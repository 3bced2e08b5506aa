"""Laws of the run's folder: whole files, stage state, one writer."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat_ray import run_dir
from nanochat_ray.run_dir import (
    Lease,
    RunBusyError,
    RunDir,
    StaleWriterError,
    check_writer,
    lease_epoch,
    locked,
    writing_as,
)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    run_dir.write_json(path, {"a": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_dir.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        run_dir.write_json(path, {"a": 2})
    assert run_dir.read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_processes_of_equal_ids_do_not_share_a_temporary_file(tmp_path, monkeypatch):
    """Containers on one shared folder have equal process ids, and their main threads may have equal ones too."""
    seen, real = [], os.replace

    def replace(source, target):
        seen.append(Path(source).name)
        real(source, target)

    monkeypatch.setattr(run_dir.os, "replace", replace)
    for _ in range(2):
        run_dir.write_json(tmp_path / "a.json", {})
    assert len(set(seen)) == 2


def test_nan_is_no_json(tmp_path):
    with pytest.raises(ValueError):
        run_dir.write_json(tmp_path / "a.json", {"a": float("nan")})


def test_a_stage_is_fresh_then_interrupted_then_done(tmp_path):
    run = RunDir(tmp_path / "d4")
    config = {"settings": {"depth": 4, "names": ("a", "b")}}
    assert run.begin_stage("pretrain", config) == "fresh"
    assert run.begin_stage("pretrain", config) == "interrupted"
    run.finish_stage("pretrain")
    assert run.begin_stage("pretrain", config) == "done"
    assert run.require_stage("pretrain", "pretrain.py") == tmp_path / "d4" / "pretrain"


@pytest.mark.parametrize("finish", [False, True])
def test_another_config_is_refused_with_the_difference_and_the_fix(tmp_path, finish):
    run = RunDir(tmp_path / "d4")
    run.begin_stage("pretrain", {"settings": {"depth": 4, "seed": 1}})
    if finish:
        run.finish_stage("pretrain")
    with pytest.raises(ValueError, match=r"settings\.depth: 4 -> 6") as error:
        run.begin_stage("pretrain", {"settings": {"depth": 6, "seed": 1}})
    assert "--model-tag" in str(error.value) and str(run.stage("pretrain")) in str(error.value)
    assert "seed" not in str(error.value)


def test_a_missing_stage_names_the_job(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"jobs/tok_train\.py"):
        RunDir(tmp_path / "d4").require_stage("tokenizer", "tok_train.py")


@pytest.mark.parametrize("tag", ["", "a/b", "..", ".hidden"])
def test_a_tag_is_a_plain_name(tag):
    with pytest.raises(ValueError, match="model tag"):
        RunDir.of(None, tag)


def test_storage(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert run_dir.storage_path(None) == tmp_path
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "")
    assert run_dir.storage_path(None).parts[-2:] == (".cache", "nanochat_ray")
    assert run_dir.shown(run_dir.storage_path("s3://bucket/runs/")) == "s3://bucket/runs"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "s3://bucket/other")
    assert run_dir.shown(run_dir.storage_path(None)) == "s3://bucket/other"
    assert run_dir.shown(run_dir.storage_path("gs://bucket/runs")) == "gs://bucket/runs"
    assert run_dir.storage_path(str(tmp_path)) == tmp_path


def test_the_largest_depth_is_found_first(tmp_path):
    for name in ("d4", "d12", "d12_try", "cpu"):
        Lease.acquire(tmp_path / name).release()
    os.utime(tmp_path / "d12_try" / run_dir.LEASE_FILE, (2e9, 2e9))
    assert run_dir.find_model_tag(tmp_path) == "d12_try"
    with pytest.raises(FileNotFoundError, match="no run"):
        run_dir.find_model_tag(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="cpu, d12"):
        run_dir.existing_run(str(tmp_path), "d99")


def test_a_second_holder_is_refused_by_name_while_the_first_lives(tmp_path):
    with Lease.acquire(tmp_path) as lease, pytest.raises(RunBusyError, match=f"process {os.getpid()}"):
        assert lease.epoch == 1
        Lease.acquire(tmp_path)
    with Lease.acquire(tmp_path) as lease:
        assert lease.epoch == 2


HOLDER = (
    "import sys, time; from pathlib import Path; from nanochat_ray.run_dir import Lease;"
    "Lease.acquire(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
)


def test_a_killed_holder_is_followed_at_once_and_can_write_no_more(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunBusyError, match=str(holder.pid)):
        Lease.acquire(tmp_path)
    holder.kill()
    holder.wait()
    with Lease.acquire(tmp_path) as lease:
        assert lease.epoch == 2
        with pytest.raises(StaleWriterError, match="lease 1"):
            check_writer(tmp_path, 1)
        with writing_as(tmp_path, 2):
            pass
        with pytest.raises(StaleWriterError), writing_as(tmp_path, 1):
            raise AssertionError("a stale writer got in")


def test_a_pid_that_was_used_again_is_not_the_holder(tmp_path):
    Lease.acquire(tmp_path).release()
    record = json.loads((tmp_path / run_dir.LEASE_FILE).read_text())
    run_dir.write_json(tmp_path / run_dir.LEASE_FILE, {**record, "released": False, "started": "1"})
    Lease.acquire(tmp_path).release()
    assert lease_epoch(tmp_path) == 2


@pytest.mark.parametrize("age_s, busy", [(1.0, True), (run_dir.HEARTBEAT_STALE_S + 1, False)])
def test_a_holder_elsewhere_lives_by_its_heartbeat(tmp_path, age_s, busy):
    Lease.acquire(tmp_path).release()
    record = json.loads((tmp_path / run_dir.LEASE_FILE).read_text())
    away = {**record, "released": False, "host": "elsewhere|x|y", "heartbeat": time.time() - age_s}
    run_dir.write_json(tmp_path / run_dir.LEASE_FILE, away)
    if busy:
        with pytest.raises(RunBusyError, match="elsewhere"):
            Lease.acquire(tmp_path)
    else:
        Lease.acquire(tmp_path).release()


def test_the_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir, "HEARTBEAT_S", 0.05)
    with Lease.acquire(tmp_path):
        first = json.loads((tmp_path / run_dir.LEASE_FILE).read_text())["heartbeat"]
        deadline = time.monotonic() + 10
        while json.loads((tmp_path / run_dir.LEASE_FILE).read_text())["heartbeat"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_launch_that_could_not_be_written_down_leaves_the_lease_as_it_was(tmp_path, monkeypatch):
    def failing(root, record):
        raise ConnectionError("no answer")

    with Lease.acquire(tmp_path) as lease:
        with monkeypatch.context() as patch, pytest.raises(ConnectionError):
            patch.setattr(run_dir, "_store_lease", failing)
            lease.advance()
        lease.check()
        assert lease.advance() == 2


def test_a_lock_that_is_never_given_back_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir, "LEASE_LOCK_WAIT_S", 0.3)
    Lease.acquire(tmp_path).release()
    beats = []
    with locked(tmp_path / run_dir.LEASE_LOCK_FILE, 0.0):
        for take in (lambda: writing_as(tmp_path, 1), lambda: locked(tmp_path / run_dir.LEASE_LOCK_FILE, 0.3)):
            with pytest.raises(TimeoutError, match=r"lease\.lock for 0\.3 s"), take():
                raise AssertionError("two in one lock")
        with pytest.raises(TimeoutError), locked(tmp_path / run_dir.LEASE_LOCK_FILE, 0.3, lambda: beats.append(1)):
            raise AssertionError("two in one lock")
    assert len(beats) >= 2
    with writing_as(tmp_path, 1):
        pass


def failing_reads(monkeypatch, n, number):
    """The next `n` reads of files fail with an error number."""
    left, real = iter(range(n)), Path.read_bytes

    def read_bytes(path):
        if next(left, None) is not None:
            raise OSError(number, os.strerror(number))
        return real(path)

    monkeypatch.setattr(run_dir.Path, "read_bytes", read_bytes)


def test_a_lease_that_is_just_replaced_on_nfs_is_read_again(tmp_path, monkeypatch):
    Lease.acquire(tmp_path).release()
    failing_reads(monkeypatch, 3, errno.ESTALE)
    check_writer(tmp_path, 1)
    monkeypatch.setattr(run_dir, "READ_AGAIN_S", (0.01,) * 3)
    failing_reads(monkeypatch, 4, errno.ESTALE)
    with pytest.raises(ConnectionError, match=r"lease\.json"):
        check_writer(tmp_path, 1)
    failing_reads(monkeypatch, 1, errno.EACCES)
    with pytest.raises(PermissionError):
        check_writer(tmp_path, 1)


def test_a_damaged_lease_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir, "READ_AGAIN_S", ())
    (tmp_path / run_dir.LEASE_FILE).write_text('{"epoch": ')
    with pytest.raises(ValueError, match=r"lease\.json is damaged .*delete it"):
        Lease.acquire(tmp_path)


def test_a_second_launch_shuts_out_the_first(tmp_path):
    with Lease.acquire(tmp_path) as lease:
        first = lease.epoch
        assert lease.advance() == lease.epoch == first + 1
        with pytest.raises(StaleWriterError), writing_as(tmp_path, first):
            raise AssertionError("the first launch may not write")
        with writing_as(tmp_path, lease.epoch):
            pass
        lease.check()
    with Lease.acquire(tmp_path) as after:
        assert after.epoch == first + 2

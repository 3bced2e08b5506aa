"""A run in object storage has one writer, and what cannot be written is refused."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

from nanochat_ray import run_dir as run_dir_module
from nanochat_ray.messages import World
from nanochat_ray.model import checkpoint as checkpoint_module
from nanochat_ray.model.checkpoint import (
    latest_checkpoint,
    open_checkpoint,
    saved_steps,
)
from nanochat_ray.remote import Every, Remote
from nanochat_ray.run_dir import (
    CHECKPOINTS,
    HEARTBEAT_STALE_S,
    LEASE_FILE,
    METRICS_FILE,
    STOP_FILE,
    Lease,
    RunBusyError,
    RunDir,
    StaleWriterError,
    check_writer,
    clear_stop,
    lease_epoch,
    pull_records,
    request_stop,
)
from nanochat_ray.stages import hooks as hooks_module
from nanochat_ray.stages.hooks import FolderHooks, TrainingState
from tests.remote.stored import checkpoints_of, is_of, save

# --- one writer --------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_and_a_silent_one_followed(machine, uri):
    machine("one", same_host=False)
    root = RunDir.of(uri, "d4").root
    first = Lease.acquire(root)
    machine("two", same_host=False)
    other = RunDir.of(uri, "d4").root
    with pytest.raises(RunBusyError, match=r"(s3|file)://.*on one"):
        Lease.acquire(other)
    first._closed.set()  # its machine is gone: no more heartbeats
    first._thread.join()
    record = json.loads(Remote.of(other).read(other / LEASE_FILE))
    record["heartbeat"] -= HEARTBEAT_STALE_S + 1
    Remote.of(other).write(other / LEASE_FILE, json.dumps(record).encode())
    with Lease.acquire(other) as second:
        assert second.epoch > first.epoch and lease_epoch(root) == second.epoch
        with pytest.raises(StaleWriterError, match=f"lease {first.epoch}, .* lease {second.epoch}"):
            check_writer(root, first.epoch)
        third = second.advance()
        assert lease_epoch(root) == third == second.epoch
        second.check()
    assert json.loads(Remote.of(other).read(other / LEASE_FILE))["released"]
    machine("one", same_host=False)
    hooks = FolderHooks(root / "pretrain", first.epoch, World(), None)
    with pytest.raises(StaleWriterError):
        hooks.save(1, TrainingState({"w": torch.zeros(1)}, {}, {}))
    hooks.close()
    assert saved_steps(root / "pretrain" / CHECKPOINTS) == []


def test_of_two_that_come_at_once_one_writes(machine, uri, tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir_module, "SETTLE_S", 0.5)
    roots = []
    for name in ("one", "two", "three"):
        machine(name)
        roots.append(RunDir.of(uri, "d4").root)
    start, held, refused = threading.Barrier(len(roots)), [], []

    def take(root):
        start.wait()
        try:
            held.append(Lease.acquire(root))
        except RunBusyError as error:
            refused.append(error)

    threads = [threading.Thread(target=take, args=(root,)) for root in roots]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) + len(refused) == 3
    valid = [lease for lease in held if lease.epoch == lease_epoch(roots[0])]
    assert len(valid) == 1  # whoever else believes to hold it cannot commit
    for lease in held:
        lease.release()


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_training_elsewhere_hears_of_a_stop_and_of_a_follower(machine, uri, monkeypatch):
    monkeypatch.setattr(hooks_module, "WATCH_INTERVAL_S", 0.05)
    monkeypatch.setattr(run_dir_module, "FOLLOW_REMOTE_S", 0.05)
    machine("driver")
    run = RunDir.of(uri, "d4")
    lease = run.open()
    run.begin_stage("pretrain", {})
    driver_stage = run.stage("pretrain")
    machine("worker", same_host=False)
    stage = pull_records(RunDir.of(uri, "d4").stage("pretrain"))
    hooks = FolderHooks(stage, lease.epoch, World(), None)
    (stage / METRICS_FILE).write_text('{"step": 0}\n')
    assert not hooks.stop_requested()
    with run.following("pretrain"):
        wait_until((driver_stage / METRICS_FILE).exists)
    request_stop(driver_stage)
    wait_until(hooks.stop_requested)
    clear_stop(driver_stage)
    wait_until(lambda: not hooks.stop_requested())
    assert Remote.of(stage).read(stage / STOP_FILE) is None
    lease.advance()

    def lost():
        try:
            hooks.stop_requested()
        except StaleWriterError:
            return True
        return False

    wait_until(lost)
    hooks.close()
    lease.release()


def test_a_reader_leaves_the_files_of_a_job_on_the_same_machine_alone(machine, uri):
    run = RunDir.of(uri, "d4")
    with run.open():
        run.begin_stage("pretrain", {})
        (run.stage("pretrain") / "result.json").write_text("not pushed yet")
        run.fetch()
        assert (run.stage("pretrain") / "result.json").exists()
    run.fetch()
    assert not (run.stage("pretrain") / "result.json").exists()


def test_a_pull_that_never_ends_is_named_and_a_wait_for_it_is_a_sign_of_life(machine, uri, monkeypatch):
    root = checkpoints_of(uri)
    save(root, 1)
    beats = []
    machine("other")
    root = checkpoints_of(uri)
    root.mkdir(parents=True)
    monkeypatch.setattr(checkpoint_module, "PULL_LOCK_WAIT_S", 0.3)
    with (
        run_dir_module.locked(root / checkpoint_module.PULL_LOCK_FILE, 0.0),
        pytest.raises(TimeoutError, match=r"\.pull\.lock for 0\.3 s"),
    ):
        open_checkpoint(root, 1, lambda: beats.append(1))
    waited = len(beats)
    assert waited >= 2
    assert is_of(latest_checkpoint(root, lambda: beats.append(1)), 1) and len(beats) >= waited + 3


def test_a_watch_goes_on_whatever_a_look_meets(caplog):
    looks = []

    def look():
        looks.append(1)
        raise (ValueError("half a record"), OSError("no answer"), KeyError("epoch"))[len(looks) % 3]

    with Every(0.01, look, "watch"):
        wait_until(lambda: len(looks) > 6)
    assert "half a record" in caplog.text and "no answer" in caplog.text


def test_half_a_lease_is_read_again(machine, uri, monkeypatch):
    root = RunDir.of(uri, "d4").root
    Lease.acquire(root).release()
    epoch, real, seen = lease_epoch(root), Remote.read, []

    def read(remote, path):
        data = real(remote, path)
        if path.parent != root:
            return data  # asked by a thread of another run
        seen.append(path.name)
        return data[: 10 * len(seen)] if len(seen) < 3 else data

    monkeypatch.setattr(Remote, "read", read)
    check_writer(root, epoch)
    assert seen == [LEASE_FILE] * 3


# --- refusals ----------------------------------------------------------------------------------------------------


def test_storage_that_cannot_be_written_is_refused(machine, s3_server, tmp_path):
    no_bucket = s3_server("x").replace("//bucket/", "//nobody-has-this/")
    with pytest.raises(ValueError, match=r"--storage s3://nobody-has-this/x.*cannot be written") as error:
        RunDir.of(no_bucket, "d4").open()
    assert "NO_SUCH_BUCKET" in str(error.value) and "AWS_ACCESS_KEY_ID" in str(error.value)
    assert not RunDir.of(no_bucket, "d4").root.exists()
    for bad, why in (
        ("nothing://bucket/x", "Unrecognized filesystem"),
        ("s3://bucket/x?colour=red", "colour"),
        (f"file://{tmp_path}/a_file/x", "a_file"),
    ):
        (tmp_path / "a_file").write_text("in the way")
        with pytest.raises(ValueError, match=f"cannot be written.*{why}"):
            RunDir.of(bad, "d4").open()


PROBE = """
import os, sys, time
from nanochat_ray import remote
from nanochat_ray.run_dir import RunDir
remote.PROBE_TIMEOUT_S = 1.0
try:
    RunDir.of(sys.argv[1], "d4").open()
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_store_that_does_not_answer_is_refused_in_time(machine, s3_server):
    """The process ends too, though a request is still open."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(5)
        uri = f"s3://bucket/x?endpoint_override=127.0.0.1:{silent.getsockname()[1]}&scheme=http"
        done = subprocess.run([sys.executable, "-c", PROBE, uri], capture_output=True, text=True, timeout=60)
    assert "cannot be written: no answer in 1 s" in done.stdout, done.stderr

"""Laws of runs in object storage: the store is the truth, whole checkpoints only, one writer, clear refusals."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from nanochat_ray import remote as remote_module
from nanochat_ray import run_dir as run_dir_module
from nanochat_ray.messages import World
from nanochat_ray.model.checkpoint import (
    best_checkpoint,
    drop_after,
    known_bpb,
    latest_checkpoint,
    newest_whole_step,
    note_evaluation,
    open_checkpoint,
    prune,
    resolve_checkpoint,
    save_checkpoint,
    saved_steps,
    step_folder,
)
from nanochat_ray.remote import Remote, mirror_folder
from nanochat_ray.run_dir import (
    CHECKPOINTS,
    METRICS_FILE,
    Lease,
    RunDir,
    StaleWriterError,
    existing_run,
    find_model_tag,
    have_records,
    pull_records,
    shown,
    storage_path,
    write_json,
    writing_as,
)
from nanochat_ray.stages import hooks as hooks_module
from nanochat_ray.stages.hooks import FolderHooks, TrainingState
from nanochat_ray.text.tokenizer import Tokenizer
from tests.remote.stored import checkpoints_of, is_of, object_of, save
from tests.stages.tiny import PRETRAIN, Recorder, make_run, run_pretrain

# --- paths -------------------------------------------------------------------------------------------------------


def test_a_path_knows_its_store(machine, tmp_path):
    folder = storage_path("s3://bucket/pre/fix/?region=eu-west-1") / "d4" / "pretrain"
    remote = Remote.of(folder)
    assert remote.uri == "s3://bucket/pre/fix?region=eu-west-1"
    assert remote.uri_of(folder) == "s3://bucket/pre/fix/d4/pretrain?region=eu-west-1" == shown(folder)
    assert remote.uri_of(remote.local) == remote.uri
    assert folder.is_relative_to(tmp_path / "here")
    assert Remote.of(tmp_path / "s3%3A%2F%2Fbucket" / "x") is None and Remote.of(tmp_path) is None
    assert shown(tmp_path) == str(tmp_path)


@pytest.mark.parametrize(
    "given",
    [
        "s3://key:secret@bucket/x", "s3://key:se/cret@bucket/x", "s3://bucket/x?access_key=a&secret_key=b",
        "s3://bucket/x?session_token=b", "abfs://:secret@account.dfs.core.windows.net/c/x",
        "abfs://container:secret@account.dfs.core.windows.net/x", "abfs://c@a.dfs.core.windows.net/x?client_secret=b",
        "abfs://c@a.dfs.core.windows.net/x?sv=1&sig=b", "gs://bucket/x?access_token=b",
    ],
)  # fmt: skip
def test_keys_have_no_place_in_a_uri(given, tmp_path):
    with pytest.raises(ValueError, match="AWS_ACCESS_KEY_ID") as error:
        mirror_folder(given, tmp_path)
    assert "secret@" not in str(error.value) and "cret@" not in str(error.value) and "=b" not in str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        "abfs://container@account.dfs.core.windows.net/runs", "gs://anonymous@bucket/x", "hdfs://user@host:8020/x",
        "hdfs://host:8020/a@b", "s3://bucket/x?region=eu-west-1&scheme=http&endpoint_override=host:9000",
        "abfs://c@a.dfs.core.windows.net/x?tenant_id=1&client_id=2",
    ],
)  # fmt: skip
def test_a_name_in_a_uri_is_no_key(given, tmp_path):
    path = mirror_folder(given, tmp_path) / "d4"
    assert Remote.of(path).uri == given and Remote.of(path).uri_of(path).partition("?")[0].endswith("/d4")


def test_a_uri_too_long_for_a_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is the most"):
        mirror_folder("s3://bucket/" + "x" * 300, tmp_path)


# --- files -------------------------------------------------------------------------------------------------------


def test_objects(machine, uri):
    root = storage_path(uri)
    remote = Remote.of(root)
    path = root / "a" / "b.bin"
    assert remote.read(path) is None and remote.listing(root) == {} and not remote.pull(path)
    remote.delete(path)
    remote.write(path, b"one")
    remote.write(path, b"two")
    assert not path.exists() and remote.read(path) == b"two" and remote.pull(path) and path.read_bytes() == b"two"
    path.write_bytes(bytes(range(256)) * 5000)
    remote.push(path)
    assert list(remote.listing(root)) == ["a"] and remote.listing(root / "a")["b.bin"].size_bytes == 1_280_000
    assert abs(remote.find(path).modified_s - time.time()) < 600
    path.unlink()
    assert remote.pull(path, to=root / "copy") and (root / "copy").read_bytes() == bytes(range(256)) * 5000
    remote.delete(root / "a")
    assert remote.read(path) is None and "a" not in remote.listing(root)
    assert sorted(os.listdir(root)) == ["a", "copy"]


def test_the_records_of_a_stage_travel(machine, uri):
    machine("one")
    run = RunDir.of(uri, "d4")
    with run.open() as lease:
        assert lease.epoch > 0
        write_json(run.root / "data.json", {"shards": 3})
        assert run.begin_stage("tokenizer", {"settings": {"vocab_size": 300}}) == "fresh"
        tokenizer = Tokenizer.train(["the river runs past a small town"] * 20, 300)
        tokenizer.save(run.stage("tokenizer"))
        run.finish_stage("tokenizer")
        assert run.begin_stage("pretrain", {"depth": 4}) == "fresh"
    machine("two")
    run = RunDir.of(uri, existing_run(uri, None))
    with pytest.raises(FileNotFoundError, match=r"tok_train\.py"):
        run.require_stage("tokenizer", "tok_train.py")
    assert Tokenizer.load(run.fetch().require_stage("tokenizer", "tok_train.py")).hash == tokenizer.hash
    assert run_dir_module.read_json(run.root / "data.json") == {"shards": 3}
    with run.open():
        assert run.begin_stage("tokenizer", {"settings": {"vocab_size": 300}}) == "done"
        assert run.begin_stage("pretrain", {"depth": 4}) == "interrupted"
    machine("three")
    folder = RunDir.of(uri, "d4").stage("tokenizer")
    assert Tokenizer.load(have_records(folder)).hash == tokenizer.hash
    remote = Remote.of(folder)
    remote.delete(remote.local / "d4")
    with RunDir.of(uri, "d4").open():
        assert not folder.exists() or os.listdir(folder) == []  # what the store no longer has is gone here too


def test_runs_are_found(machine, uri):
    storage = storage_path(uri)
    with pytest.raises(FileNotFoundError, match="no run in"):
        find_model_tag(storage)
    for tag in ("d4", "d12", "cpu"):
        RunDir.of(uri, tag).open().release()
    machine("other")
    assert existing_run(uri, None) == "d12" and existing_run(uri, "cpu") == "cpu"
    with pytest.raises(FileNotFoundError, match=r"no run 'd9' in (s3|file):.*cpu, d12, d4"):
        existing_run(uri, "d9")


def test_the_longer_log_wins(machine, uri):
    log = RunDir.of(uri, "d4").stage("pretrain") / METRICS_FILE
    log.parent.mkdir(parents=True)
    remote = Remote.of(log)
    remote.pull_log(log)
    assert not log.exists()
    log.write_text("1\n2\n")
    remote.push_log(log)
    log.write_text("1\n2\n3\n")
    remote.pull_log(log)
    pull_records(log.parent)
    assert log.read_text() == "1\n2\n3\n"  # the store's copy only lags behind
    log.write_text("1\n")
    remote.push_log(log)
    pull_records(log.parent)
    assert log.read_text() == "1\n2\n"
    log.write_text("1\n7\n8\n9\n")  # of a run that another machine went on with
    pull_records(log.parent)
    assert log.read_text() == "1\n2\n"


def test_a_worker_fetches_what_is_missing_and_leaves_the_rest(machine, uri):
    stage = RunDir.of(uri, "d4").stage("pretrain")
    Remote.of(stage).write(stage / "config.json", b"of the store")
    Remote.of(stage).write(stage / "wandb_id", b"abc")
    write_json(stage / "config.json", "here")
    (stage / "result.json").write_text("not pushed yet")
    (stage / "watch.jsonl").write_text("nor this\n")
    pull_records(stage)
    assert sorted(os.listdir(stage)) == ["config.json", "result.json", "wandb_id", "watch.jsonl"]
    assert run_dir_module.read_json(stage / "config.json") == "here"
    RunDir.of(uri, "d4").open().release()
    assert sorted(os.listdir(stage)) == ["config.json", "wandb_id", "watch.jsonl"]
    assert (stage / "config.json").read_bytes() == b"of the store"


# --- checkpoints -------------------------------------------------------------------------------------------------


def test_a_checkpoint_goes_through_the_store(machine, uri):
    root = checkpoints_of(uri)
    assert latest_checkpoint(root) is None
    save(root, 1, val_bpb=2.0)
    save(root, 2, val_bpb=3.0)
    machine("other")
    root = checkpoints_of(uri)
    assert not root.exists() and saved_steps(root) == [1, 2]
    assert is_of(latest_checkpoint(root), 2) and is_of(best_checkpoint(root), 1)
    assert is_of(resolve_checkpoint(root, 1), 1)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 3 in (s3|file).*there are \[1, 2\]"):
        open_checkpoint(root, 3)
    (step_folder(root, 2) / "model.safetensors").write_bytes(b"damaged here")
    assert is_of(latest_checkpoint(root), 2)  # the copy here is fetched again


def test_the_newest_and_the_best_are_kept_in_the_store(machine, uri):
    root = checkpoints_of(uri)
    save(root, 1, val_bpb=9.0)
    save(root, 2, val_bpb=9.0)
    note_evaluation(root, 1, 1.0)
    machine("other")
    root = checkpoints_of(uri)
    for step in (3, 4):
        save(root, step, val_bpb=9.0, keep_last=2)
    assert saved_steps(root) == [1, 3, 4]
    note_evaluation(root, 4, 0.5)
    save(root, 5, val_bpb=9.0, keep_last=1)
    assert saved_steps(root) == [4, 5] == [int(name[5:]) for name in sorted(os.listdir(root)) if name[0] == "s"]
    drop_after(root, 4)
    machine("third")
    assert saved_steps(checkpoints_of(uri)) == [4]


def test_a_corrupt_or_unfinished_one_in_the_store_is_passed_over(machine, uri, caplog):
    root = checkpoints_of(uri)
    remote = Remote.of(root)
    for step in (1, 2, 3, 4):
        save(root, step)
    assert newest_whole_step(root) == 4
    remote.write(object_of(root, 2, "model.safetensors"), b"short")
    remote.delete(object_of(root, 3, "optim.safetensors"))
    remote.delete(step_folder(root, 4) / "manifest.json")
    machine("other")
    root = checkpoints_of(uri)
    assert newest_whole_step(root) == 1
    with caplog.at_level("INFO"):
        assert is_of(latest_checkpoint(root), 1)
    assert all(f"step_00000{step}" in caplog.text or f"step {step}" in caplog.text for step in (2, 3, 4))
    prune(root, 1)
    assert saved_steps(root)[-1] == 4


def test_a_reader_of_a_checkpoint_removed_from_the_store_is_told(machine, uri):
    root = checkpoints_of(uri)
    save(root, 1)
    opened = latest_checkpoint(root)
    save(root, 2, keep_last=1)
    with pytest.raises(FileNotFoundError, match="removed while it was read"):
        opened.model_tensors()


def push_until_killed(root):
    step = max(saved_steps(root), default=0)
    while True:
        step += 1
        save(root, step, keep_last=2)


def test_a_push_killed_half_way_leaves_no_half_checkpoint(machine, tmp_path):
    """A writer is killed at random moments; a machine with an empty cache reads whole checkpoints only."""
    root = checkpoints_of(f"file://{tmp_path}/store")
    fork = multiprocessing.get_context("fork")
    newest = 0
    for kill in range(12):
        writer = fork.Process(target=push_until_killed, args=(root,), daemon=True)
        writer.start()
        time.sleep(0.05 + 0.013 * kill)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        shutil.rmtree(root, ignore_errors=True)
        found = latest_checkpoint(root)
        assert found is None or (is_of(found, found.step) and found.step >= newest)
        newest = found.step if found else 0
    assert newest > 3


def test_a_failing_push_is_tried_again_then_told(machine, uri, monkeypatch):
    monkeypatch.setattr(remote_module.time, "sleep", lambda seconds: None)
    root = checkpoints_of(uri)
    save(root, 1)
    from pyarrow import fs

    real, calls = fs.copy_files, []

    def copy_files(source, *args, **kwargs):
        calls.append(source)
        if len(calls) <= failures:
            raise OSError("connection reset")
        real(source, *args, **kwargs)

    monkeypatch.setattr(fs, "copy_files", copy_files)
    failures = len(remote_module.PATIENT_WAITS_S)
    assert 50 < sum(remote_module.PATIENT_WAITS_S) < 70
    save(root, 2)
    assert saved_steps(root) == [1, 2]
    calls, failures = [], 1000
    with pytest.raises(ConnectionError, match=r"step 3 not saved, earlier.* kept: cannot write (s3|file).*8 tries"):
        save(root, 3)  # nobody's mistake: the launch is tried again
    failures = 0
    assert is_of(latest_checkpoint(root), 2) and newest_whole_step(root) == 2


def test_a_commit_waits_for_the_store(machine, uri, monkeypatch):
    """The store answers again after more tries than one call makes; the lease's lock is free meanwhile."""
    run = RunDir.of(uri, "d4")
    with Lease.acquire(run.root) as lease:
        hooks = FolderHooks(run.stage("pretrain"), lease.epoch, World(), None, background=True)
        real, failures = run_dir_module.check_writer, iter(range(3))

        def check_writer(root, epoch):
            if next(failures, None) is not None:
                raise ConnectionError("no answer")
            real(root, epoch)

        def sleep(seconds):
            with run_dir_module.locked(run.root / run_dir_module.LEASE_LOCK_FILE, 5.0):
                waits.append(seconds)

        waits = []
        monkeypatch.setattr(run_dir_module, "check_writer", check_writer)
        clock = SimpleNamespace(sleep=sleep, monotonic=time.monotonic, perf_counter=time.perf_counter)
        monkeypatch.setattr(hooks_module, "time", clock)
        hooks.save(1, TrainingState({"w": torch.full((2,), 1.0)}, {}, {}))
        hooks.flush()
        assert waits == [*hooks_module.COMMIT_WAITS_S] and is_of(latest_checkpoint(run.checkpoints("pretrain")), 1)
        failures = iter(range(1000))
        hooks.save(2, TrainingState({"w": torch.full((2,), 1.0)}, {}, {}))
        with pytest.raises(ConnectionError, match="step 2 not saved"):
            hooks.flush()
        hooks.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_what_waiting_cannot_mend_is_told_at_once(machine, uri, monkeypatch, number):
    from pyarrow import fs

    def copy_files(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fs, "copy_files", copy_files)
    monkeypatch.setattr(remote_module.time, "sleep", lambda seconds: pytest.fail("waited"))
    with pytest.raises(OSError, match="step 1 not saved") as error:
        save(checkpoints_of(uri), 1)
    assert error.value.errno == number and not isinstance(error.value, ConnectionError)
    assert isinstance(error.value, PermissionError) == (number == errno.EACCES)


@pytest.mark.parametrize("moment", range(4))  # the rename, the push of each file, the manifest
def test_an_orphan_cannot_damage_the_checkpoint_of_its_follower(machine, uri, monkeypatch, moment):
    """Two launches save the same step: at some moment of its save the first one sleeps until the second is done."""
    machine("orphan")
    run = RunDir.of(uri, "d4")
    lease = Lease.acquire(run.root)
    orphan, moments, real = lease.epoch, iter(range(100)), Remote.push
    machine("follower")
    root = checkpoints_of(uri)

    def perhaps_sleep():
        if next(moments) == moment:
            monkeypatch.setattr(Remote, "push", real)
            epoch = lease.advance()
            save(root, 7, 3.0, guard=lambda: writing_as(root.parent.parent, epoch))

    def push(remote, path, to=None):
        perhaps_sleep()
        real(remote, path, to)

    def guard():
        perhaps_sleep()
        return writing_as(run.root, orphan)

    monkeypatch.setattr(Remote, "push", push)
    with pytest.raises(StaleWriterError):
        save_checkpoint(run.checkpoints("pretrain"), 7, {"w": torch.zeros(3)}, None, {"val_bpb": 9.0}, guard=guard)
    with pytest.raises(StaleWriterError):
        prune(run.checkpoints("pretrain"), 0, guard)
    note_evaluation(run.checkpoints("pretrain"), 7, 1.0)
    machine("reader")
    root = checkpoints_of(uri)
    assert is_of(latest_checkpoint(root), 7) and known_bpb(root, 7) == 3.0 and newest_whole_step(root) == 7
    save(root, 8)
    save(root, 9, 9.0, keep_last=1)
    drop_after(root, 9)
    assert saved_steps(root) == [7, 9]  # the best and the newest
    note_evaluation(root, 9, 1.0)
    prune(root, 1)
    assert list(Remote.of(root).listing(root)) == ["step_000009"]  # with all that the orphan left


def test_a_run_goes_on_on_another_machine(machine, uri, shards, tmp_path):
    """Pretraining is stopped here and goes on there with nothing but the store: bit-identical to one run."""
    whole, rows = make_run(tmp_path / "whole", shards)
    calm = Recorder(whole.stage_folder)
    run_pretrain(whole, rows, calm)

    class Background(Recorder):
        def __post_init__(self):
            FolderHooks.__init__(self, self.stage_folder, self.epoch, World(), None, keep_last=2, background=True)

    losses = []
    for name, stop_at in (("one", 5), ("two", None)):
        machine(name)
        run = RunDir.of(uri, "d2")
        with run.open() as lease:
            job, rows = make_run(run.root, shards, PRETRAIN)
            hooks = Background(job.stage_folder, lease.epoch, stop_at)
            run_pretrain(job, rows, hooks)
            hooks.flush()
            hooks.close()
            losses += hooks.losses
    assert losses == calm.losses
    machine("three")
    found = latest_checkpoint(RunDir.of(uri, "d2").checkpoints("pretrain"))
    assert found.model_hash == latest_checkpoint(whole.stage_folder / CHECKPOINTS).model_hash

"""Laws of checkpoints: whole or not there, corrupt ones named, the newest and the best kept."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_ray.config import ModelConfig
from nanochat_ray.model import checkpoint as checkpoints
from nanochat_ray.model.checkpoint import (
    CorruptCheckpointError,
    best_checkpoint,
    drop_after,
    latest_checkpoint,
    model_tensors,
    newest_whole_step,
    note_evaluation,
    open_checkpoint,
    resolve_checkpoint,
    save_checkpoint,
    saved_steps,
    snapshot,
    step_folder,
    sweep,
)
from nanochat_ray.model.gpt import GPT
from nanochat_ray.run_dir import StaleWriterError

SMALL = ModelConfig(sequence_len=8, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)


def save(root, step, val_bpb=None, keep_last=None, **changes):
    state = {"w": torch.full((50, 7), float(step)), "b": torch.full((3,), step, dtype=torch.bfloat16)}
    return save_checkpoint(root, step, state, dict(state), {"val_bpb": val_bpb}, keep_last, **changes)


def holds_its_step(checkpoint):
    """Whether all that a checkpoint has is of one step."""
    tensors = [*checkpoint.model_tensors().values(), *(checkpoint.optimizer_tensors() or {}).values()]
    return len(tensors) == 4 and all(bool((t == float(checkpoint.step)).all()) for t in tensors)


def test_what_was_saved_comes_back(tmp_path):
    folder = save(tmp_path, 7, val_bpb=1.5)
    found = resolve_checkpoint(tmp_path, None)
    assert (found.folder, found.step, found.meta) == (folder, 7, {"step": 7, "val_bpb": 1.5})
    assert holds_its_step(found)
    assert found.model_tensors()["b"].dtype == torch.bfloat16
    with pytest.raises(FileNotFoundError, match=r"step 8 in .*there are \[7\]"):
        resolve_checkpoint(tmp_path, 8)
    with pytest.raises(FileNotFoundError, match="train the stage first"):
        resolve_checkpoint(tmp_path / "nowhere", None)


def test_a_snapshot_does_not_follow_its_source():
    model = GPT.build(SMALL, device="cpu", compute_dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copies = model_tensors(model) | snapshot([("turned", torch.arange(6).view(2, 3).t())])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(copies[name], before[name]) for name in before)
    assert copies["turned"].is_contiguous() and copies["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]


def rewrite(manifest, change):
    value = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(change(value)))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def rename_in_manifest(new):
    def change(value):
        value["files"][new] = value["files"].pop("optim.safetensors")
        return value

    return lambda folder: rewrite(folder / "manifest.json", change)


DAMAGE = {
    "a bit of the weights": lambda folder: flip(folder / "model.safetensors"),
    "a bit of the optimizer": lambda folder: flip(folder / "optim.safetensors"),
    "a bit of the metadata": lambda folder: flip(folder / "meta.json"),
    "a short file": lambda folder: os.truncate(folder / "model.safetensors", 100),
    "an empty file": lambda folder: os.truncate(folder / "meta.json", 0),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no optimizer": lambda folder: (folder / "optim.safetensors").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "half a manifest": lambda folder: os.truncate(folder / "manifest.json", 40),
    "a binary manifest": lambda folder: (folder / "manifest.json").write_bytes(b"\xff\x00\xfe"),
    "a list as manifest": lambda folder: (folder / "manifest.json").write_text("[1, 2]"),
    "null as manifest": lambda folder: (folder / "manifest.json").write_text("null"),
    "no files listed": lambda folder: rewrite(folder / "manifest.json", lambda v: v | {"files": {}}),
    "a list of files": lambda folder: rewrite(folder / "manifest.json", lambda v: v | {"files": list(v["files"])}),
    "sizes as text": lambda folder: rewrite(
        folder / "manifest.json", lambda v: v | {"files": {n: e | {"bytes": "1"} for n, e in v["files"].items()}}
    ),
    "an absolute name": rename_in_manifest("/etc/hostname"),
    "a name above": rename_in_manifest("../step_000001/optim.safetensors"),
    "the folder above": rename_in_manifest(".."),
    "a name with a null byte": rename_in_manifest("a\0b"),
    "another step's": lambda folder: shutil.copytree(step_folder(folder.parent, 1), folder, dirs_exist_ok=True),
    "a file instead": lambda folder: (shutil.rmtree(folder), folder.write_text("nothing"))[0],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_corrupt_checkpoint_is_passed_over_and_named(tmp_path, caplog, damage):
    save(tmp_path, 1)
    folder = save(tmp_path, 2, val_bpb=0.5)
    DAMAGE[damage](folder)
    found = latest_checkpoint(tmp_path)
    assert found is not None and found.step == 1 and holds_its_step(found)
    assert "step_000002" in caplog.text or damage == "a file instead"
    with pytest.raises((CorruptCheckpointError, FileNotFoundError), match=r"step_000002|step 2"):
        open_checkpoint(tmp_path, 2)
    assert best_checkpoint(tmp_path) is None


def test_the_newest_whole_step(tmp_path):
    assert newest_whole_step(tmp_path) == newest_whole_step(tmp_path / "nowhere") == 0
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    assert newest_whole_step(tmp_path) == 4
    DAMAGE["a name with a null byte"](step_folder(tmp_path, 4))
    DAMAGE["no optimizer"](step_folder(tmp_path, 3))
    step_folder(tmp_path, 5).mkdir()
    assert newest_whole_step(tmp_path) == 2


def test_the_next_save_takes_the_place_of_a_corrupt_one(tmp_path):
    flip(save(tmp_path, 1) / "model.safetensors")
    assert latest_checkpoint(tmp_path) is None
    save(tmp_path, 1)
    assert holds_its_step(latest_checkpoint(tmp_path))
    assert os.listdir(tmp_path) == ["step_000001"]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([None, 1.0, 2.0, 3.0]), st.sampled_from([None, None, 0.5, 2.5])), max_size=7),
    st.integers(1, 3),
)
def test_the_newest_and_the_best_are_kept(tmp_path_factory, seen, keep_last):
    """`seen` has for each checkpoint the bpb known when it was saved, and what its own evaluation found after."""
    root = tmp_path_factory.mktemp("kept")
    bpb, there = {}, []
    for step, (before, own) in enumerate(seen, start=1):
        save(root, step, before, keep_last)
        bpb[step] = before
        known = [(bpb[s], s) for s in (*there, step) if bpb[s] is not None]
        newest = (*there, step)[-keep_last:]
        there = [s for s in (*there, step) if s in newest or (known and s == min(known)[1])]
        assert saved_steps(root) == there
        if own is not None:
            note_evaluation(root, step, own)
            bpb[step] = own
        known = [(bpb[s], s) for s in there if bpb[s] is not None]
        best = best_checkpoint(root)
        assert (best and best.step) == (min(known)[1] if known else None)


def test_broken_ones_do_not_count_as_kept(tmp_path):
    for step in range(1, 5):
        save(tmp_path, step)
    os.truncate(step_folder(tmp_path, 3) / "model.safetensors", 5)
    (step_folder(tmp_path, 4) / "manifest.json").unlink()
    save(tmp_path, 5, keep_last=2)
    assert saved_steps(tmp_path) == [2, 3, 4, 5]  # the two whole ones, and what is newer than the older of them


def test_an_evaluation_belongs_to_the_checkpoint_that_was_evaluated(tmp_path):
    for step, bpb in ((1, 3.0), (2, 2.0), (3, 1.0)):
        save(tmp_path, step, val_bpb=9.0)
        note_evaluation(tmp_path, step, bpb)
    note_evaluation(tmp_path, 77, 0.1)  # never saved
    assert best_checkpoint(tmp_path).step == 3
    drop_after(tmp_path, 2)
    assert saved_steps(tmp_path) == [1, 2] and best_checkpoint(tmp_path).step == 2
    save(tmp_path, 2, val_bpb=9.0)  # trained again after a rollback, and not evaluated yet
    assert best_checkpoint(tmp_path).step == 1
    assert open_checkpoint(tmp_path, 2).meta["val_bpb"] == 9.0


def test_going_back_needs_a_checkpoint_that_verifies(tmp_path):
    save(tmp_path, 1)
    flip(save(tmp_path, 2) / "model.safetensors")
    save(tmp_path, 3)
    with pytest.raises(CorruptCheckpointError):
        drop_after(tmp_path, 2)
    assert saved_steps(tmp_path) == [1, 2, 3]


def test_a_reader_of_a_removed_checkpoint_is_told(tmp_path):
    save(tmp_path, 1)
    opened = open_checkpoint(tmp_path, 1)
    save(tmp_path, 2, keep_last=1)
    for read in (opened.model_tensors, opened.optimizer_tensors, lambda: opened.model_hash):
        with pytest.raises(FileNotFoundError, match=r"step_000001 was removed while it was read.*newest"):
            read()


def test_a_full_disk_keeps_the_earlier_ones(tmp_path, monkeypatch):
    save(tmp_path, 1)
    save(tmp_path, 2)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(OSError, match=r"step 3 not saved, earlier ones are kept.*No space") as error:
        save(tmp_path, 3, keep_last=1)
    assert error.value.errno == errno.ENOSPC
    assert sorted(os.listdir(tmp_path)) == ["step_000001", "step_000002"]


def test_a_write_that_fails_half_way_is_an_os_error(tmp_path):
    """Of safetensors' own making, whose error is none."""
    save(tmp_path, 1)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))
    try:
        with pytest.raises(OSError, match=r"step 2 not saved, earlier ones are kept.*[Ff]ile too large"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == ["step_000001"]


def test_an_error_keeps_its_kind(tmp_path, monkeypatch):
    """What decides whether a launch is tried again."""
    for error in (ConnectionError("gone"), TimeoutError("late"), PermissionError(errno.EACCES, "no"), OSError("odd")):

        def failing(path, error=error):
            raise error

        monkeypatch.setattr(checkpoints, "_fsync", failing)
        with pytest.raises(OSError, match="step 1 not saved") as caught:
            save(tmp_path, 1)
        assert type(caught.value) is type(error) and caught.value.errno == error.errno
    assert os.listdir(tmp_path) == []


def test_a_sweep_leaves_what_a_reader_is_just_pulling(tmp_path):
    for name in ("pulled.1", "pulled.2", "3"):
        (tmp_path / f".step_000009.{name}.tmp").mkdir()
    old = time.time() - checkpoints.ABANDONED_S - 10
    os.utime(tmp_path / ".step_000009.pulled.1.tmp", (old, old))
    save(tmp_path, 1)
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".step_000009.pulled.2.tmp", "step_000001"]


def test_a_refused_commit_changes_nothing(tmp_path):
    class Refusing:
        def __enter__(self):
            raise StaleWriterError("another one writes")

        def __exit__(self, *exc):
            return None

    save(tmp_path, 1)
    with pytest.raises(StaleWriterError):
        save(tmp_path, 2, keep_last=1, guard=Refusing)
    assert os.listdir(tmp_path) == ["step_000001"]


def test_another_architecture_is_named(tmp_path):
    save_checkpoint(tmp_path, 1, {"w": torch.zeros(1)}, None, {"model_config": SMALL.model_dump(mode="json")})
    found = latest_checkpoint(tmp_path)
    found.check_architecture(SMALL)
    assert found.optimizer_tensors() is None
    with pytest.raises(ValueError, match=r"another architecture:\n  n_layer: 2 -> 3\nGive") as error:
        found.check_architecture(SMALL.model_copy(update={"n_layer": 3}))
    assert "n_embd" not in str(error.value)


KILLS = 20


def write_until_killed(root):
    step = max(saved_steps(root), default=0)
    while True:
        step += 1
        save(root, step, val_bpb=float(step % 5), keep_last=2)


def test_no_reader_sees_half_of_one_whenever_the_writer_is_killed(tmp_path):
    """A writer is SIGKILLed at random moments and followed by another, while this process reads all the time."""
    rng = random.Random(5)
    fork = multiprocessing.get_context("fork")
    newest, reads = 0, 0
    for _ in range(KILLS):
        writer = fork.Process(target=write_until_killed, args=(tmp_path,), daemon=True)
        writer.start()
        end = time.monotonic() + rng.uniform(0.01, 0.15)
        while time.monotonic() < end:
            found = latest_checkpoint(tmp_path)
            if found is None:
                continue
            try:
                assert holds_its_step(found)
                reads += 1
            except FileNotFoundError as error:
                assert "removed while it was read" in str(error)
            assert found.step >= newest
            newest = found.step
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        after = latest_checkpoint(tmp_path)
        assert after is None or (holds_its_step(after) and after.step >= newest)
        assert all(holds_its_step(open_checkpoint(tmp_path, step)) for step in saved_steps(tmp_path))
    assert newest > 20 and reads > 20
    sweep(tmp_path)
    save(tmp_path, newest + 100, keep_last=2)
    assert len(os.listdir(tmp_path)) <= 3

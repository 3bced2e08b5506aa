"""Laws of the pretraining loop, in one process without Ray."""

from __future__ import annotations

import errno
import shutil

import pytest
import torch

from nanochat_ray.model import checkpoint as checkpoints
from nanochat_ray.model.checkpoint import drop_after, latest_checkpoint, open_checkpoint, saved_steps
from nanochat_ray.run_dir import CHECKPOINTS, Lease, StaleWriterError
from tests.stages.tiny import PRETRAIN, STEPS, Recorder, make_run, run_pretrain


def weights(job, step=STEPS):
    return open_checkpoint(job.stage_folder / CHECKPOINTS, step).model_tensors()


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shards):
    """An undisturbed run."""
    job, rows = make_run(tmp_path_factory.mktemp("whole"), shards)
    hooks = Recorder(job.stage_folder)
    return job, run_pretrain(job, rows, hooks), hooks


def test_it_learns_and_says_what_it_did(whole):
    job, result, hooks = whole
    assert (result["status"], result["step"], len(hooks.losses)) == ("done", STEPS, STEPS)
    assert hooks.losses[-1] < hooks.losses[0] - 0.05
    assert saved_steps(job.stage_folder / CHECKPOINTS) == [STEPS]
    assert result["metrics"]["dtype"] == "float32" and "T=32" in result["metrics"]["val/convention"]


@pytest.mark.parametrize("device_batch_size", [1, 5, 64])
def test_the_device_batch_size_changes_rounding_only(whole, tmp_path, shards, device_batch_size):
    job, rows = make_run(tmp_path, shards, PRETRAIN.model_copy(update={"device_batch_size": device_batch_size}))
    hooks = Recorder(job.stage_folder)
    run_pretrain(job, rows, hooks)
    assert hooks.losses == pytest.approx(whole[2].losses, rel=2e-3)
    assert hooks.losses[0] == pytest.approx(whole[2].losses[0], rel=1e-6)


@pytest.mark.parametrize("at", [1, 5, STEPS - 1])
def test_stopped_and_continued_is_bit_identical(whole, tmp_path, shards, at):
    job, rows = make_run(tmp_path, shards)
    first = Recorder(job.stage_folder, stop_at=at)
    assert run_pretrain(job, rows, first)["status"] == "stopped"
    assert saved_steps(job.stage_folder / CHECKPOINTS) == [at]
    second = Recorder(job.stage_folder)
    assert run_pretrain(job, rows, second)["status"] == "done"
    assert first.losses + second.losses == whole[2].losses
    assert_equal(weights(job), weights(whole[0]))


def test_a_crash_loses_only_what_came_after_the_last_checkpoint(whole, tmp_path, shards):
    job, rows = make_run(tmp_path, shards, PRETRAIN.model_copy(update={"save_every": 4}))
    with pytest.raises(RuntimeError, match="on purpose"):
        run_pretrain(job, rows, Recorder(job.stage_folder, break_at=7))
    again = Recorder(job.stage_folder)
    run_pretrain(job, rows, again)
    assert again.records[0]["step"] == 4
    assert_equal(weights(job), weights(whole[0]))


def test_a_corrupt_checkpoint_is_passed_over_and_named(whole, tmp_path, shards, caplog):
    job, rows = make_run(tmp_path, shards, PRETRAIN.model_copy(update={"save_every": 4}))
    run_pretrain(job, rows, Recorder(job.stage_folder))
    root = job.stage_folder / CHECKPOINTS
    assert saved_steps(root) == [8, STEPS]
    path = root / f"step_{STEPS:06d}" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert latest_checkpoint(root).step == 8
    assert f"step_{STEPS:06d}" in caplog.text
    again = Recorder(job.stage_folder)
    run_pretrain(job, rows, again)
    assert [record["step"] for record in again.records] == [8, 9, 10, 11]
    assert_equal(weights(job), weights(whole[0]))


def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path, shards, monkeypatch):
    job, rows = make_run(tmp_path, shards, PRETRAIN.model_copy(update={"save_every": 4}))
    real, calls = checkpoints.save_file, []

    def save_file(tensors, path):
        calls.append(path)
        if len(calls) > 3:  # the second checkpoint's optimizer state
            path.write_bytes(b"part of a file")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", save_file)
    with pytest.raises(OSError, match=r"step 8 not saved, earlier ones are kept.*No space left"):
        run_pretrain(job, rows, Recorder(job.stage_folder))
    root = job.stage_folder / CHECKPOINTS
    assert [entry.name for entry in root.iterdir()] == ["step_000004"]
    assert latest_checkpoint(root).step == 4


def test_a_stale_writer_saves_nothing(tmp_path, shards):
    job, rows = make_run(tmp_path, shards)
    Lease.acquire(tmp_path).release()  # somebody else has come: the lease is number 2 now
    with pytest.raises(StaleWriterError):
        run_pretrain(job, rows, Recorder(job.stage_folder, epoch=1))
    assert saved_steps(job.stage_folder / CHECKPOINTS) == []


def test_another_architecture_is_refused(whole, tmp_path, shards):
    job, rows = make_run(tmp_path, shards, PRETRAIN.model_copy(update={"depth": 3}))
    shutil.copytree(whole[0].stage_folder, job.stage_folder)
    with pytest.raises(ValueError, match="another architecture"):
        run_pretrain(job, rows, Recorder(job.stage_folder))


def test_another_tokenizer_is_refused(whole):
    checkpoint = latest_checkpoint(whole[0].stage_folder / CHECKPOINTS)
    with pytest.raises(ValueError, match=r"the tokenizer has 299 tokens.*trained with 300"):
        checkpoint.build_model("cpu", torch.float32, vocab_size=299)


def test_resume_from_an_earlier_step_by_number(whole, tmp_path, shards):
    job, rows = make_run(tmp_path, shards, PRETRAIN.model_copy(update={"save_every": 4}))
    run_pretrain(job, rows, Recorder(job.stage_folder))
    drop_after(job.stage_folder / CHECKPOINTS, 8)  # what the job does for --resume-from-step 8
    back = Recorder(job.stage_folder)
    run_pretrain(job, rows, back)
    assert back.records[0]["step"] == 8
    assert_equal(weights(job), weights(whole[0]))

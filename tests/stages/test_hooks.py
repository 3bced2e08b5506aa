"""Laws of the hooks: checkpoints written in the background are those of the moment of saving, and nothing is silent."""

from __future__ import annotations

import errno
import threading
import time

import pytest
import torch

from nanochat_ray.config import RunSettings
from nanochat_ray.messages import World
from nanochat_ray.model import checkpoint as checkpoints
from nanochat_ray.model.checkpoint import best_checkpoint, latest_checkpoint, open_checkpoint, saved_steps
from nanochat_ray.run_dir import CHECKPOINTS, Lease, StaleWriterError, clear_stop, request_stop
from nanochat_ray.stages import hooks as hooks_module
from nanochat_ray.stages.hooks import FolderHooks, TrainingState
from tests.stages.tiny import PRETRAIN, Recorder, make_run, run_pretrain


def state(step: int, val_bpb: float | None = None) -> TrainingState:
    return TrainingState({"w": torch.full((4,), float(step))}, {"w.m": torch.zeros(2)}, {"val_bpb": val_bpb})


@pytest.fixture
def stage(tmp_path):
    folder = tmp_path / "pretrain"
    folder.mkdir()
    Lease.acquire(tmp_path).release()
    return folder


@pytest.fixture
def hooks(stage):
    hooks = FolderHooks(stage, 1, World(), None, background=True)
    yield hooks
    hooks.close()


@pytest.fixture
def gate(monkeypatch):
    """Writing waits until the gate is opened."""
    gate, real = threading.Event(), hooks_module.save_checkpoint

    def save_checkpoint(*args, **kwargs):
        assert gate.wait(20)
        return real(*args, **kwargs)

    monkeypatch.setattr(hooks_module, "save_checkpoint", save_checkpoint)
    yield gate
    gate.set()


def test_save_returns_while_the_checkpoint_is_written(hooks, stage, gate):
    hooks.save(1, state(1))
    hooks.note_bpb(1, 0.5)
    assert not hooks.stop_requested() and saved_steps(stage / CHECKPOINTS) == []
    gate.set()
    hooks.flush()
    assert best_checkpoint(stage / CHECKPOINTS).step == 1  # the note waited for its checkpoint


def test_a_second_save_waits_for_the_first_and_the_wait_counts(hooks, stage, gate):
    hooks.save(1, state(1))
    threading.Timer(0.2, gate.set).start()
    stall_s = hooks.save(2, state(2))
    assert 1 in saved_steps(stage / CHECKPOINTS)
    assert 0 < stall_s <= hooks.checkpoint_stall_s
    hooks.flush()
    assert saved_steps(stage / CHECKPOINTS) == [1, 2]


@pytest.mark.parametrize("at_most_s, beats", [(60.0, True), (0.0, False)])
def test_waiting_for_the_writer_is_a_sign_of_life_but_not_for_ever(stage, gate, monkeypatch, at_most_s, beats):
    monkeypatch.setattr(hooks_module, "BEAT_EVERY_S", 0.02)
    monkeypatch.setattr(hooks_module, "BEAT_AT_MOST_S", at_most_s)
    seen = []
    hooks = FolderHooks(stage, 1, World(), None, background=True, beat=lambda: seen.append(1))
    hooks.save(1, state(1))
    threading.Timer(0.3, gate.set).start()
    hooks.flush()
    hooks.close()
    assert (len(seen) > 3) == beats and saved_steps(stage / CHECKPOINTS) == [1]


def test_in_the_foreground_it_is_stored_on_return(stage):
    hooks = FolderHooks(stage, 1, World(), None)
    for step in range(6):
        hooks.save(step, state(step))
        assert latest_checkpoint(stage / CHECKPOINTS).step == step
    assert len(saved_steps(stage / CHECKPOINTS)) == RunSettings().keep_checkpoints


def test_only_rank_0_writes(stage):
    hooks = FolderHooks(stage, 1, World(rank=1, world_size=2), None, background=True)
    hooks.save(1, TrainingState({}, {}, {}))
    hooks.note_bpb(1, 1.0)
    hooks.flush()
    hooks.close()
    assert saved_steps(stage / CHECKPOINTS) == []


def disk_full(monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints.os, "fsync", fsync)


@pytest.mark.parametrize("call", ["save", "stop_requested", "check", "flush"])
def test_a_full_disk_is_told_at_the_next_call_once(hooks, stage, monkeypatch, call):
    hooks.save(1, state(1))
    hooks.flush()
    disk_full(monkeypatch)
    hooks.save(2, state(2))
    hooks._handed_over[0].exception()  # it has failed by now
    args = (3, state(3)) if call == "save" else ()
    with pytest.raises(OSError, match=r"step 2 not saved, earlier ones are kept.*No space") as error:
        getattr(hooks, call)(*args)
    assert error.value.errno == errno.ENOSPC
    hooks.flush()
    assert saved_steps(stage / CHECKPOINTS) == [1]


def test_a_writer_that_was_followed_saves_nothing(hooks, stage):
    Lease.acquire(stage.parent).release()
    hooks.save(1, state(1))
    with pytest.raises(StaleWriterError, match="lease 1"):
        hooks.flush()
    assert saved_steps(stage / CHECKPOINTS) == []


def test_close_finishes_the_writing_and_only_logs_what_went_wrong(stage, gate, monkeypatch, caplog):
    hooks = FolderHooks(stage, 1, World(), None, background=True)
    hooks.save(1, state(1))
    gate.set()
    hooks.close()
    assert saved_steps(stage / CHECKPOINTS) == [1]
    hooks = FolderHooks(stage, 1, World(), None, background=True)
    disk_full(monkeypatch)
    hooks.save(2, state(2))
    hooks.close()
    assert "step 2 not saved" in caplog.text
    assert not any(thread.name.startswith("checkpoint") for thread in threading.enumerate())


def test_the_stop_request_is_seen_and_taken_back(hooks, stage):
    request_stop(stage)
    assert hooks.stop_requested()
    clear_stop(stage)
    assert not hooks.stop_requested()


def test_a_save_is_due_by_the_clock(hooks, monkeypatch):
    assert not hooks.save_due()
    monkeypatch.setattr(hooks_module, "SAVE_INTERVAL_S", -1.0)
    assert hooks.save_due()


class Background(Recorder):
    """The recorder with a slow writer thread."""

    def __post_init__(self):
        FolderHooks.__init__(self, self.stage_folder, self.epoch, World(), None, keep_last=9, background=True)


def test_what_is_written_is_the_moment_of_saving(tmp_path, shards, monkeypatch):
    """The loop trains on while a slow writer writes: every checkpoint is the one that a loop that waits would write."""
    settings = PRETRAIN.model_copy(update={"save_every": 3})
    job, rows = make_run(tmp_path / "a", shards, settings)
    waiting = Recorder(job.stage_folder)
    waiting.keep_last = 9
    run_pretrain(job, rows, waiting)
    slow_job, rows = make_run(tmp_path / "b", shards, settings)
    hooks, real = Background(slow_job.stage_folder), checkpoints.save_file

    def save_file(tensors, path):
        time.sleep(0.15)  # several steps of this loop
        real(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", save_file)
    run_pretrain(slow_job, rows, hooks)
    hooks.flush()
    hooks.close()
    steps = saved_steps(job.stage_folder / CHECKPOINTS)
    assert steps == saved_steps(slow_job.stage_folder / CHECKPOINTS) == [3, 6, 9, 12]
    for step in steps:
        one, other = (open_checkpoint(j.stage_folder / CHECKPOINTS, step) for j in (job, slow_job))
        assert one.model_hash == other.model_hash
        wanted, found = one.optimizer_tensors(), other.optimizer_tensors()
        assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)

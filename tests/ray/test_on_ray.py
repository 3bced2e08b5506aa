"""The same stages through Ray Data, Ray Train and actors give the numbers of one plain process."""

from __future__ import annotations

import signal
import threading
import time

import numpy as np
import psutil
import pytest
import torch

from nanochat_ray.evals.hf import run_units_here
from nanochat_ray.messages import ClusterError, Cursor
from nanochat_ray.model.checkpoint import open_checkpoint
from nanochat_ray.report.metrics_log import read_metrics
from nanochat_ray.run_dir import CHECKPOINTS, METRICS_FILE, Lease
from nanochat_ray.stages.evaluation import BpbUnit, EvalSpec, SampleUnit, cut
from nanochat_ray.stages.rows import plain_row_blocks
from nanochat_ray.text.packing import step_batches
from tests.chaos.nodes import SlowRows
from tests.stages.tiny import ROWS_PER_STEP, STEPS, Recorder, conversations, make_run, make_sft, run_pretrain, run_sft

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def plain(tmp_path_factory, shards):
    """A run made in this process: pretraining and SFT."""
    root = tmp_path_factory.mktemp("plain")
    job, rows = make_run(root, shards)
    hooks = Recorder(job.stage_folder)
    run_pretrain(job, rows, hooks)
    sft_job, sft_rows = make_sft(root, job, conversations(root / "talk.jsonl"))
    sft_hooks = Recorder(sft_job.stage_folder)
    run_sft(sft_job, sft_rows, sft_hooks)
    return root, (job, rows, hooks), (sft_job, sft_rows, sft_hooks)


def losses_of(job) -> list[float]:
    records = read_metrics(job.stage_folder / METRICS_FILE)
    return [record["train/loss_step"] for record in records if "train/loss_step" in record]


@pytest.mark.parametrize("cursor", [Cursor(), Cursor(0, 0, 5)])
def test_the_dealt_conversations_are_the_plain_ones(plain, cursor):
    import ray

    from nanochat_ray.data.dealer import batches_from, start_dealer

    rows = plain[2][1]
    world, first_step, n_steps = 3, 2, 7
    dealer = start_dealer(rows, ROWS_PER_STEP, world, actors=2)
    ray.get(dealer.open.remote("a", cursor, first_step, world))
    dealt = [batches_from(dealer, "a", first_step, rank) for rank in range(world)]
    wanted = [
        step_batches(plain_row_blocks(rows, cursor), ROWS_PER_STEP, rank, world, first_step) for rank in range(world)
    ]
    for _ in range(n_steps):
        for got, want in zip((next(d, None) for d in dealt), (next(w, None) for w in wanted), strict=True):
            assert (got is None) == (want is None)
            if got is None:
                continue
            np.testing.assert_array_equal(got.tokens, want.tokens)
            assert (got.step, got.cursor, got.progress) == (want.step, want.cursor, want.progress)
            assert (got.mask is None) == (want.mask is None)
            if got.mask is not None:
                np.testing.assert_array_equal(got.mask, want.mask)
    ray.kill(dealer)


def on_workers(plain, root, shards, workers):
    """Pretraining on so many workers: losses near the plain ones, and the weights."""
    from nanochat_ray.train.launch import fit
    from nanochat_ray.train.room import Workers

    job, rows = make_run(root, shards)
    with Lease.acquire(root) as lease:
        result = fit(job, rows, ROWS_PER_STEP, Workers(workers, workers, threads_each=1), lease)
    assert (result["status"], result["step"]) == ("done", STEPS)
    tolerance = 0 if workers == 1 else 2e-3
    assert losses_of(job) == pytest.approx(plain[1][2].losses, rel=tolerance, abs=0)
    assert not (job.stage_folder / "ray").exists()
    return open_checkpoint(job.stage_folder / CHECKPOINTS, STEPS).model_tensors()


def test_one_worker_gives_the_plain_weights(plain, tmp_path, shards):
    got = on_workers(plain, tmp_path, shards, 1)
    wanted = open_checkpoint(plain[1][0].stage_folder / CHECKPOINTS, STEPS).model_tensors()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.fixture(scope="module")
def two_workers(plain, tmp_path_factory, shards):
    """The weights of two undisturbed ranks."""
    return on_workers(plain, tmp_path_factory.mktemp("two"), shards, 2)


def test_two_workers_give_the_plain_losses(two_workers):
    assert two_workers  # and what `on_workers` has compared


@pytest.mark.slow
def test_two_ranks_one_killed_then_one_hung(plain, tmp_path, shards, two_workers):
    """The group starts again from the last checkpoint, twice, and ends with the weights of two undisturbed ranks.

    The stopped rank cannot say where it hangs, but the other one waits for it in a collective, and does.
    """
    from nanochat_ray.train.launch import Patience, fit
    from nanochat_ray.train.room import Workers

    job, rows = make_run(tmp_path, shards, plain[1][0].settings.model_copy(update={"save_every": 2}))
    disturbed = []

    def disturb():
        for signal_number, step in ((signal.SIGKILL, 2), (signal.SIGSTOP, 6)):
            while not (job.stage_folder / CHECKPOINTS / f"step_{step:06d}").exists():
                time.sleep(0.02)
            workers = [process for process in psutil.Process().children(recursive=True)
                       if "RayTrainWorker" in " ".join(process.cmdline())]  # fmt: skip
            workers[-1].send_signal(signal_number)
            disturbed.append(workers[-1])

    slow = SlowRows(**vars(rows))
    threading.Thread(target=disturb, daemon=True).start()
    with Lease.acquire(tmp_path) as lease:
        result = fit(job, slow, ROWS_PER_STEP, Workers(2, 2, threads_each=1), lease, patience=Patience(hang_s=10))
    assert len(disturbed) == 2 and (result["status"], result["metrics"]["launches"]) == ("done", 3)
    stacks = [path.read_text() for path in (job.stage_folder / "stacks").iterdir()]
    assert any("all_reduce" in text or "barrier" in text or "reduce_scatter" in text for text in stacks)
    assert not any(process.is_running() for process in disturbed)
    got = open_checkpoint(job.stage_folder / CHECKPOINTS, STEPS).model_tensors()
    assert all(torch.equal(got[name], two_workers[name]) for name in two_workers)


def test_evaluation_on_actors_gives_the_same_records(plain):
    from nanochat_ray.evals.pool import run_units

    job = plain[1][0]
    spec = EvalSpec(
        job.stage_folder / CHECKPOINTS, STEPS, job.tokenizer_folder, "cpu", "float32", manifest=job.manifest
    )
    units = [BpbUnit("val", 12, start, start + 4) for start in (0, 4, 8)] + [SampleUnit()]
    assert run_units(spec, units, actors=2) == run_units_here(spec, units)
    assert cut(range(5), 2) == [(0, 1), (2, 3), (4,)]


def test_what_can_never_fit_is_an_error_with_numbers_not_a_wait():
    from nanochat_ray.train.room import Workers, wait_for_room

    with pytest.raises(ClusterError, match=r"needs 65 CPU.*64 x 1 CPU.*the cluster has 4 CPU"):
        wait_for_room(Workers(64, 64), "pretrain", 60, can_grow=False, stopped=lambda: False)
    with pytest.raises(ClusterError, match=r"1 GPU.*0 GPU"):
        wait_for_room(Workers(use_gpu=True), "pretrain", 60, can_grow=False, stopped=lambda: False)


@pytest.mark.slow
def test_waiting_for_room_is_said_and_ends(monkeypatch, caplog):
    from nanochat_ray.train import room

    monkeypatch.setattr(room, "SAY_EVERY_S", 1.0)
    monkeypatch.setattr(room, "FULL_SIZE_FIRST_S", 0.5)
    monkeypatch.setattr(room, "TRY_S", 0.5)
    with pytest.raises(ClusterError, match=r"waited 4 s for 9 CPU.*give MIN:MAX"):
        room.wait_for_room(room.Workers(8, 9), "pretrain", 4, can_grow=True, stopped=lambda: False)
    assert "waiting for room: needs 9 CPU" in caplog.text and "of at most 4 s" in caplog.text
    monkeypatch.setattr(room, "TRY_S", 2.0)
    asked = iter([False, True])
    assert room.wait_for_room(room.Workers(8, 8), "pretrain", 60, can_grow=True, stopped=lambda: next(asked)) is None
    assert room.wait_for_room(room.Workers(1, 9), "pretrain", 60, can_grow=True, stopped=lambda: False) == 3
    assert room.room_for_more(room.Workers(1, 3), 2)
    assert not room.room_for_more(room.Workers(1, 3), 3)
    assert not room.room_for_more(room.Workers(1, 4), 3)  # the fourth CPU is for packing

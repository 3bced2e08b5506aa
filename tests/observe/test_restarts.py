"""A launch that fails leaves a note in the run, and what starts again says how often it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nanochat_ray.messages import ClusterError, World
from nanochat_ray.report.status import read_status
from nanochat_ray.report.status_failures import read_failures
from nanochat_ray.report.tracker import Tracker
from nanochat_ray.run_dir import Lease, RunDir
from nanochat_ray.train import launch
from nanochat_ray.train.room import Workers
from tests.stages.rl_tiny import make_rl


@pytest.fixture
def failing(monkeypatch) -> list[Any]:
    """What the next launches end with; nothing of them runs."""
    outcomes: list[Any] = []

    def one(*args: Any) -> Any:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(launch, "launch", one)
    monkeypatch.setattr(launch, "wait_for_room", lambda *args: 1)
    return outcomes


def test_failures_of_launches_are_noted(failing, tmp_path):
    job = make_rl(tmp_path / "run")
    failing += [RuntimeError("first <b>"), RuntimeError("one\nlast line"), {"status": "done", "step": 3, "metrics": {}}]
    with Lease.acquire(tmp_path / "run") as lease:
        assert launch.fit(job, None, 0, Workers(), lease)["metrics"]["launches"] == 3
        epoch = lease.epoch
    found = read_failures(job.stage_folder)
    assert [failure.error for failure in found] == ["RuntimeError: first <b>", "RuntimeError: last line"]
    assert [(failure.step, failure.epoch, failure.final) for failure in found] == [
        (0, epoch - 2, False), (0, epoch - 1, False)
    ]  # fmt: skip
    assert read_status(RunDir(tmp_path / "run")).last_failure == found[-1]


def test_a_job_that_gives_up_raises(failing, tmp_path):
    job = make_rl(tmp_path / "run")
    failing += [RuntimeError("again")] * 2
    with Lease.acquire(tmp_path / "run") as lease, pytest.raises(ClusterError, match="2 times in a row"):
        launch.fit(job, None, 0, Workers(), lease, patience=launch.Patience(max_restarts=1))
    assert len(read_failures(job.stage_folder)) == 1


def test_restarts_are_counted_over_all_jobs(tmp_path, monkeypatch):
    folder = tmp_path / "run" / "pretrain"
    told: list[float] = []
    monkeypatch.setattr(launch.RayGauges, "log", lambda self, step, metrics: told.append(metrics["train/restarts"]))
    for _ in range(3):
        with Tracker(folder) as tracker:
            hooks = launch.RayHooks(folder, 1, World(), tracker, 2, beat=lambda: None)
            hooks.report(0, {"train/loss": 1.0})
            hooks.close()
    assert told == [0, 1, 2]
    assert "train/restarts" not in (Path(folder) / "metrics.jsonl").read_text()

"""Reinforcement learning in object storage: another machine goes on from the log and checkpoint that are there."""

from __future__ import annotations

import pytest
import torch

from nanochat_ray.model.checkpoint import open_checkpoint
from nanochat_ray.remote import Remote
from nanochat_ray.run_dir import CHECKPOINTS, RunDir, lease_epoch
from nanochat_ray.stages.rl import RLJob
from nanochat_ray.stages.rollout_log import ROLLOUTS, RolloutLog
from tests.jobs.rl_run import prepare, trained
from tests.stages.rl_tiny import Recorder, VersionedRollouts, make_rl, run_rl

STEPS, SAVE_EVERY = 5, 2


def weights(job: RLJob) -> dict[str, torch.Tensor]:
    return open_checkpoint(job.stage_folder / CHECKPOINTS, STEPS).model_tensors()


def hooks_of(job: RLJob, break_at: int | None = None) -> Recorder:
    hooks = Recorder(job.stage_folder, break_at=break_at)
    hooks.close()  # its watch of the store
    hooks.lease_epoch = lease_epoch(job.stage_folder.parent)
    return hooks


@pytest.mark.parametrize("break_at", [3, 4])
def test_another_machine_goes_on(machine, uri, tmp_path, break_at):
    calm = make_rl(tmp_path / "calm" / "m")
    run_rl(calm)

    machine("one")
    run = prepare(tmp_path / "one", uri=uri)
    job = make_rl(run.root)
    first = VersionedRollouts(job.rollout_spec("cpu"))
    with pytest.raises(RuntimeError, match="on purpose"):
        run_rl(job, hooks_of(job, break_at=break_at), first)
    stored = Remote.of(run.root).listing(job.stage_folder / ROLLOUTS)
    saved = (break_at - 1) // SAVE_EVERY * SAVE_EVERY
    assert sorted(stored) == [*(f"train_{step:06d}.jsonl" for step in range(saved)), "val_000000.jsonl"]

    machine("two", same_host=False)
    run = RunDir.of(uri, "m").fetch()
    job = make_rl(run.root)
    hooks, second = hooks_of(job), VersionedRollouts(job.rollout_spec("cpu"))
    result = run_rl(job, hooks, second)
    assert result["metrics"]["resumed_at"] == saved and len(hooks.of("train/loss")) == STEPS - saved
    assert trained(run, STEPS) == trained(RunDir(tmp_path / "calm" / "m"), STEPS)
    one, other = weights(job), weights(calm)
    assert all(torch.equal(one[name], other[name]) for name in other)
    again = set(first.done) & set(second.done)  # what came after the last checkpoint, which only the first machine has
    assert all(int(name.split()[2]) >= saved for name in again)

    machine("three")
    there = RunDir.of(uri, "m").fetch()
    log = RolloutLog(there.stage("rl") / ROLLOUTS)
    log.pull()
    assert trained(there, STEPS) == trained(run, STEPS)


def test_a_push_takes_what_is_new(machine, uri, tmp_path, monkeypatch):
    run = prepare(tmp_path / "one", uri=uri)
    job, asked = make_rl(run.root), []
    real = Remote.push_log
    monkeypatch.setattr(Remote, "push_log", lambda remote, path: (asked.append(path.name), real(remote, path)))
    run_rl(job, hooks_of(job))
    logs = [name for name in asked if name.startswith(("train_", "val_"))]
    assert len(logs) == len(set(logs)) == STEPS + 1

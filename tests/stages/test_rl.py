"""Laws of the reinforcement learning loop, in one process without Ray."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from statistics import fmean

import pytest
import torch

from nanochat_ray.messages import World
from nanochat_ray.model.checkpoint import open_checkpoint
from nanochat_ray.run_dir import CHECKPOINTS
from nanochat_ray.stages.rl import plain_rollouts
from nanochat_ray.stages.rl_desk import Plan
from nanochat_ray.stages.rollout_log import ROLLOUTS, RolloutLog
from nanochat_ray.tasks.rl_task import RLTask
from tests.engine.tiny import byte_tokenizer
from tests.stages.rl_tiny import N_PROMPTS, SETTINGS, LowLetters, Recorder, VersionedRollouts, make_rl, run_rl

STEPS = N_PROMPTS * SETTINGS.num_epochs // SETTINGS.examples_per_step


def final_weights(job):
    return open_checkpoint(job.stage_folder / CHECKPOINTS, STEPS).model_tensors()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def trained_prompts(job):
    """How often each prompt stands in the log's steps, by the order of steps."""
    log = RolloutLog(job.stage_folder / ROLLOUTS)
    steps = [log.units("train", step) for step in range(STEPS)]
    return [group.prompt.index for units in steps for number in sorted(units) for group in units[number]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run."""
    job = make_rl(tmp_path_factory.mktemp("whole") / "run")
    hooks = Recorder(job.stage_folder)
    result = run_rl(job, hooks)
    return job, hooks, result


def test_every_prompt_once_per_epoch(whole):
    job, hooks, result = whole
    assert result["status"] == "done" and result["step"] == STEPS == len(hooks.of("train/loss"))
    asked = trained_prompts(job)
    for epoch in range(SETTINGS.num_epochs):
        assert sorted(asked[epoch * N_PROMPTS : (epoch + 1) * N_PROMPTS]) == list(range(N_PROMPTS))
    assert asked[:N_PROMPTS] != asked[N_PROMPTS:]


def test_what_is_reported(whole):
    _, hooks, result = whole
    assert hooks.of("rollout/policy_lag") == [0.0] * STEPS
    assert hooks.of("train/lrm") == pytest.approx([1 - step / STEPS for step in range(STEPS)])
    assert len(hooks.of("eval/pass@1")) == 2
    assert result["metrics"]["before/reward_mean"] != result["metrics"]["after/reward_mean"]
    samples = [json.loads((whole[0].stage_folder / f"samples_{when}.json").read_text()) for when in ("before", "after")]
    assert [s["prompt"] for s in samples[0]] == [s["prompt"] for s in samples[1]] == ["val 0", "val 1", "val 2"]


@pytest.mark.parametrize("how", [{"stop_at": 3}, {"break_at": 1}, {"break_at": 4}])
def test_stopped_or_broken_and_continued_gives_the_same_weights(whole, tmp_path, how):
    job = make_rl(tmp_path / "run")
    first, second = Recorder(job.stage_folder, **how), Recorder(job.stage_folder)
    source = VersionedRollouts(job.rollout_spec("cpu"))
    if "stop_at" in how:
        assert run_rl(job, first, source)["status"] == "stopped"
    else:
        with pytest.raises(RuntimeError, match="on purpose"):
            run_rl(job, first, source)
    again = VersionedRollouts(job.rollout_spec("cpu"))
    result = run_rl(job, second, again)
    assert same(final_weights(job), final_weights(whole[0]))
    assert trained_prompts(job) == trained_prompts(whole[0])
    assert max(Counter(source.done + again.done).values()) == 1, "a rollout that the log has is not sampled again"
    assert result["metrics"]["before/pass@1"] == whole[2]["metrics"]["before/pass@1"]


def test_the_log_replays_a_run(whole, tmp_path):
    job = make_rl(tmp_path / "run", replay=str(whole[0].stage_folder / ROLLOUTS))
    run_rl(job, source=plain_rollouts(job, World()))
    assert same(final_weights(job), final_weights(whole[0]))
    other = make_rl(tmp_path / "other", replay=str(whole[0].stage_folder / ROLLOUTS), num_epochs=3)
    with pytest.raises(ValueError, match="no train step 5 unit"):
        run_rl(other, source=plain_rollouts(other, World()))


def test_half_a_unit_in_the_log_does_not_count(whole, tmp_path):
    folder = tmp_path / "log"
    shutil.copytree(whole[0].stage_folder / ROLLOUTS, folder)
    path = folder / "train_000001.jsonl"
    kept = path.read_bytes()
    log = RolloutLog(folder)
    units = log.units("train", 1)
    assert len(units) == 2
    end_of_first = kept.index(b'{"kind": "unit"')
    end_of_first = kept.index(b"\n", end_of_first) + 1
    for size in (end_of_first, end_of_first + 1, len(kept) - 1):
        path.write_bytes(kept[:size])
        assert log.units("train", 1) == {number: units[number] for number in list(units)[:1]}
    from nanochat_ray.messages import FinishedUnit

    plan = Plan(SETTINGS, LowLetters().open(), byte_tokenizer(), 64)
    second = next(unit for unit in plan.train_units(1, 1) if unit.number not in log.units("train", 1))
    RolloutLog(folder).append(FinishedUnit(second, units[second.number]))
    assert RolloutLog(folder).units("train", 1) == units


@pytest.mark.parametrize("lag", [1, 2])
def test_ahead_of_time(tmp_path, lag):
    job = make_rl(tmp_path / "run", async_steps=lag)
    hooks = Recorder(job.stage_folder, stop_at=3)
    assert run_rl(job, hooks)["status"] == "stopped"
    assert hooks.of("rollout/policy_lag") == [min(step, lag) for step in range(3)]
    again = Recorder(job.stage_folder)
    run_rl(job, again)
    assert all(0 <= value <= lag for value in again.of("rollout/policy_lag"))
    assert sorted(trained_prompts(job)) == sorted(list(range(N_PROMPTS)) * 2)


def test_it_learns(tmp_path):
    job = make_rl(tmp_path / "run", num_iterations=25, examples_per_step=8, num_samples=8, eval_samples=8)
    result = run_rl(job)
    assert result["metrics"]["after/reward_mean"] > result["metrics"]["before/reward_mean"] + 0.15


def test_a_step_does_not_depend_on_the_micro_batch(whole, tmp_path):
    replay = str(whole[0].stage_folder / ROLLOUTS)
    job = make_rl(tmp_path / "run", device_batch_size=64, num_iterations=1, replay=replay)
    hooks = Recorder(job.stage_folder)
    with pytest.raises(ValueError, match="val step 1"):  # the log has no evaluation there
        run_rl(job, hooks, plain_rollouts(job, World()))
    assert hooks.of("train/loss")[0] == pytest.approx(whole[1].of("train/loss")[0], abs=1e-7)
    assert hooks.of("train/grad_norm")[0] == pytest.approx(whole[1].of("train/grad_norm")[0], rel=1e-4)


def test_rollouts_without_a_reward_are_left_out(tmp_path):
    class Failing(LowLetters):
        def open(self):
            task = super().open()

            async def reward(conversation, completion):
                if conversation["id"] == "train-3":
                    return float("nan")
                return await task.reward(conversation, completion)

            return RLTask(task.name, task.prompts, reward)

    job = make_rl(tmp_path / "run", Failing(), num_epochs=1, num_iterations=None)
    hooks = Recorder(job.stage_folder)
    run_rl(job, hooks)
    assert sum(hooks.of("rollout/masked")) == SETTINGS.num_samples
    assert fmean(hooks.of("rollout/reward_mean")) > 0


def test_no_reward_at_all_is_an_error(tmp_path):
    class Broken(LowLetters):
        def open(self):
            async def reward(conversation, completion):
                return float("nan")

            return RLTask("broken", super().open().prompts, reward)

    job = make_rl(tmp_path / "run", Broken())
    with pytest.raises(ValueError, match=r"none of 6 rollouts has a reward.*finite number"):
        run_rl(job)


def test_a_step_whose_prompts_are_all_set_aside_changes_no_reward(whole, tmp_path):
    """Such prompts stay set aside, so a run that could not get over them would never end."""

    class Poisoned(VersionedRollouts):
        def _do(self, unit):
            done = super()._do(unit)
            if unit.split == "val" or unit.step != 1:
                return done
            groups = tuple(replace(group, rollouts=(), set_aside="it kills") for group in done.groups)
            return replace(done, groups=groups)

    job = make_rl(tmp_path / "run")
    hooks = Recorder(job.stage_folder)
    result = run_rl(job, hooks, Poisoned(job.rollout_spec("cpu")))
    assert result["status"] == "done" and hooks.of("rollout/set_aside")[1] == SETTINGS.examples_per_step
    named = next(record["rollout/left_out"] for record in hooks.records if "rollout/left_out" in record)
    assert set(named.values()) == {"it kills"}

"""Reinforcement learning as a command: what a person may get wrong, stopping, going on, and the same on Ray."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import _runtime
import pytest
import rl
import torch

from nanochat_ray.model.checkpoint import open_checkpoint
from nanochat_ray.run_dir import DONE_FILE, Lease, RunDir
from nanochat_ray.stages.rollout_log import ROLLOUTS
from tests.jobs.rl_run import prepare, reported, trained

N_PROMPTS, STEPS = 8, 4
FLAGS = {
    "--model-tag": "m", "--dtype": "float32", "--num-epochs": 2, "--examples-per-step": 4, "--num-samples": 4,
    "--prompts-per-unit": 2, "--max-new-tokens": 6, "--eval-every": -1, "--eval-examples": 2, "--eval-samples": 2,
    "--save-every": 3, "--matrix-lr": 0.05, "--init-lr-frac": 1,
}  # fmt: skip
NO_RAY = "--no-ray"


def flags(storage: Path, *more: str, **changes: object) -> list[str]:
    """The job's command line; `changes` are flags with other values, None to leave one out."""
    found = {"--storage": storage, "--task": storage / "task.py"} | FLAGS
    found |= {"--" + name.replace("_", "-"): value for name, value in changes.items()}
    return [str(part) for pair in found.items() if pair[1] is not None for part in pair] + list(more)


def inside(argv: list[str]) -> tuple[int, str]:
    """Run the job in this process, which is faster than a command: exit code and all that it said."""
    said, code = io.StringIO(), 0
    handler, root, ours = logging.StreamHandler(said), logging.getLogger(), logging.getLogger("nanochat_ray")
    level = ours.level
    root.addHandler(handler)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", ["rl.py", *argv])
        try:
            _runtime.main(rl.cli)
        except SystemExit as end:
            assert isinstance(end.code, int)
            code = end.code
        finally:
            root.removeHandler(handler)
            ours.setLevel(level)
    return code, said.getvalue()


def weights(folder: RunDir, step: int = STEPS) -> dict[str, torch.Tensor]:
    return open_checkpoint(folder.checkpoints("rl"), step).model_tensors()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, RunDir, str]:
    """A run without Ray, begun in another folder."""
    storage, elsewhere = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("elsewhere")
    folder = prepare(storage, N_PROMPTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(elsewhere)
        code, out = inside(flags(storage, NO_RAY))
    assert code == 0, out
    assert not list(elsewhere.iterdir())
    return storage, folder, out


def test_a_whole_run(whole):
    _, folder, out = whole
    result = json.loads((folder.stage("rl") / "result.json").read_text())
    assert result["metrics"]["num_iterations"] == STEPS == len(reported(folder, "train/loss"))
    assert (folder.stage("rl") / DONE_FILE).exists() and "rl: done in" in out and "Traceback" not in out
    asked = [group.prompt.index for step in trained(folder, STEPS) for group in step]
    assert Counter(asked) == dict.fromkeys(range(N_PROMPTS), 2)


def test_again_is_skipped_and_other_settings_are_refused(whole):
    storage, folder, _ = whole
    before = weights(folder)
    code, out = inside(flags(storage, NO_RAY, rollout_workers=1, save_every=2))
    assert code == 0 and "rl: done before, skipped" in out, out
    code, out = inside(flags(storage, NO_RAY, num_samples=8))
    assert code == 1 and "settings.num_samples: 4 -> 8" in out and "Traceback" not in out, out
    assert same(weights(folder), before)


BAD_TASKS = {
    "syntax": ("prompts = [", "syntax.py, line 1"),
    "raises": ("x = 1\ny = x / 0", "raises.py, line 2: ZeroDivisionError"),
    "no_reward": ("prompts = ['a', 'b']", "there is no reward"),
    "one_prompt": ("prompts = ['a']\ndef reward(c, t): return 1", "one_prompt.py, line 1: 1 prompts cannot be parted"),
    "twice": ("prompts = [{'prompt': 'a', 'id': 'x'}] * 4\ndef reward(c, t): return 1", "ids name prompts"),
}


@pytest.mark.parametrize("name", BAD_TASKS)
def test_a_task_file_that_cannot_be_used_is_named_with_its_line(tmp_path, name):
    text, words = BAD_TASKS[name]
    prepare(tmp_path)
    (tmp_path / f"{name}.py").write_text(text)
    code, out = inside(flags(tmp_path, NO_RAY, task=tmp_path / f"{name}.py"))
    assert code == 1 and words in out and "Traceback" not in out, out
    assert not (tmp_path / "m" / "rl" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "nowhere.py"}, "--task nowhere.py: there is no such file"),
        ({"task": None, "prompts": "nowhere.jsonl"}, "--prompts nowhere.jsonl: there is no such file"),
        ({"prompts": "some.jsonl"}, "brings its own prompts"),
        ({"task": None, "eval_prompts": "some.jsonl"}, "goes with --prompts"),
        ({"num_samples": 1}, "--num-samples 1: must be >= 2"),
        ({"temperature": 0}, "--temperature 0: must be > 0"),
        ({"async_steps": 1, "rollout_workers": 0}, "async_steps 1 with rollout_workers 0"),
        ({"replay": "nowhere"}, "no rollout log at nowhere"),
        ({"workers": 2}, "--workers above 1 needs Ray"),
        ({"async_steps": 1}, "async_steps 1"),
    ],
)
def test_what_a_person_may_get_wrong(tmp_path, changes, words):
    prepare(tmp_path)
    code, out = inside(flags(tmp_path, NO_RAY, **changes))
    assert code in (1, 2) and words in out and "Traceback" not in out, out
    assert not (tmp_path / "m" / "rl" / ROLLOUTS).exists()


def test_without_a_finetuned_model(tmp_path):
    folder = prepare(tmp_path)
    (folder.stage("sft") / DONE_FILE).unlink()
    code, out = inside(flags(tmp_path, NO_RAY))
    assert code == 1 and "sft.py" in out and "Traceback" not in out, out


def test_a_second_driver_is_refused_by_name(tmp_path):
    folder = prepare(tmp_path)
    with Lease.acquire(folder.root):
        code, out = inside(flags(tmp_path, NO_RAY))
    assert code == 1 and "is being written by process" in out and "Traceback" not in out, out


def test_numbers_beyond_what_there_is(tmp_path):
    """More steps than an epoch has, more prompts to evaluate on than there are, longer texts than the context."""
    folder = prepare(tmp_path, N_PROMPTS)
    (tmp_path / "long.py").write_text((tmp_path / "task.py").read_text().replace("{split}", "{split}" + "x" * 300))
    changes = {"task": tmp_path / "long.py", "num_iterations": 5, "eval_examples": 999, "max_new_tokens": 500}
    code, out = inside(flags(tmp_path, NO_RAY, **changes))
    assert code == 0, out
    steps = trained(folder, 5)
    asked = [group.prompt.index for step in steps for group in step]
    for epoch in range(2):
        assert sorted(asked[epoch * N_PROMPTS :][:N_PROMPTS]) == list(range(N_PROMPTS))
    assert len({group.prompt.seed for step in steps for group in step}) == len(asked)
    lengths = {len(g.prompt.token_ids) + len(r.token_ids) for step in steps for g in step for r in g.rollouts}
    assert max(lengths) <= 64 + 1  # the tiny model's context, and the last token, which is not fed back
    assert {len(group.prompt.token_ids) for step in steps for group in step} == {32}


REASON = "on purpose, always"
ALWAYS_RAISES = f"""
import os

prompts = [str(k) for k in range(30)]

async def reward(conversation, completion):
    if "SERVICE" not in os.environ:
        raise RuntimeError({REASON!r})
    return len(set(completion))
"""


def test_a_reward_that_always_raises_ends_the_run_with_its_reason(tmp_path, monkeypatch):
    """And when what it needs is there again, the same command goes on: failures in the log are no answers."""
    folder = prepare(tmp_path)
    (tmp_path / "task.py").write_text(ALWAYS_RAISES)
    code, out = inside(flags(tmp_path, NO_RAY))
    assert code == 1 and REASON in out and "rollouts has a reward; what is said of the first" in out, out
    assert "Traceback" not in out
    monkeypatch.setenv("SERVICE", "up")
    code, out = inside(flags(tmp_path, NO_RAY))
    assert code == 0 and "rl: goes on" in out, out
    assert all(rollout.reward is not None for step in trained(folder, STEPS) for g in step for rollout in g.rollouts)


def test_ctrl_c_saves_and_the_same_command_goes_on(whole, tmp_path, monkeypatch):
    folder = prepare(tmp_path, N_PROMPTS)

    def press_after_a_step() -> None:
        while not reported(folder, "train/loss"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setenv("REWARD_S", "0.2")
    person = threading.Thread(target=press_after_a_step)
    person.start()
    code, out = inside(flags(tmp_path, NO_RAY))
    person.join()
    assert code == 130 and "SIGINT: saving" in out and "the same command goes on" in out, out
    stopped_at = len(reported(folder, "train/loss"))
    assert 0 < stopped_at < STEPS and f"stopped at step {stopped_at}" in out
    code, out = inside(flags(tmp_path, NO_RAY))
    assert code == 0 and f"resuming from step {stopped_at}" in out, out
    assert len(reported(folder, "train/loss")) == STEPS
    assert trained(folder, STEPS) == trained(whole[1], STEPS) and same(weights(folder), weights(whole[1]))


def test_the_log_replays_the_run_and_no_other(whole, tmp_path):
    _, original, _ = whole
    replay = str(original.stage("rl") / ROLLOUTS)
    folder = prepare(tmp_path, N_PROMPTS)
    code, out = inside(flags(tmp_path, NO_RAY, replay=replay))
    assert code == 0, out
    assert same(weights(folder), weights(original)) and trained(folder, STEPS) == trained(original, STEPS)
    (tmp_path / "m").rename(tmp_path / "before")
    prepare(tmp_path, N_PROMPTS + 1)
    code, out = inside(flags(tmp_path, NO_RAY, replay=replay))
    assert code == 1 and "other prompts" in out and "Traceback" not in out, out


def test_a_log_that_cannot_be_written(tmp_path):
    folder = prepare(tmp_path)
    folder.stage("rl").mkdir()
    (folder.stage("rl") / ROLLOUTS).write_text("in the way")
    code, out = inside(flags(tmp_path, NO_RAY))
    assert code == 1 and ROLLOUTS in out and "Traceback" not in out, out


@pytest.fixture
def on_ray(ray_cluster, monkeypatch):
    """The session's cluster instead of one of the job's own, and one thread per process."""
    monkeypatch.setattr(_runtime, "ray_cluster", lambda workers, beside: contextlib.nullcontext())
    monkeypatch.setattr(_runtime, "available_cpus", lambda: 1)


@pytest.mark.slow
@pytest.mark.usefixtures("on_ray")
def test_ahead_of_time_on_ray(tmp_path):
    folder = prepare(tmp_path, N_PROMPTS)
    code, out = inside(flags(tmp_path, rollout_workers=2, async_steps=1))
    assert code == 0 and "Traceback" not in out, out
    assert reported(folder, "rollout/policy_lag") == [0.0, 1.0, 1.0, 1.0]
    asked = [group.prompt.index for step in trained(folder, STEPS) for group in step]
    assert Counter(asked) == dict.fromkeys(range(N_PROMPTS), 2)


@pytest.mark.slow
@pytest.mark.usefixtures("on_ray")
def test_on_ray_the_weights_are_those_of_one_process(whole, tmp_path):
    folder = prepare(tmp_path, N_PROMPTS)
    code, out = inside(flags(tmp_path, rollout_workers=2))
    assert code == 0 and "Traceback" not in out, out
    assert trained(folder, STEPS) == trained(whole[1], STEPS) and same(weights(folder), weights(whole[1]))


@pytest.mark.slow
@pytest.mark.usefixtures("on_ray")
def test_on_ray_a_reward_that_always_raises_ends_the_run_too(tmp_path):
    prepare(tmp_path)
    (tmp_path / "task.py").write_text(ALWAYS_RAISES)
    code, out = inside(flags(tmp_path, rollout_workers=1))
    assert code == 1 and REASON in out and "Traceback" not in out and "goes on from step" not in out, out

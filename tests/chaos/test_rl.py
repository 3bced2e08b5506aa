"""Rollout actors die every few seconds, the trainer once and the driver once; the model is the one of a quiet run."""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from _runtime import available_cpus

from nanochat_ray.run_dir import RunDir
from nanochat_ray.stages.rollout_log import ROLLOUTS
from tests.jobs.rl_run import prepare, reported, trained
from tests.jobs.running import end, run, start

pytestmark = pytest.mark.slow

N_PROMPTS, EPOCHS, PER_STEP = 22, 2, 4
STEPS = N_PROMPTS * EPOCHS // PER_STEP
KILL_EVERY_S = 3.0
FLAGS = (
    "--model-tag", "m", "--dtype", "float32", "--num-epochs", EPOCHS, "--examples-per-step", PER_STEP,
    "--num-samples", 4, "--prompts-per-unit", 1, "--max-new-tokens", 6, "--eval-every", -1, "--eval-examples", 2,
    "--eval-samples", 2,
    "--save-every", 3, "--matrix-lr", 0.05, "--init-lr-frac", 1, "--hang-s", 60,
)  # fmt: skip


def command(storage: Path) -> list[str]:
    return ["rl.py", "--task", str(storage / "task.py"), *map(str, FLAGS)]


def weights(folder: RunDir) -> str:
    path = folder.checkpoints("rl") / f"step_{STEPS:06d}" / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def victims(driver: int, name: str) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(driver).children(recursive=True):
        try:
            if name in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> RunDir:
    """An undisturbed run, in one process with as many threads as the one worker has."""
    storage = tmp_path_factory.mktemp("calm")
    folder = prepare(storage, N_PROMPTS)
    code, out = run(storage, *command(storage), "--no-ray", OMP_NUM_THREADS=str(available_cpus()))
    assert code == 0, out
    return folder


def test_kill_rollout_actors_trainer_and_driver(calm, tmp_path):
    folder = prepare(tmp_path, N_PROMPTS)
    log = open(tmp_path / "out.log", "a")

    def begin() -> subprocess.Popen:
        return start(tmp_path, *command(tmp_path), "--rollout-workers", "2", stdout=log, REWARD_S="0.5")

    def said() -> str:
        return Path(log.name).read_text()[-3000:]

    process = begin()
    kills: Counter[str] = Counter()
    due = {"RayTrainWorker": 3, "driver": 7}  # after so many steps
    deadline, killed_at, done_then = time.monotonic() + 400, time.monotonic(), 0
    while (code := process.poll()) is None:
        assert time.monotonic() < deadline, f"{kills}: {said()}"
        time.sleep(0.1)
        done = len(reported(folder, "train/loss"))
        if due and done >= min(due.values()):
            name = min(due, key=lambda name: due[name])
            del due[name]
            kills[name] += 1
            if name == "driver":
                orphans = psutil.Process(process.pid).children(recursive=True)
                process.kill()
                process.wait()
                process = begin()
                end(orphans)
            else:
                end(victims(process.pid, name)[:1])
        elif time.monotonic() - killed_at > KILL_EVERY_S and done > done_then:
            if not (actors := victims(process.pid, "ray::RolloutActor")):
                continue
            end(actors[:1])
            kills["RolloutActor"] += 1
            killed_at, done_then = time.monotonic(), done  # a busy machine takes longer to start one than to kill it
    assert code == 0, said()
    assert not due and kills["RolloutActor"] >= 3, kills
    assert trained(folder, STEPS) == trained(calm, STEPS)
    asked = Counter(group.prompt.id for step in trained(folder, STEPS) for group in step)
    assert len(asked) == N_PROMPTS and set(asked.values()) == {EPOCHS}
    assert weights(folder) == weights(calm)
    result = json.loads((folder.stage("rl") / "result.json").read_text())
    assert result["metrics"]["after/reward_mean"] > 0


def test_the_log_replays_a_run_from_the_command_line(calm, tmp_path):
    folder = prepare(tmp_path, N_PROMPTS)
    replay = "--replay", str(calm.stage("rl") / ROLLOUTS)
    code, out = run(tmp_path, *command(tmp_path), "--no-ray", *replay, OMP_NUM_THREADS=str(available_cpus()))
    assert code == 0, out
    assert weights(folder) == weights(calm)

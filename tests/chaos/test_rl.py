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

from nanochat_ray.config import PretrainSettings
from nanochat_ray.messages import RolloutGroup
from nanochat_ray.run_dir import CONFIG_FILE, RunDir, write_json
from nanochat_ray.stages.rollout_log import ROLLOUTS, RolloutLog
from tests.jobs.running import end, run, start
from tests.stages.rl_tiny import make_rl

pytestmark = pytest.mark.slow

N_PROMPTS, EPOCHS, PER_STEP = 50, 2, 4
STEPS = N_PROMPTS * EPOCHS // PER_STEP
KILL_EVERY_S = 3.0
TASK = f"""
import asyncio
import os

def prompts(split):
    return [{{"prompt": f"{{split}} {{k}}", "answer": "a"}} for k in range({N_PROMPTS})]

async def reward(conversation, completion):
    await asyncio.sleep(float(os.environ.get("REWARD_S", 0)))
    return sum(letter < "P" for letter in completion) / max(1, len(completion))
"""
FLAGS = (
    "--model-tag", "m", "--dtype", "float32", "--num-epochs", EPOCHS, "--examples-per-step", PER_STEP,
    "--num-samples", 4, "--prompts-per-unit", 1, "--max-new-tokens", 6, "--eval-every", -1, "--eval-examples", 2,
    "--eval-samples", 2,
    "--save-every", 3, "--matrix-lr", 0.05, "--init-lr-frac", 1, "--hang-s", 60,
)  # fmt: skip


def command(storage: Path) -> list[str]:
    return ["rl.py", "--task", str(storage / "task.py"), *map(str, FLAGS)]


def prepare(storage: Path) -> RunDir:
    storage.mkdir(exist_ok=True)
    (storage / "task.py").write_text(TASK)
    folder = RunDir(storage / "m")
    make_rl(folder.root)
    for stage in ("tokenizer", "sft"):
        folder.finish_stage(stage)
    write_json(folder.stage("pretrain") / CONFIG_FILE, {"settings": PretrainSettings().model_dump(mode="json")})
    return folder


def weights(folder: RunDir) -> str:
    path = folder.checkpoints("rl") / f"step_{STEPS:06d}" / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def trained(folder: RunDir) -> list[list[RolloutGroup]]:
    """The groups of each step."""
    log = RolloutLog(folder.stage("rl") / ROLLOUTS)
    steps = [log.units("train", step) for step in range(STEPS)]
    return [[group for number in sorted(units) for group in units[number]] for units in steps]


def steps_done(folder: RunDir) -> int:
    path = folder.stage("rl") / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return sum('"train/loss"' in line for line in lines)


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
    folder = prepare(storage)
    code, out = run(storage, *command(storage), "--no-ray", OMP_NUM_THREADS=str(available_cpus()))
    assert code == 0, out
    return folder


def test_kill_rollout_actors_trainer_and_driver(calm, tmp_path):
    folder = prepare(tmp_path)
    log = open(tmp_path / "out.log", "a")

    def begin() -> subprocess.Popen:
        return start(tmp_path, *command(tmp_path), "--rollout-workers", "2", stdout=log, REWARD_S="0.5")

    def said() -> str:
        return Path(log.name).read_text()[-3000:]

    process = begin()
    kills: Counter[str] = Counter()
    due = {"RayTrainWorker": 5, "driver": 12}  # after so many steps
    deadline, killed_at = time.monotonic() + 400, time.monotonic()
    while (code := process.poll()) is None:
        assert time.monotonic() < deadline, f"{kills}, {steps_done(folder)} steps: {said()}"
        time.sleep(0.1)
        if due and steps_done(folder) >= min(due.values()):
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
        elif time.monotonic() - killed_at > KILL_EVERY_S and (actors := victims(process.pid, "ray::RolloutActor")):
            end(actors[:1])
            kills["RolloutActor"] += 1
            killed_at = time.monotonic()
    assert code == 0, said()
    assert not due and kills["RolloutActor"] >= 3, kills
    assert trained(folder) == trained(calm)
    asked = Counter(group.prompt.id for step in trained(folder) for group in step)
    assert len(asked) == N_PROMPTS and set(asked.values()) == {EPOCHS}
    assert weights(folder) == weights(calm)
    result = json.loads((folder.stage("rl") / "result.json").read_text())
    assert result["metrics"]["after/reward_mean"] > 0


def test_the_log_replays_a_run_from_the_command_line(calm, tmp_path):
    folder = prepare(tmp_path)
    replay = "--replay", str(calm.stage("rl") / ROLLOUTS)
    code, out = run(tmp_path, *command(tmp_path), "--no-ray", *replay, OMP_NUM_THREADS=str(available_cpus()))
    assert code == 0, out
    assert weights(folder) == weights(calm)

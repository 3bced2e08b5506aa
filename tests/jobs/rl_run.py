"""A run's folder in which `jobs/rl.py` can begin: bytes and a random network in place of the stages before."""

from __future__ import annotations

from pathlib import Path

from nanochat_ray.config import PretrainSettings
from nanochat_ray.messages import RolloutGroup
from nanochat_ray.report.metrics_log import read_metrics
from nanochat_ray.run_dir import CONFIG_FILE, METRICS_FILE, RunDir, write_json
from nanochat_ray.stages.rollout_log import ROLLOUTS, RolloutLog
from tests.stages.rl_tiny import make_rl


def task_text(n_prompts: int) -> str:
    """A task's file: the share of small letters is rewarded, after REWARD_S seconds."""
    return f"""
import asyncio
import os

def prompts(split):
    return [{{"prompt": f"{{split}} {{k}}", "answer": "a"}} for k in range({n_prompts})]

async def reward(conversation, completion):
    await asyncio.sleep(float(os.environ.get("REWARD_S", 0)))
    return sum(letter < "P" for letter in completion) / max(1, len(completion))
"""


def prepare(storage: Path, n_prompts: int = 8, uri: str | None = None) -> RunDir:
    """The folder of the run `m` below `storage`, or below `uri`, and `task.py` beside it."""
    storage.mkdir(exist_ok=True)
    (storage / "task.py").write_text(task_text(n_prompts))
    folder = RunDir.of(uri or str(storage), "m")
    make_rl(folder.root)
    for stage in ("tokenizer", "sft"):
        folder.finish_stage(stage)
    write_json(folder.stage("pretrain") / CONFIG_FILE, {"settings": PretrainSettings().model_dump(mode="json")})
    return folder


def trained(folder: RunDir, n_steps: int) -> list[list[RolloutGroup]]:
    """The groups of each step, as the log has them."""
    log = RolloutLog(folder.stage("rl") / ROLLOUTS)
    steps = [log.units("train", step) for step in range(n_steps)]
    return [[group for number in sorted(units) for group in units[number]] for units in steps]


def reported(folder: RunDir, name: str) -> list[float]:
    """What the stage's metrics say of one name, in order."""
    path = folder.stage("rl") / METRICS_FILE
    return [record[name] for record in read_metrics(path) if name in record] if path.exists() else []

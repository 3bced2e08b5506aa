"""What reinforcement learning trains on: prompts, a reward for each completion, and the tools a completion may use."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nanochat_ray.corpus.world.questions import training_problems
from nanochat_ray.engine.calculator import calculate
from nanochat_ray.engine.tool_use import Tool
from nanochat_ray.messages import RolloutSplit
from nanochat_ray.tasks.gsm8k import GSM8K
from nanochat_ray.tasks.rows import TaskSources
from nanochat_ray.tasks.task import Conversation

WORLD_PROMPTS = {"train": 4096, "val": 256}
WORLD_SEEDS = {"train": 1, "val": 2}


@dataclass(frozen=True)
class RLTask:
    """Prompts are conversations whose last message is a reference answer, as in `Task`."""

    name: str
    prompts: Callable[[RolloutSplit], Sequence[Conversation]]
    reward: Callable[[Conversation, str], Awaitable[float]]
    tools: tuple[Tool, ...] = (calculate,)


@dataclass(frozen=True)
class RLTaskSpec:
    """How to open a task, on any machine."""

    kind: Literal["world", "gsm8k", "file"]
    path: Path | None = None  # of the prompts, or of the task's file
    val_path: Path | None = None
    source_text: str | None = None  # of the task's file, which other machines do not have
    sources: TaskSources = field(default_factory=TaskSources)

    def open(self) -> RLTask:
        if self.kind == "world":
            return _world()
        return _gsm8k(self.sources)


def _world() -> RLTask:
    from nanochat_ray.corpus.world.questions import is_right

    def prompts(split: RolloutSplit) -> list[dict[str, Any]]:
        asked = training_problems(WORLD_PROMPTS[split], WORLD_SEEDS[split])
        return [{"id": q.id, "messages": q.messages, "family": q.family} for q in asked]

    async def reward(conversation: Conversation, completion: str) -> float:
        return float(is_right(conversation["messages"], completion))

    return RLTask("world", prompts, reward)


def _gsm8k(sources: TaskSources) -> RLTask:
    train = GSM8K("train", sources)

    async def reward(conversation: Conversation, completion: str) -> float:
        return train.reward(conversation, completion)

    return RLTask("GSM8K", lambda split: train if split == "train" else GSM8K("test", sources), reward)  # type: ignore

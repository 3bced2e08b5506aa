"""A process that scores rollouts. It needs no torch, so it starts fast and stays small."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from nanochat_ray.messages import PassedOn, Rollout, RolloutGroup, RolloutUnit, ScoredRollout
from nanochat_ray.tasks.rewards import score_unit, tool_calls, with_terminal
from nanochat_ray.tasks.rl_task import RLTaskSpec
from nanochat_ray.text.tokenizer import Tokenizer


class ScorerActor:
    """The task's rewards, for one unit at a time."""

    def __init__(self, task: RLTaskSpec, tokenizer_folder: Path, passed_on: PassedOn) -> None:
        passed_on.take()
        self._task_spec, self._tokenizer_folder = task, tokenizer_folder

    def hello(self) -> int:
        """The process' id: it has a place."""
        return os.getpid()

    def load(self) -> None:
        """Open the task; not in the constructor, so that what this raises reaches the caller as it is."""
        self.task, self.tokenizer = self._task_spec.open(), Tokenizer.load(self._tokenizer_folder)

    def score(self, unit: RolloutUnit, rollouts: Sequence[Sequence[Rollout]]) -> tuple[tuple[RolloutGroup, ...], float]:
        """The unit's groups, and the seconds it took."""
        begun_s = time.perf_counter()
        groups = score_unit(self.task, self.task.prompts(unit.split), self.tokenizer, unit, rollouts)
        return groups, time.perf_counter() - begun_s


def unscored(
    tokenizer: Tokenizer, unit: RolloutUnit, rollouts: Sequence[Sequence[Rollout]], failure: str
) -> tuple[RolloutGroup, ...]:  # fmt: skip
    """The groups of a unit that could not be scored: every reward is missing, for the reason given."""

    def without_reward(sample: int, rollout: Rollout) -> ScoredRollout:
        text, calls = tokenizer.decode(rollout.token_ids), tool_calls(tokenizer, rollout)
        return ScoredRollout(sample, *with_terminal(rollout), rollout.finish_reason, text, calls, None, failure)

    return tuple(
        RolloutGroup(prompt, unit.version, tuple(without_reward(*one) for one in enumerate(found)))
        for prompt, found in zip(unit.prompts, rollouts, strict=True)
    )

"""From a step's number to its scored groups: which prompts, in which units, from the log or from who samples."""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import random
import time
from collections.abc import Callable, Sequence
from functools import lru_cache

from nanochat_ray.config import RLSettings
from nanochat_ray.messages import (
    FinishedUnit,
    RolloutGroup,
    RolloutPrompt,
    RolloutSplit,
    RolloutUnit,
    SamplingParams,
    World,
)
from nanochat_ray.stages.evaluation import gather
from nanochat_ray.stages.ranks import sum_over_ranks
from nanochat_ray.stages.rollout_log import RolloutLog
from nanochat_ray.stages.rollouts import RolloutSource
from nanochat_ray.tasks.rl_task import RLTask
from nanochat_ray.tasks.task import Conversation
from nanochat_ray.text.conversation import render_prompt
from nanochat_ray.text.tokenizer import Tokenizer

LONGEST_TEXTS = 64  # prompts that are looked at to know the longest


def steps_of(settings: RLSettings, n_prompts: int) -> int:
    """Optimizer steps of a run on so many training prompts."""
    return settings.num_iterations or -(-n_prompts * settings.num_epochs // settings.examples_per_step)


class Plan:
    """Which prompts a step has, and which seeds: a function of settings and task alone.

    Each epoch is the prompts in another order, and the steps cut the epochs, laid end to end, into equal parts. So
    every prompt is in each epoch once, also when their number is no multiple of a step's.
    """

    def __init__(self, settings: RLSettings, task: RLTask, tokenizer: Tokenizer, context: int) -> None:
        self.settings, self.task, self.tokenizer = settings, task, tokenizer
        self.context = context
        self.room = context - min(settings.max_new_tokens, context // 2)  # tokens of a prompt
        self.conversations: dict[RolloutSplit, Sequence[Conversation]] = {
            "train": task.prompts("train"), "val": task.prompts("val")
        }  # fmt: skip
        self.n_train = len(self.conversations["train"])
        if not self.n_train:
            raise ValueError(f"task {task.name} has no prompts to train on")

    @property
    def n_steps(self) -> int:
        return steps_of(self.settings, self.n_train)

    def longest(self) -> int:
        """Positions that the longest prompt fills with its completion, as far as the longest texts tell."""
        asked = (one["messages"][:-1] for split in self.conversations.values() for one in split)
        longest = heapq.nlargest(LONGEST_TEXTS, asked, key=lambda messages: sum(len(m["content"]) for m in messages))
        prompts = [render_prompt(self.tokenizer, messages, self.room).ids for messages in longest]
        return min(self.context, max(map(len, prompts)) + self.settings.max_new_tokens)

    def train_units(self, step: int, version: int) -> list[RolloutUnit]:
        """The units of an optimizer step. The last step of all may have fewer prompts."""
        s = self.settings
        start, stop = step * s.examples_per_step, (step + 1) * s.examples_per_step
        if s.num_iterations is None:
            stop = min(stop, self.n_train * s.num_epochs)
        places = [divmod(position, self.n_train) for position in range(start, stop)]
        prompts = [self._prompt("train", epoch, _order(s.seed, epoch, self.n_train)[k]) for epoch, k in places]
        params = SamplingParams(
            s.temperature, top_k=s.top_k, max_tokens=s.max_new_tokens, num_samples=s.num_samples, logprobs=0
        )
        return self._units("train", step, version, prompts, params)

    def eval_units(self, step: int, version: int) -> tuple[list[RolloutUnit], list[RolloutUnit]]:
        """The units of the evaluation before a step: those sampled at temperature 1, and the greedy ones.

        Prompts and seeds are the same at every step.
        """
        s = self.settings
        prompts = [self._prompt("val", 0, k) for k in range(min(s.eval_examples, len(self.conversations["val"])))]
        params = SamplingParams(1.0, max_tokens=s.max_new_tokens, num_samples=s.eval_samples, logprobs=0)
        greedy = dataclasses.replace(params, temperature=0.0, num_samples=1)
        sampled = self._units("val", step, version, prompts, params)
        per_unit = s.prompts_per_unit * s.eval_samples  # as many rows as in the others
        return sampled, self._units("val", step, version, prompts, greedy, len(sampled), per_unit)

    def _units(
        self, split: RolloutSplit, step: int, version: int, prompts: list[RolloutPrompt], params: SamplingParams,
        first: int = 0, per_unit: int | None = None,
    ) -> list[RolloutUnit]:  # fmt: skip
        n = per_unit or self.settings.prompts_per_unit
        parts = [tuple(prompts[start : start + n]) for start in range(0, len(prompts), n)]
        return [RolloutUnit(split, step, first + k, version, part, params) for k, part in enumerate(parts)]

    def _prompt(self, split: RolloutSplit, epoch: int, index: int) -> RolloutPrompt:
        conversation = self.conversations[split][index]
        ids = render_prompt(self.tokenizer, conversation["messages"][:-1], self.room).ids
        seed = _seed(f"{self.settings.seed} {split} {epoch} {index}")
        return RolloutPrompt(conversation.get("id", f"{self.task.name}/{split}/{index}"), index, tuple(ids), seed)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, n: int) -> list[int]:
    order = list(range(n))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


class Desk:
    """Orders units, ahead of time if the settings say so, and hands over their groups.

    What the log has is not sampled again, provided it is of these prompts, of weights that are fresh enough, and has a
    reward anywhere: where nothing could be scored, what was missing may be there now. Prompts that were set aside stay
    so. All ranks call each method; only rank 0 reads and writes the log, and every rank gets the groups. `beat` is
    called at each step and unit: a rank that samples nothing lives too.
    """

    def __init__(
        self, plan: Plan, source: RolloutSource, log: RolloutLog, world: World, beat: Callable[[], None] = lambda: None
    ) -> None:
        self.plan, self.source, self.log, self.world, self._beat = plan, source, log, world, beat
        self._ordered: dict[int, list[RolloutUnit]] = {}  # by step: those that are being sampled
        self._known: dict[int, dict[int, tuple[RolloutGroup, ...]]] = {}  # by step and number: those from the log
        self.wait_s = self.generate_s = self.score_s = 0.0  # of the last step taken; the latter two of all units

    def order(self, step: int, version: int) -> None:
        """Have a step's units sampled with these weights, which have been published. Returns at once."""
        if step >= self.plan.n_steps or step in self._ordered:
            return
        units = self.plan.train_units(step, version)
        self._known[step] = self._from_log(units)
        self._ordered[step] = [unit for unit in units if unit.number not in self._known[step]]
        self.source.submit(self._ordered[step])

    def take(self, step: int) -> list[RolloutGroup]:
        """The groups of a step that was ordered, in the order of its prompts; waits for them."""
        return self._collect(self._ordered.pop(step), self._known.pop(step))

    def evaluate(self, step: int, version: int) -> tuple[list[RolloutGroup], list[RolloutGroup]]:
        """Groups of the evaluation prompts, sampled and greedy."""
        both = self.plan.eval_units(step, version)
        units = [unit for part in both for unit in part]
        known = self._from_log(units)
        missing = [unit for unit in units if unit.number not in known]
        self.source.submit(missing)
        groups = self._collect(missing, known)
        n_sampled = sum(len(unit.prompts) for unit in both[0])
        return groups[:n_sampled], groups[n_sampled:]

    def _from_log(self, units: list[RolloutUnit]) -> dict[int, tuple[RolloutGroup, ...]]:
        if not units:
            return {}
        found = []
        if self.world.rank == 0:
            there = self.log.units(units[0].split, units[0].step)
            found = [(u.number, there[u.number]) for u in units if u.number in there and self._fits(u, there[u.number])]
        return dict(gather(found, self.world))

    def _fits(self, unit: RolloutUnit, groups: tuple[RolloutGroup, ...]) -> bool:
        oldest = max(0, unit.step - self.plan.settings.async_steps) if unit.split == "train" else unit.step
        rewards = [rollout.reward for group in groups for rollout in group.rollouts]
        return (
            tuple(group.prompt for group in groups) == unit.prompts
            and all(oldest <= group.version <= unit.step for group in groups)
            and (not rewards or any(reward is not None for reward in rewards))
        )

    def _collect(
        self, units: list[RolloutUnit], known: dict[int, tuple[RolloutGroup, ...]]
    ) -> list[RolloutGroup]:
        begun = time.perf_counter()
        done: list[FinishedUnit] = []
        finished = iter(self.source.finished(units))
        self._beat()
        for _ in units:
            found = next(finished, None)
            if self.world.rank == 0:
                assert found is not None
                self.log.append(found)
                done.append(found)
            self._beat()
            sum_over_ranks([0.0], self.world)  # so no rank waits for another longer than a unit takes
        self.generate_s, self.score_s = sum(d.generate_s for d in done), sum(d.score_s for d in done)
        numbered = known | dict(gather([(d.unit.number, d.groups) for d in done], self.world))
        self.wait_s = time.perf_counter() - begun
        return [group for number in sorted(numbered) for group in numbered[number]]

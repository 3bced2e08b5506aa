"""A unit on its way through failing actors: tried whole, then prompt by prompt; what fails alone too is set aside.

Bookkeeping without Ray. A unit that always fails is poisoned by one of its prompts, which fails alone too. If all its
prompts pass alone, its actors died of something else: then it is tried whole again, so that chance changes no token (a
prompt's samples may differ in rounding between a batch and alone).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat_ray.messages import FinishedUnit, RolloutGroup, RolloutUnit

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Work:
    """Prompts that one actor completes in one call: a whole unit, or one prompt of it alone."""

    trial: Trial
    unit: RolloutUnit  # with these prompts only
    place: int | None = None  # of the prompt in its unit; None: the whole unit
    failures: int = 0
    sampled: bool = False  # its rollouts exist and are being scored

    @property
    def order(self) -> tuple[int, int, int]:
        """What is needed first goes first: an evaluation before what later steps learn from."""
        return self.unit.step, self.trial.number, self.place or 0


class Trial:
    """One unit, the work on it that is open, and what is known of its prompts."""

    def __init__(self, unit: RolloutUnit, number: int, unit_failures: int, prompt_failures: int) -> None:
        """`number` is that of its submission. A unit may fail `unit_failures` times, a prompt `prompt_failures`."""
        self.unit, self.number = unit, number
        self.unit_failures, self.prompt_failures = unit_failures, prompt_failures
        self.open = [Work(self, unit)]
        self.finished: FinishedUnit | None = None
        self._alone: dict[int, RolloutGroup] = {}  # by the prompt's place
        self._acquitted = False
        self._generate_s = self._score_s = 0.0
        self._by: list[str] = []

    @property
    def set_aside(self) -> int:
        """How many prompts have been set aside."""
        return sum(group.set_aside is not None for group in self._alone.values())

    def scored(
        self, work: Work, groups: Sequence[RolloutGroup], generate_s: float, score_s: float, by: str
    ) -> None:  # fmt: skip
        """This work is done. The whole unit ends the trial, also when its prompts are already being tried alone."""
        if self.finished is not None or (work.place is not None and work not in self.open):
            return
        self._generate_s, self._score_s = self._generate_s + generate_s, self._score_s + score_s
        if by not in self._by:
            self._by.append(by)
        if work.place is None:
            self._finish(groups)
        else:
            self.open.remove(work)
            [self._alone[work.place]] = groups
            self._after_prompt()

    def failed(self, work: Work, why: str, hopeless: bool = False) -> None:
        """An attempt at this work came to nothing; `hopeless`: so would the next one."""
        if self.finished is not None or work not in self.open:
            return
        work.failures += 1
        if not hopeless and work.failures < (self.unit_failures if work.place is None else self.prompt_failures):
            return
        self.open.remove(work)
        if work.place is None and self._acquitted:
            logger.warning("%s fails whole, its prompts do not; they count as sampled alone", self.unit.name)
            self._finish([self._alone[place] for place in range(len(self.unit.prompts))])
        elif work.place is None:
            tries = work.failures
            logger.warning("%s has failed %d times; trying its prompts one by one: %s", self.unit.name, tries, why)
            self.open = [
                Work(self, dataclasses.replace(self.unit, prompts=(prompt,)), place)
                for place, prompt in enumerate(self.unit.prompts)
            ]
        else:
            prompt = self.unit.prompts[work.place]
            logger.warning("prompt %s is set aside: %s", prompt.id, why)
            self._alone[work.place] = RolloutGroup(prompt, self.unit.version, (), set_aside=why)
            self._after_prompt()

    def _after_prompt(self) -> None:
        if self.open:
            return
        if self.set_aside:
            self._finish([self._alone[place] for place in range(len(self.unit.prompts))])
        else:
            self._acquitted = True
            self.open = [Work(self, self.unit)]

    def _finish(self, groups: Sequence[RolloutGroup]) -> None:
        self.open = []
        took = self._generate_s, self._score_s
        self.finished = FinishedUnit(self.unit, tuple(groups), *took, by=", ".join(self._by))

"""Scores for training ranks that sample themselves: in an actor beside each of them, without its GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import ray
from ray.exceptions import ActorAlreadyExistsError, GetTimeoutError, RayActorError

from nanochat_ray.messages import PassedOn, Rollout, RolloutGroup, RolloutUnit
from nanochat_ray.rollout.scorer import unscored
from nanochat_ray.rollout.settings import PoolNeeds, PoolPatience
from nanochat_ray.rollout.starting import scorer_starter
from nanochat_ray.stages.rollouts import RolloutSpec
from nanochat_ray.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

LOOK_S = 1.0


class ScorerElsewhere:
    """A scorer in a process of its own. One that dies or hangs is replaced, and its unit scored again."""

    def __init__(
        self, spec: RolloutSpec, rank: int, passed_on: PassedOn, beat: Callable[[], None],
        patience: PoolPatience = PoolPatience(),
    ) -> None:  # fmt: skip
        self._spec, self._beat, self._patience = spec, beat, patience
        self._start = scorer_starter(spec, PoolNeeds(), passed_on)
        self._name, self._n_started = f"scorer {spec.name} rank {rank}", 0
        self._actor = self._begin()

    def score(self, unit: RolloutUnit, rollouts: Sequence[Sequence[Rollout]]) -> tuple[RolloutGroup, ...]:
        """The unit's groups; without rewards if scorers die of it again and again. Raises what the task itself does."""
        for _ in range(self._patience.score_failures):
            try:
                return self._wait(self._actor.score.remote(unit, rollouts))
            except (RayActorError, TimeoutError) as error:
                why = f"its scorer died: {error}"
                logger.warning("%s is scored again: %s", unit.name, str(error).splitlines()[0])
                self.close()
                self._actor = self._begin()
        return unscored(Tokenizer.load(self._spec.tokenizer_folder), unit, rollouts, why)

    def close(self) -> None:
        """End the actor."""
        ray.kill(self._actor)

    def _begin(self) -> ray.actor.ActorHandle:
        while True:
            self._n_started += 1
            try:
                actor = self._start(f"{self._name} #{self._n_started}")
                break
            except ActorAlreadyExistsError:
                continue  # that of an earlier launch is still on its way out
        self._loaded = actor.load.remote()
        return actor

    def _wait(self, scored: ray.ObjectRef) -> tuple[RolloutGroup, ...]:
        waited_s = 0.0
        while True:
            self._beat()
            try:
                ray.get(self._loaded, timeout=LOOK_S)
                return ray.get(scored, timeout=LOOK_S)[0]
            except GetTimeoutError:
                waited_s += LOOK_S
                if waited_s > self._patience.score_s:
                    raise TimeoutError(f"not scored in {self._patience.score_s:.0f} s") from None

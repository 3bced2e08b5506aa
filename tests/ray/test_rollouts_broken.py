"""Rollouts go on when what scores freezes or dies, and when an actor breaks without dying."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from nanochat_ray.messages import ClusterError, FinishedUnit, PassedOn, RolloutGroup, RolloutUnit, World
from nanochat_ray.stages.rollouts import OwnRollouts, RolloutSpec
from tests.ray.test_rollout_pool import MODELS, by_name, spec_in, unit

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> RolloutSpec:
    return spec_in(tmp_path_factory.mktemp("broken"), "broken rl")


@pytest.fixture(scope="module")
def own(spec) -> OwnRollouts:
    own = OwnRollouts(spec, World())
    own.publish(0, MODELS[0])
    return own


def alone(own: OwnRollouts, units: list[RolloutUnit]) -> dict[str, tuple[RolloutGroup, ...]]:
    return by_name(own.finished(units))


def finish(pool, units: list[RolloutUnit]) -> dict[str, tuple[RolloutGroup, ...]]:
    pool.submit(units)
    found: Iterator[FinishedUnit] = pool.finished(units)
    return by_name(found)


def test_a_frozen_scorer_is_replaced(spec, own):
    from nanochat_ray.rollout.pool import RolloutPool
    from nanochat_ray.rollout.settings import PoolNeeds, PoolPatience

    patience, needs = PoolPatience(score_s=1.0), PoolNeeds(cpus=0.5)
    pool, units = RolloutPool(spec, 1, passed_on=PassedOn({}), patience=patience, needs=needs), [unit(0, 0), unit(1, 0)]
    pool.publish(0, MODELS[0])
    found = finish(pool, units[:1])
    [scorer] = pool._scorers.members
    os.kill(scorer.pid, signal.SIGSTOP)
    found |= finish(pool, units[1:])
    assert found == alone(own, units)
    stats = pool.stats()
    assert stats.restarts == 1 and stats.unscored == stats.set_aside == stats.requeued == 0
    pool.close()


def test_a_broken_actor_is_replaced_and_takes_no_prompts_with_it(spec, own, monkeypatch):
    """One that raises at everything from some time on, as a GPU in an error state does, and fails faster than others
    succeed."""
    from nanochat_ray.rollout import starting
    from nanochat_ray.rollout.actors import RolloutActor
    from nanochat_ray.rollout.pool import RolloutPool
    from nanochat_ray.rollout.settings import PoolNeeds

    class Breaking(RolloutActor):
        def sample(self, unit, weights):
            if unit.number == 2 and not self.mark.exists():
                self.mark.touch()
                self.broken = True
            if self.broken:
                raise RuntimeError("the device is in an error state")
            return super().sample(unit, weights)

        broken, mark = False, spec.tokenizer_folder / "once"

    monkeypatch.setattr(starting, "RolloutActor", Breaking)
    pool = RolloutPool(spec, 2, passed_on=PassedOn({}), needs=PoolNeeds(cpus=0.5))
    pool.publish(0, MODELS[0])
    units = [unit(k, 0) for k in range(12)]
    assert finish(pool, units) == alone(own, units)
    assert pool.stats().set_aside == 0 and pool.stats().restarts == 1
    pool.close()


def test_a_rank_that_samples_itself_has_a_scorer_that_is_replaced(spec, own):
    """Killed, frozen, or not yet gone when the next launch wants its name."""
    from nanochat_ray.rollout.elsewhere import ScorerElsewhere
    from nanochat_ray.rollout.settings import PoolPatience

    beats: list[int] = []
    scorers = [
        ScorerElsewhere(spec, 0, PassedOn({}), lambda: beats.append(1), PoolPatience(score_s=2.0)) for _ in range(2)
    ]
    import ray

    rollouts = own.sampler.sample(unit(0, 0))
    [expected] = alone(own, [unit(0, 0)]).values()
    for number in (signal.SIGKILL, signal.SIGSTOP):
        for scorer in scorers:
            assert scorer.score(unit(0, 0), rollouts) == expected
            os.kill(ray.get(scorer._actor.hello.remote()), number)
    assert scorers[0].score(unit(0, 0), rollouts) == expected and beats
    scorers[0]._patience = PoolPatience(score_s=0.0)
    os.kill(ray.get(scorers[0]._actor.hello.remote()), signal.SIGSTOP)
    scorers[0]._start = lambda name: scorers[1]._actor  # frozen too: no scorer will ever answer
    groups = scorers[0].score(unit(0, 0), rollouts)
    for group, right in zip(groups, expected, strict=True):
        for rollout, other in zip(group.rollouts, right.rollouts, strict=True):
            assert rollout.reward is None and rollout.failure is not None and rollout.token_ids == other.token_ids
    for scorer in scorers:
        scorer.close()


def test_a_cluster_without_room_for_rollouts_is_refused():
    from nanochat_ray.train.room import Workers, wait_for_room

    workers = Workers(at_least=4, at_most=4, rollout_workers=2)
    with pytest.raises(ClusterError, match=r"needs 5 CPU \(4 x 1 CPU for workers, 1 for rollouts\).* has 4 CPU"):
        wait_for_room(workers, "rl", 1.0, False, lambda: False)
    with pytest.raises(ClusterError, match=r"waited 1 s for 5 CPU .*1 for rollouts"):
        wait_for_room(workers, "rl", 1.0, True, lambda: False)
    assert wait_for_room(Workers(at_least=3, at_most=3, rollout_workers=9), "rl", 60.0, False, lambda: False) == 3

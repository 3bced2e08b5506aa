"""Where the ranks of a training stage get their rollouts from."""

from __future__ import annotations

from collections.abc import Callable

from nanochat_ray.messages import PassedOn, World
from nanochat_ray.rollout.elsewhere import ScorerElsewhere
from nanochat_ray.rollout.pool import ElsewhereRollouts, RolloutPool
from nanochat_ray.rollout.settings import PoolPatience
from nanochat_ray.stages.rl import RLJob, plain_rollouts
from nanochat_ray.stages.rollouts import OwnRollouts, RolloutSource


def open_rollouts(
    job: RLJob, world: World, workers: int, passed_on: PassedOn, wait_s: float, beat: Callable[[], None]
) -> RolloutSource:
    """A pool of `workers` actors for rank 0, who gives the others their share; the ranks themselves for 0; or a log."""
    if job.settings.replay:
        return plain_rollouts(job, world)
    spec = job.rollout_spec(world.device)
    if workers == 0:
        return OwnRollouts(spec, world, beat, ScorerElsewhere(spec, world.rank, passed_on, beat))
    if world.rank:
        return ElsewhereRollouts()
    patience = PoolPatience(start_timeout_s=wait_s)
    return RolloutPool(spec, workers, job.settings.score_workers, passed_on=passed_on, patience=patience, beat=beat)

"""Where the ranks of a training stage get their rollouts from."""

from __future__ import annotations

from collections.abc import Callable

from nanochat_ray.messages import PassedOn, World
from nanochat_ray.rollout.pool import ElsewhereRollouts, RolloutPool
from nanochat_ray.stages.rl import RLJob, plain_rollouts
from nanochat_ray.stages.rollouts import RolloutSource


def open_rollouts(
    job: RLJob, world: World, workers: int, passed_on: PassedOn, beat: Callable[[], None]
) -> RolloutSource:
    """A pool of `workers` actors for rank 0, who gives the others their share; the ranks themselves for 0; or a log."""
    if job.settings.replay or workers == 0:
        return plain_rollouts(job, world, beat)
    if world.rank:
        return ElsewhereRollouts()
    spec = job.rollout_spec(world.device.split(":")[0])
    return RolloutPool(spec, workers, job.settings.score_workers, passed_on=passed_on, beat=beat)

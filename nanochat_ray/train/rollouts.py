"""Where the ranks of a training stage get their rollouts from."""

from __future__ import annotations

from collections.abc import Callable

from nanochat_ray.messages import World
from nanochat_ray.stages.rl import RLJob, plain_rollouts
from nanochat_ray.stages.rollouts import RolloutSource


def open_rollouts(job: RLJob, world: World, workers: int, beat: Callable[[], None]) -> RolloutSource:
    """A pool of `workers` actors, the ranks themselves for 0, or a log."""
    return plain_rollouts(job, world, beat)

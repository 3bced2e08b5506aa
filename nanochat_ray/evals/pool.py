"""Evaluation fanned out over Ray actors: the same units in any order on any number of actors give the same records."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError

from nanochat_ray.config import THREADS_ENV
from nanochat_ray.messages import ClusterError
from nanochat_ray.stages.evaluation import EvalSpec, Evaluator, Record, Unit

logger = logging.getLogger(__name__)

MAX_TRIES = 3  # of one unit, when actors die under it
START_TIMEOUT_S = 300.0


class EvalActor(Evaluator):
    """An evaluator with the model loaded, in a process of its own."""

    def ready(self) -> int:
        return os.getpid()


def run_units(spec: EvalSpec, units: Sequence[Unit], actors: int, threads: int = 1) -> list[list[Record]]:
    """Evaluate every unit on `actors` actors and return their records in the order of `units`.

    An actor that dies is replaced and its unit done again, at most MAX_TRIES times. Raises ClusterError if no actor
    can be placed within START_TIMEOUT_S, and whatever a unit itself raises.
    """
    use_gpu = spec.device.startswith("cuda")
    remote: Any = ray.remote(EvalActor)
    env = {"OMP_NUM_THREADS": str(threads), **THREADS_ENV}
    actor_class = remote.options(num_cpus=1, num_gpus=1 if use_gpu else 0, runtime_env={"env_vars": env})

    pool = [actor_class.remote(spec) for _ in range(min(actors, len(units)))]
    results: list[list[Record] | None] = [None] * len(units)
    waiting = deque(range(len(units)))
    tries = [0] * len(units)
    idle: deque[ray.actor.ActorHandle] = deque()
    starting: dict[ray.ObjectRef, ray.actor.ActorHandle] = {actor.ready.remote(): actor for actor in pool}
    running: dict[ray.ObjectRef, tuple[int, ray.actor.ActorHandle]] = {}
    try:
        while waiting or running:
            while waiting and idle:  # only actors that have a place get work; others may never get one
                number, actor = waiting.popleft(), idle.popleft()
                running[actor.run.remote(units[number])] = (number, actor)
            deadline_s = None if running else START_TIMEOUT_S
            finished, _ = ray.wait([*running, *starting], num_returns=1, timeout=deadline_s)
            if not finished:
                raise ClusterError(
                    f"no evaluation actor could be placed in {START_TIMEOUT_S:.0f} s; free: {ray.available_resources()}"
                )
            if finished[0] in starting:
                ray.get(finished[0])
                idle.append(starting.pop(finished[0]))
                continue
            number, actor = running.pop(finished[0])
            try:
                results[number] = ray.get(finished[0])
                idle.append(actor)
            except RayActorError as error:
                tries[number] += 1
                if tries[number] >= MAX_TRIES:
                    raise RuntimeError(f"{tries[number]} actors died evaluating {units[number]}: {error}") from error
                logger.warning("an evaluation actor died; its unit is done again on another")
                waiting.appendleft(number)
                pool.append(actor_class.remote(spec))
                starting[pool[-1].ready.remote()] = pool[-1]
    finally:
        for actor in pool:
            ray.kill(actor)
    return [records for records in results if records is not None]


"""Evaluation fanned out over Ray actors: the same units in any order on any number of actors give the same records."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError

from nanochat_ray.config import THREADS_ENV
from nanochat_ray.evals.hf import HFSpec, evaluator_of
from nanochat_ray.messages import ClusterError, PassedOn
from nanochat_ray.stages.evaluation import EvalSpec, Record, Unit

logger = logging.getLogger(__name__)

MAX_TRIES = 3  # of one unit, and of starting actors in a row, when actors die
START_TIMEOUT_S = 300.0
UNIT_TIMEOUT_S = 3600.0
SPEAK_EVERY_S = 30.0
_numbers = itertools.count()  # of the actors of this process, whose names may not be used twice


class EvalActor:
    """An evaluator with the model loaded, in a process of its own."""

    def __init__(self, spec: EvalSpec | HFSpec, passed_on: PassedOn):
        passed_on.take()
        self.spec = spec

    def ready(self) -> int:
        """Load the model, here rather than in the constructor, so that what this raises reaches the caller as it is."""
        self.evaluator = evaluator_of(self.spec)
        return os.getpid()

    def run(self, unit: Unit) -> list[Record]:
        return self.evaluator.run(unit)


@dataclass(frozen=True)
class Call:
    """What an actor is asked to do: to get ready, or a unit."""

    actor: ray.actor.ActorHandle
    unit: int | None
    begun_s: float = field(default_factory=time.monotonic)


def actor_starter(spec: EvalSpec | HFSpec, threads: int) -> Callable[[], ray.actor.ActorHandle]:
    """A function that starts one more actor, named after what it evaluates."""
    remote: Any = ray.remote(EvalActor)
    env = {"OMP_NUM_THREADS": str(threads), **THREADS_ENV}
    options = {"num_cpus": 1, "num_gpus": int(spec.device.startswith("cuda")), "runtime_env": {"env_vars": env}}
    return lambda: remote.options(name=f"{spec.name} #{next(_numbers)}", **options).remote(spec, PassedOn.here())


def run_units(spec: EvalSpec | HFSpec, units: Sequence[Unit], actors: int, threads: int = 1) -> list[list[Record]]:
    """Evaluate every unit on `actors` actors and return their records in the order of `units`.

    An actor that dies, or takes more than UNIT_TIMEOUT_S for a unit, is replaced and its unit done again, at most
    MAX_TRIES times. Raises ClusterError if no actor can be placed within START_TIMEOUT_S, and whatever loading the
    model or a unit raises.
    """
    start = actor_starter(spec, threads)
    pool = [start() for _ in range(min(actors, len(units)))]
    calls: dict[ray.ObjectRef, Call] = {actor.ready.remote(): Call(actor, None) for actor in pool}
    idle: deque[ray.actor.ActorHandle] = deque()
    results: list[list[Record] | None] = [None] * len(units)
    waiting = deque(range(len(units)))
    tries = [0] * len(units)
    failed_starts = 0
    heard_s = time.monotonic()
    try:
        while waiting or any(call.unit is not None for call in calls.values()):
            while waiting and idle:  # only actors that have a place get work; others may never get one
                actor, number = idle.popleft(), waiting.popleft()
                calls[actor.run.remote(units[number])] = Call(actor, number)
            finished, _ = ray.wait([*calls], num_returns=1, timeout=SPEAK_EVERY_S)
            if not finished:
                check_patience(calls, time.monotonic() - heard_s)
                continue
            heard_s = time.monotonic()
            call = calls.pop(finished[0])
            try:
                found = ray.get(finished[0])
            except RayActorError as error:
                if call.unit is None:
                    failed_starts += 1
                else:
                    tries[call.unit] += 1
                    waiting.appendleft(call.unit)
                if max(failed_starts, *tries) >= MAX_TRIES:
                    raise ClusterError(f"{MAX_TRIES} evaluation actors died one after another: {error}") from error
                logger.warning("an evaluation actor died; another one takes its place")
                pool.append(start())
                calls[pool[-1].ready.remote()] = Call(pool[-1], None)
                continue
            idle.append(call.actor)
            if call.unit is None:
                failed_starts = 0
            else:
                results[call.unit] = found
    finally:
        for actor in pool:
            ray.kill(actor)
    return [records for records in results if records is not None]


def check_patience(calls: dict[ray.ObjectRef, Call], silent_s: float) -> None:
    """Nothing has come back for a while: say what is waited for, kill what hangs, give up on what gets no place."""
    running = [call for call in calls.values() if call.unit is not None]
    for call in running:
        if time.monotonic() - call.begun_s > UNIT_TIMEOUT_S:
            logger.warning("an evaluation actor works on one unit for more than %.0f s; it is ended", UNIT_TIMEOUT_S)
            ray.kill(call.actor)
    if running:
        return
    free = ", ".join(f"{amount:g} {name}" for name, amount in sorted(ray.available_resources().items())
                     if name in ("CPU", "GPU")) or "none"  # fmt: skip
    if silent_s > START_TIMEOUT_S:
        raise ClusterError(f"no evaluation actor could be placed and loaded in {START_TIMEOUT_S:.0f} s; free: {free}")
    logger.warning("waiting for an evaluation actor to be placed and loaded since %.0f s; free: %s", silent_s, free)

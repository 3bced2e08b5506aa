"""A process that samples rollouts."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import ray

from nanochat_ray.messages import PassedOn, Rollout, RolloutUnit
from nanochat_ray.rollout.vllm import VllmSampler
from nanochat_ray.stages.rollouts import RolloutSpec, UnitSampler


class WeightsError(ValueError):
    """Published weights do not fit the actors' network: no fault of any prompt."""


@dataclass(frozen=True)
class Sampled:
    """How long a unit took."""

    fetch_s: float  # to get and take over weights; 0 if they were there
    generate_s: float


class RolloutActor:
    """An engine in a process of its own. It completes one unit at a time, and brings its weights up to the unit's."""

    def __init__(self, spec: RolloutSpec, passed_on: PassedOn) -> None:
        passed_on.take()
        self.spec = spec

    def hello(self) -> int:
        """The process' id: it has a place."""
        return os.getpid()

    def load(self) -> None:
        """Build the engine; not in the constructor, so that what this raises reaches the caller as it is."""
        self.sampler = VllmSampler(self.spec) if self.spec.engine == "vllm" else UnitSampler(self.spec)

    def sample(self, unit: RolloutUnit, weights: list[ray.ObjectRef]) -> tuple[list[list[Rollout]], Sampled]:
        """The completions of the unit's prompts. `weights` holds the reference of the unit's version.

        In a list Ray leaves it alone; what it stands for is fetched only where that version is not there yet.
        """
        begun_s = time.perf_counter()
        if self.sampler.version != unit.version:
            sent = ray.get(weights[0])
            self.sampler.version = None  # half taken over is no version
            try:
                self.sampler.load(sent)
            except ValueError as error:
                raise WeightsError(f"version {unit.version} of the weights: {error}") from error
        fetched_s = time.perf_counter()
        try:
            rollouts = self.sampler.sample(unit)
        except Exception:
            self.sampler.rest()  # the next unit gets a new engine
            raise
        return rollouts, Sampled(fetched_s - begun_s, time.perf_counter() - fetched_s)

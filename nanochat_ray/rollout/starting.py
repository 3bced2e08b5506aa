"""How rollout actors and scorers are started."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from nanochat_ray.config import THREADS_ENV
from nanochat_ray.messages import PassedOn
from nanochat_ray.rollout.actors import RolloutActor
from nanochat_ray.rollout.scorer import ScorerActor
from nanochat_ray.rollout.settings import PoolNeeds
from nanochat_ray.stages.rollouts import RolloutSpec


def sampler_starter(spec: RolloutSpec, needs: PoolNeeds, passed_on: PassedOn) -> Callable[[str], Any]:
    """A function that starts a rollout actor of a name."""
    on_gpu = spec.device.startswith("cuda")
    there = dataclasses.replace(spec, device="cuda" if on_gpu else spec.device)  # the caller's GPU has another number
    env = {"OMP_NUM_THREADS": str(spec.threads), **THREADS_ENV} | ({} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""})
    options = actor_options(needs.cpus, needs.gpus if on_gpu else 0, env)
    remote: Any = ray.remote(RolloutActor)
    return lambda name: remote.options(name=name, **options).remote(there, passed_on)


def scorer_starter(spec: RolloutSpec, needs: PoolNeeds, passed_on: PassedOn) -> Callable[[str], Any]:
    """A function that starts a scorer of a name. It sees no GPU."""
    options = actor_options(needs.scorer_cpus, 0, {"OMP_NUM_THREADS": "1", **THREADS_ENV, "CUDA_VISIBLE_DEVICES": ""})
    remote: Any = ray.remote(ScorerActor)
    return lambda name: remote.options(name=name, **options).remote(spec.task, spec.tokenizer_folder, passed_on)


def actor_options(cpus: float, gpus: float, env: dict[str, str]) -> dict[str, Any]:
    """Outside any placement group (a training worker's has no room); Ray restarts nothing, since the pool does."""
    outside = PlacementGroupSchedulingStrategy(placement_group=None)  # type: ignore[arg-type]
    return {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0, "max_task_retries": 0,
            "scheduling_strategy": outside, "runtime_env": {"env_vars": env}}  # fmt: skip

"""Where rollouts come from: units of prompts in, scored groups out; in this process, or from others behind one seam."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from nanochat_ray.config import ModelConfig
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.kv_cache import kinds_of, page_bytes, pages_needed
from nanochat_ray.messages import FinishedUnit, Rollout, RolloutGroup, RolloutSplit, RolloutUnit, World
from nanochat_ray.model.flat_weights import FlatWeights, flatten, load_flat
from nanochat_ray.model.gpt import GPT, Linear
from nanochat_ray.model.precision import pick_dtype, prepare_device
from nanochat_ray.stages.evaluation import gather
from nanochat_ray.tasks.rewards import score_unit
from nanochat_ray.tasks.rl_task import RLTaskSpec
from nanochat_ray.tasks.task import Conversation
from nanochat_ray.text.tokenizer import Tokenizer

BLOCK_SIZE, CHUNK_TOKENS = 16, 512


@dataclass(frozen=True)
class RolloutSpec:
    """What a process needs to sample and score; plain values, so it can cross to another machine.

    Rows, threads and the cache's size are part of it: they decide how matrix products are cut, hence rounding.
    """

    name: str  # of the run and stage, for people
    task: RLTaskSpec
    tokenizer_folder: Path
    model_config: ModelConfig
    device: str
    dtype: str | None = None
    max_rows: int = 64
    max_len: int = 2048  # positions of the longest prompt with its completion
    threads: int = 1  # of a CPU
    engine: str = "own"  # or "vllm", in actors only


class RolloutSource(Protocol):
    """The seam. Every rank of the training stage calls each method, with the same arguments."""

    def publish(self, version: int, model: GPT) -> None:
        """Give out new weights, for units that are submitted from now on with this version."""
        ...

    def submit(self, units: Sequence[RolloutUnit]) -> None:
        """Queue units. Returns at once."""
        ...

    def finished(self, units: Sequence[RolloutUnit]) -> Iterator[FinishedUnit]:
        """These units, which have been submitted, each as it is done; on rank 0 all of them, elsewhere perhaps none."""
        ...

    def counts(self) -> dict[str, float]:
        """What happened behind the seam, for the metrics."""
        ...

    def close(self) -> None: ...


class UnitSampler:
    """One engine that completes one unit at a time: what comes out is a function of the unit and the weights."""

    def __init__(self, spec: RolloutSpec) -> None:
        self.spec = spec
        self.tokenizer = Tokenizer.load(spec.tokenizer_folder)
        self.tools = spec.task.open().tools
        dtype, _ = pick_dtype(spec.device, spec.dtype)
        prepare_device(spec.device)
        self.model = GPT.build(spec.model_config, device=spec.device, compute_dtype=dtype).eval()
        for module in self.model.modules():
            if isinstance(module, Linear):  # no copies in another dtype, so weights can change below recorded graphs
                module.weight = torch.nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)
        self.version: int | None = None
        self._engine: Engine | None = None

    def load(self, weights: FlatWeights) -> None:
        """Take over weights, in place."""
        load_flat(self.model, weights)
        self.version = weights.version

    def sample(self, unit: RolloutUnit) -> list[list[Rollout]]:
        """The completions of a unit's prompts. ValueError for a prompt that does not fit."""
        assert unit.version == self.version, f"{unit.name} wants version {unit.version}, here is {self.version}"
        engine = self._awake()
        engine.forget()
        each = [dataclasses.replace(unit.params, seed=prompt.seed) for prompt in unit.prompts]
        with fixed_threads(self.spec):
            return engine.rollouts([prompt.token_ids for prompt in unit.prompts], each)

    def rest(self) -> None:
        """Give the memory of keys and values back until the next unit."""
        self._engine = None
        if self.spec.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def _awake(self) -> Engine:
        if self._engine is None:
            config = self.spec.model_config
            lefts, layers = kinds_of(config)
            pages = pages_needed(lefts, [len(those) for those in layers], self.spec.max_len, CHUNK_TOKENS, BLOCK_SIZE)
            kv_bytes = self.spec.max_rows * pages * page_bytes(config, BLOCK_SIZE, self.model.compute_dtype)
            self._engine = Engine(
                self.model, self.tokenizer, self.spec.max_rows, block_size=BLOCK_SIZE, chunk_tokens=CHUNK_TOKENS,
                kv_bytes=kv_bytes, tools=self.tools,
            )
        return self._engine


@contextlib.contextmanager
def fixed_threads(spec: RolloutSpec) -> Iterator[None]:
    """The number of torch's threads that the spec says, for as long as this is open."""
    before = torch.get_num_threads()
    if spec.device == "cpu" and before != spec.threads:
        torch.set_num_threads(spec.threads)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


class Scorer(Protocol):
    """Gives a unit's completions their rewards."""

    def score(self, unit: RolloutUnit, rollouts: Sequence[Sequence[Rollout]]) -> tuple[RolloutGroup, ...]: ...

    def close(self) -> None: ...


class UnitScorer:
    """The task's rewards, for one unit at a time."""

    def __init__(self, task: RLTaskSpec, tokenizer_folder: Path) -> None:
        self.task = task.open()
        self.tokenizer = Tokenizer.load(tokenizer_folder)
        self._prompts: dict[RolloutSplit, Sequence[Conversation]] = {}

    def score(self, unit: RolloutUnit, rollouts: Sequence[Sequence[Rollout]]) -> tuple[RolloutGroup, ...]:
        if unit.split not in self._prompts:
            self._prompts[unit.split] = self.task.prompts(unit.split)
        return score_unit(self.task, self._prompts[unit.split], self.tokenizer, unit, rollouts)

    def close(self) -> None:
        return None


class OwnRollouts:
    """Rollouts in the training ranks themselves, each doing its share between two updates: sampling and training
    take turns on a device, and the cache's memory is given back in between."""

    def __init__(
        self, spec: RolloutSpec, world: World, beat: Callable[[], None] = lambda: None, scorer: Scorer | None = None
    ) -> None:
        """`scorer` scores elsewhere; without one this process does."""
        self.world = world
        self.sampler = UnitSampler(spec)
        self.sampler.model.register_forward_hook(lambda *_: beat())
        self.scorer: Scorer = scorer or UnitScorer(spec.task, spec.tokenizer_folder)

    def publish(self, version: int, model: GPT) -> None:
        self.sampler.load(flatten(model, version))

    def submit(self, units: Sequence[RolloutUnit]) -> None:
        return None  # `finished` does the work

    def finished(self, units: Sequence[RolloutUnit]) -> Iterator[FinishedUnit]:
        mine = [self._do(unit) for unit in units[self.world.rank :: self.world.world_size]]
        self.sampler.rest()
        yield from gather(mine, self.world)

    def _do(self, unit: RolloutUnit) -> FinishedUnit:
        begun = time.perf_counter()
        rollouts = self.sampler.sample(unit)
        sampled = time.perf_counter()
        groups = self.scorer.score(unit, rollouts)
        took = sampled - begun, time.perf_counter() - sampled
        return FinishedUnit(unit, groups, *took, by=f"rank {self.world.rank}")

    def counts(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self.sampler.rest()
        self.scorer.close()

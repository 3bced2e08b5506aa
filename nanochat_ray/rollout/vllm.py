"""Rollouts sampled by vLLM: the same actors, units and weights, with another engine in the actor."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import psutil
import torch

from nanochat_ray.interchange.vllm_engine import VllmEngine, cache_bytes
from nanochat_ray.messages import Rollout, RolloutUnit
from nanochat_ray.model.flat_weights import FlatWeights
from nanochat_ray.model.precision import pick_dtype, prepare_device
from nanochat_ray.stages.rollouts import CHUNK_TOKENS, RolloutSpec
from nanochat_ray.text.tokenizer import Tokenizer


def free_bytes(device: str) -> int:
    """Memory of a device that nobody uses."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


class VllmSampler:
    """One engine of vLLM that completes one unit at a time, like `UnitSampler`.

    What comes out is a function of the unit and the weights, on the same version of vLLM and kind of device: the size
    of the cache, which decides what runs together, follows from the spec.
    Its memory and its threads are vLLM's until the process ends, so it does not take turns with training.
    """

    def __init__(self, spec: RolloutSpec) -> None:
        """ValueError if vLLM is missing here, or the memory that the spec wants."""
        from nanochat_ray.interchange.vllm_plugin import export_for_vllm

        self.spec = spec
        dtype, _ = pick_dtype(spec.device, spec.dtype)
        prepare_device(spec.device)
        torch.set_num_threads(spec.threads)  # vLLM lets nobody change it later
        kv_bytes = cache_bytes(spec.model_config, spec.max_rows, spec.max_len, dtype)
        if kv_bytes > (free := free_bytes(spec.device)):
            raise ValueError(
                f"vLLM's cache for {spec.max_rows} rows of {spec.max_len} tokens takes {kv_bytes / 1e9:.1f} GB, and "
                f"{free / 1e9:.1f} GB are free on {spec.device}: give fewer --max-rows or --max-new-tokens"
            )
        config, tokenizer = spec.model_config, Tokenizer.load(spec.tokenizer_folder)
        with tempfile.TemporaryDirectory(prefix="nanochat_ray_vllm_") as folder:
            self.engine = VllmEngine(
                export_for_vllm(config, Path(folder)), tokenizer, config, spec.max_rows, dtype=dtype,
                device=spec.device, chunk_tokens=CHUNK_TOKENS, kv_bytes=kv_bytes, tools=spec.task.open().tools,
                blank=True,
            )  # fmt: skip
        self.version: int | None = None

    def load(self, weights: FlatWeights) -> None:
        """Take over weights, in place. ValueError if they do not fit."""
        self.engine.update(weights)
        self.version = weights.version

    def sample(self, unit: RolloutUnit) -> list[list[Rollout]]:
        """The completions of a unit's prompts. ValueError for a prompt that does not fit.

        RuntimeError with the cause if vLLM failed. Nothing makes another engine in this process then; for an error that
        is no ValueError the pool ends the process and starts another actor.
        """
        assert unit.version == self.version, f"{unit.name} wants version {unit.version}, here is {self.version}"
        self.engine.forget()
        each = [dataclasses.replace(unit.params, seed=prompt.seed) for prompt in unit.prompts]
        try:
            return self.engine.rollouts([prompt.token_ids for prompt in unit.prompts], each)
        except Exception as error:
            if self.engine.failed:
                raise RuntimeError(f"vLLM failed: {type(error).__name__}: {error}") from error
            raise

    def rest(self) -> None:
        """Nothing: memory is not given back, and what an interrupted unit left is ended by `rollouts` itself."""

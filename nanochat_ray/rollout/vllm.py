"""Rollouts sampled by vLLM: the same actors, units and weights, with another engine in the actor."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import torch

from nanochat_ray.interchange.vllm_engine import VllmEngine, cache_bytes
from nanochat_ray.messages import Rollout, RolloutUnit
from nanochat_ray.model.flat_weights import FlatWeights
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.precision import pick_dtype, prepare_device
from nanochat_ray.stages.rollouts import CHUNK_TOKENS, RolloutSpec
from nanochat_ray.text.tokenizer import Tokenizer


class VllmSampler:
    """One engine of vLLM that completes one unit at a time, like `UnitSampler`.

    Its memory and its threads are vLLM's until the process ends, so it does not take turns with training.
    """

    def __init__(self, spec: RolloutSpec) -> None:
        """ValueError if vLLM is missing here."""
        from nanochat_ray.interchange.vllm_plugin import export_for_vllm

        self.spec = spec
        dtype, _ = pick_dtype(spec.device, spec.dtype)
        prepare_device(spec.device)
        torch.set_num_threads(spec.threads)  # vLLM lets nobody change it later
        on_gpu = spec.device.startswith("cuda")
        kv_bytes = None if on_gpu else cache_bytes(spec.model_config, spec.max_rows, spec.max_len, dtype)
        with tempfile.TemporaryDirectory(prefix="nanochat_ray_vllm_") as folder:
            blank = GPT.build(spec.model_config, compute_dtype=dtype)  # its weights are replaced before the first unit
            self.engine = VllmEngine(
                export_for_vllm(blank, Path(folder)), Tokenizer.load(spec.tokenizer_folder), spec.model_config,
                spec.max_rows, dtype=dtype, device=spec.device, chunk_tokens=CHUNK_TOKENS, kv_bytes=kv_bytes,
                tools=spec.task.open().tools,
            )
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

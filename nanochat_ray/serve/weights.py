"""From a run's folder to a model that can be served. Plain torch, no Ray."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from nanochat_ray.engine.engine import Engine
from nanochat_ray.messages import SamplingParams
from nanochat_ray.model.checkpoint import Checkpoint, file_hash, resolve_checkpoint
from nanochat_ray.model.gpt import GPT
from nanochat_ray.run_dir import CONFIG_FILE, MANIFEST_FILE, STAGE_OF_SOURCE, RunDir
from nanochat_ray.serve.app_settings import ModelChoice, ServeSettings
from nanochat_ray.serve.backend import ServedModel
from nanochat_ray.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Shelf:
    """Where one served model's weights come from."""

    storage: str | None
    choice: ModelChoice  # settled
    defaults: SamplingParams
    device: str
    dtype: torch.dtype

    def find(self, step: int | None) -> Checkpoint:
        """The checkpoint of a step, or the newest. FileNotFoundError or CorruptCheckpointError if it is not there."""
        return resolve_checkpoint(self._run().checkpoints(self._stage), step)

    def load(self, checkpoint: Checkpoint) -> tuple[ServedModel, GPT]:
        """The network on its device, and what requests are told about it."""
        run = self._run()
        tokenizer = Tokenizer.load(run.require_stage("tokenizer", "tok_train.py"))
        model = checkpoint.build_model(self.device, self.dtype, tokenizer.vocab_size)
        model.eval()
        config = run.stage(self._stage) / CONFIG_FILE
        assert self.choice.name is not None, "a settled choice has a name"
        served = ServedModel(
            name=self.choice.name,
            tokenizer=tokenizer,
            context=checkpoint.model_config.sequence_len,
            created=int((checkpoint.folder / MANIFEST_FILE).stat().st_mtime),
            chat=self.choice.source != "base",
            defaults=self.defaults,
            lineage={
                "run": run.root.name,
                "source": self.choice.source,
                "step": checkpoint.step,
                "weights_sha256": checkpoint.model_hash,
                "tokenizer_sha256": tokenizer.hash,
                "config_sha256": file_hash(config) if config.is_file() else None,
            },
        )
        return served, model

    @property
    def _stage(self) -> str:
        return STAGE_OF_SOURCE[self.choice.source]

    def _run(self) -> RunDir:
        assert self.choice.model_tag is not None, "a settled choice has a run"
        return RunDir.of(self.storage, self.choice.model_tag).fetch()


def make_engine(
    settings: ServeSettings, tokenizer: Tokenizer, model: GPT, checkpoint: Checkpoint, device: str, kv_bytes: int | None
) -> Engine:
    """The engine that the settings name, on a device, with the checkpoint's weights, which `model` has too.

    ValueError if it is vLLM, and there is none for the device.
    """
    rows, chunk_tokens = settings.max_rows, settings.chunk_tokens
    if settings.engine == "own":
        return Engine(model, tokenizer, rows, chunk_tokens=chunk_tokens, kv_bytes=kv_bytes)
    from nanochat_ray.interchange.vllm_engine import VllmEngine
    from nanochat_ray.interchange.vllm_plugin import export_for_vllm

    with tempfile.TemporaryDirectory(prefix="nanochat_ray_vllm_") as folder:
        return VllmEngine(
            export_for_vllm(checkpoint, Path(folder)), tokenizer, model.config, rows, dtype=model.compute_dtype,
            device=device, chunk_tokens=chunk_tokens, kv_bytes=kv_bytes,
        )

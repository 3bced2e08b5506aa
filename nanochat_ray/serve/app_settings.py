"""The server's knobs: which models, on what, how many at once. The arguments of `build` in app.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field, SecretStr, model_validator

from nanochat_ray.config import Settings
from nanochat_ray.messages import SamplingParams
from nanochat_ray.remote import Remote
from nanochat_ray.run_dir import STAGE_OF_SOURCE, RunDir, existing_run, shown
from nanochat_ray.serve.settings import HttpSettings

API_KEYS_VARIABLE = "NANOCHAT_RAY_API_KEYS"
SHARED_KV_FRAC = 0.8  # of a GPU's free memory, where several engines share it
Source = Literal["base", "sft", "rl"]


class ModelChoice(Settings):
    """A checkpoint of a run, and the name that requests call it by."""

    name: str | None = Field(None, min_length=1, description="a request's `model`; unset: <model_tag>-<source>")
    source: Source = "sft"
    model_tag: str | None = Field(None, description="the run's folder; unset: the largest run, the latest among equals")
    step: int | None = Field(None, ge=0, description="unset: the newest when a replica starts")


class ServeSettings(Settings):
    """What a chat server serves, and with what."""

    model_config = ConfigDict(hide_input_in_errors=True)  # there may be keys in it

    storage: str | None = Field(None, description="folder of all runs; unset: NANOCHAT_BASE_DIR, as of all jobs")
    model_tag: str | None = Field(None, description="of the one model, as in ModelChoice")
    source: Source = "sft"
    step: int | None = Field(None, ge=0)
    models: tuple[ModelChoice, ...] = Field(
        (), description="several models, the first for requests that name none; unset: the one of the fields above"
    )
    engine: Literal["own", "vllm"] = Field("own", description="what generates: our engine, or vLLM (one model)")
    device: Literal["cpu", "cuda", "mps"] | None = Field(None, description="unset: CUDA if the cluster has GPUs")
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(None, description="compute; unset: by hardware")
    max_rows: int = Field(64, ge=1, description="streams of one model that are decoded together")
    kv_memory_gb: float | None = Field(None, gt=0, description="of keys and values, all models; unset: by free memory")
    chunk_tokens: int = Field(256, ge=1, description="prompt tokens read between two tokens of the running streams")
    max_queue: int = Field(64, ge=0, description="streams of one model that may wait in a replica; more are told 429")
    temperature: float = Field(0.6, ge=0, le=2, description="of requests that name none, as the three below")
    top_k: int = Field(50, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(512, ge=1)
    replicas: int | None = Field(None, ge=1, description="unset: one per GPU that is there, without GPU one")
    max_replicas: int | None = Field(None, ge=1, description="more than `replicas`: Serve adds some when there is work")
    cpus: int | None = Field(None, ge=1, description="and threads, of a replica; unset: share of a node, on a GPU 1")
    stream_interval_s: float = Field(0.04, ge=0, description="at least, between chunks of a stream; the first at once")
    stuck_s: float = Field(120.0, gt=0, description="a step that takes longer makes a replica be replaced")
    http: HttpSettings = HttpSettings()

    @model_validator(mode="after")
    def _check(self) -> ServeSettings:
        if self.models and (self.model_tag is not None or self.step is not None or "source" in self.model_fields_set):
            raise ValueError("give either models, or model_tag, source and step of one model, not both")
        if self.http.api_keys:
            raise ValueError(
                "http.api_keys: what stands in a config is shown by Ray's dashboard; set the environment variable "
                f"{API_KEYS_VARIABLE} (keys joined by commas) or http.api_keys_file instead"
            )
        if self.engine == "vllm" and len(self.choices) > 1:
            raise ValueError(
                f"engine vllm: one process holds one model of vLLM, not {len(self.choices)}; serve one here, or take "
                "engine own"
            )
        if self.engine == "vllm" and self.device == "mps":
            raise ValueError("engine vllm: vLLM has no device mps; take cpu, or engine own")
        if self.max_replicas is not None and self.max_replicas < (self.replicas or 1):
            raise ValueError(f"max_replicas {self.max_replicas} is below replicas {self.replicas or 1}")
        return self

    @property
    def choices(self) -> tuple[ModelChoice, ...]:
        """The models to serve, one at least."""
        return self.models or (ModelChoice(source=self.source, model_tag=self.model_tag, step=self.step),)

    @property
    def defaults(self) -> SamplingParams:
        """For what a request leaves out."""
        return SamplingParams(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, max_tokens=self.max_tokens
        )

    def kv_bytes_each(self, free_bytes: int | None) -> int | None:
        """Memory for keys and values of each engine; None: the engine sees for itself, which one alone can.

        `free_bytes` is what a GPU has left when all models are on it.
        """
        if self.kv_memory_gb is not None:
            return int(self.kv_memory_gb * 1e9 / len(self.choices))
        if len(self.choices) > 1 and free_bytes is not None:
            return int(free_bytes * SHARED_KV_FRAC / len(self.choices))
        return None

    def http_with_keys(self) -> HttpSettings:
        """The HTTP side's settings with the keys that this process' environment has."""
        keys = [key.strip() for key in os.environ.get(API_KEYS_VARIABLE, "").split(",")]
        values = self.http.model_dump() | {"api_keys": tuple(SecretStr(key) for key in keys if key)}
        return HttpSettings.model_validate(values)


def settle(storage: str | None, choices: tuple[ModelChoice, ...]) -> tuple[ModelChoice, ...]:
    """The same choices with the run and the name filled in, so that every replica serves the same run. Needs no torch.

    FileNotFoundError that names the command to run if there is no such run or the run has no such model yet,
    ValueError for a name used twice.
    """
    settled = []
    for choice in choices:
        tag = existing_run(storage, choice.model_tag)
        folder = RunDir.of(storage, tag).checkpoints(STAGE_OF_SOURCE[choice.source])
        if not _has_checkpoints(folder):
            raise FileNotFoundError(
                f"run {tag} has no {choice.source} model yet: there is no checkpoint in {shown(folder)}. Train it "
                f"(python jobs/speedrun.py --model-tag {tag} does all stages) or serve another `source`"
            )
        settled.append(choice.model_copy(update={"model_tag": tag, "name": choice.name or f"{tag}-{choice.source}"}))
    names = [str(choice.name) for choice in settled]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"models: {', '.join(twice)} is there more than once; give each a `name` of its own")
    return tuple(settled)


def _has_checkpoints(folder: Path) -> bool:
    remote = Remote.of(folder)
    names = remote.listing(folder) if remote else (os.listdir(folder) if folder.is_dir() else ())
    return any(name.startswith("step_") for name in names)


class UserConfig(Settings):
    """What a running server takes over without a restart: Serve's `user_config` of the deployment."""

    weights: Literal["latest"] | int | dict[str, Literal["latest"] | int] | None = Field(
        None, description="step, or latest, of all models or by name; unset: nothing changes"
    )
    revision: int | str = Field(0, description="another value has `latest` looked up anew")

    def step_of(self, name: str) -> Literal["latest"] | int | None:
        """What is wanted of a model, None if nothing is."""
        return self.weights.get(name) if isinstance(self.weights, dict) else self.weights

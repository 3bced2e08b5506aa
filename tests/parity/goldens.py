"""Reading the golden numbers, and the four golden networks with their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nanochat_ray.config import ModelConfig
from nanochat_ray.model.gpt import GPT

DATA = Path(__file__).parent / "data"


def load_json(name: str) -> Any:
    """The JSON file of that name, with or without its ending."""
    return json.loads((DATA / f"{name.removesuffix('.json')}.json").read_text(encoding="utf-8"))


def load_tensors(name: str) -> dict[str, torch.Tensor]:
    """The safetensors file of that name, with or without its ending."""
    return load_file(DATA / f"{name.removesuffix('.safetensors')}.safetensors")


def stored_names(key: str) -> dict[str, str]:
    """Neutral parameter name to the name in our state dict, for network a, b, c or d."""
    return {neutral: entry["stored_as"] for neutral, entry in load_json("forward")["names"][key].items()}


def config_of(key: str) -> ModelConfig:
    """Configuration of golden network a, b, c or d."""
    return ModelConfig(**(load_json("bpb") if key == "d" else load_json("forward")["cases"][key])["config"])


def model_from_golden(key: str, dtype: torch.dtype = torch.float32) -> GPT:
    """Golden network a, b, c or d on the CPU; `dtype` float64 gives a network that computes in double precision."""
    model = GPT.build(config_of(key), compute_dtype=dtype)
    names = stored_names(key)
    weights = {names[neutral]: tensor.float() for neutral, tensor in load_tensors(f"weights_{key}").items()}
    model.load_state_dict(weights, strict=True)
    return model.double() if dtype == torch.float64 else model


def probe(tensor: torch.Tensor) -> dict[str, float]:
    """The summary that the golden files hold of a tensor: l2, sum, dotcos, absmax."""
    flat = tensor.detach().double().flatten()
    cosines = torch.cos(torch.arange(len(flat), dtype=torch.float64))
    return {
        "l2": flat.norm().item(),
        "sum": flat.sum().item(),
        "dotcos": (flat * cosines).sum().item(),
        "absmax": flat.abs().max().item(),
    }


def probe_error(tensor: torch.Tensor, expected: dict[str, Any]) -> float:
    """Largest distance between a tensor's probe and the expected one, in units of the expected norm.

    Raises AssertionError if the shapes differ.
    """
    assert list(tensor.shape) == expected["shape"], (list(tensor.shape), expected["shape"])
    found = probe(tensor)
    return max(abs(found[key] - expected[key]) for key in ("l2", "sum", "dotcos")) / max(expected["l2"], 1e-30)

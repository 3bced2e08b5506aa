"""nanochat's state dict and config to ours and back: names, padding, and what older versions did not have.

Parameters have the same names and shapes on both sides, so this is a matter of what is missing. A part of the network
that a file knows nothing of gets the value at which it does nothing, and a note says so. A tensor that has no place, or
one that is missing out of a part that is there, is an error that names it.

nanochat's constants are code there, not config; which ones a file was trained with shows in what it holds:

| the file has | rotary base | QK scale | softcap | value gate | short window |
| --- | --- | --- | --- | --- | --- |
| no value embeddings (2025) | 10,000 | 1 | 15 | - | - |
| value gates on 32 channels (early 2026) | 10,000 | 1 | 20 | 2 | half of the context |
| else (March 2026 and later) | 100,000 | 1.2 | 15 | 3 | a quarter of the context |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from nanochat_ray.config import ModelConfig
from nanochat_ray.model.gpt import GPT

CONFIG_KEYS = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern")
CONSTANTS = tuple(name for name in ModelConfig.model_fields if name not in CONFIG_KEYS)
GIVEN_CONSTANTS = tuple(name for name in CONSTANTS if name not in ("vocab_pad_multiple", "arch_version"))  # not told
COMPILED_PREFIX = "_orig_mod."
ROTARY_TABLES = ("cos", "sin")
AT_MOST = {"n_layer": 1024, "n_embd": 1 << 17, "vocab_size": 1 << 21, "sequence_len": 1 << 21}
MOST_CONSTANT = {"rope_table_factor": 100, "smear_channels": 4096, "value_gate_channels": 4096}
PAD_MULTIPLES = (64, 1, 128, 256, 512, 1024)
CONSTANTS_2025 = {"rope_base": 10_000.0, "qk_scale": 1.0}
CONSTANTS_EARLY_2026 = CONSTANTS_2025 | {"logit_softcap": 20.0, "value_gate_scale": 2.0}
EARLY_2026_GATE_CHANNELS = 32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WTE = "transformer.wte.weight"
FIRST_GATE = "attn.ve_gate.weight"


@dataclass(frozen=True)
class Imported:
    """A model in our form, and one line for everything that the file did not say itself."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    notes: tuple[str, ...]


def to_ours(
    given: Mapping[str, Any], tensors: dict[str, Tensor], constants: Mapping[str, Any] | None = None
) -> Imported:
    """The model of a file. `given` is its `model_config`; the tensors are taken out of their dict one by one.

    `constants` says which of nanochat's constants it was trained with; without, that is told from what the file has.
    ValueError names a config value that cannot be, and a tensor that is missing, has no place or another shape.
    """
    notes: list[str] = []
    named = _without_prefix(tensors, notes)
    values = _sizes(given, notes)
    values |= {name: value for name, value in _constants(named, values, notes).items() if name not in (constants or {})}
    values |= dict(constants or {})
    _check_constants(values)
    values["vocab_pad_multiple"] = _pad_multiple(named, values)
    try:
        config = ModelConfig.model_validate(values)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))} {e['msg']}" for e in error.errors())
        raise ValueError(f"its model_config cannot be: {wrong}") from None
    shapes = _shapes(config)
    _add_neutral(named, shapes, config, notes)
    missing, unexpected = sorted(shapes.keys() - named.keys()), sorted(named.keys() - shapes.keys())
    if missing or unexpected:
        raise ValueError(f"tensors do not fit the network: missing {_few(missing)}, without a place {_few(unexpected)}")
    found = {}
    for name, shape in shapes.items():
        tensor = named.pop(name)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"tensor {name}: {tuple(tensor.shape)} stored, {shape} wanted")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"tensor {name} is of {tensor.dtype}; one of {', '.join(map(str, DTYPES))} is needed")
        found[name] = tensor.clone(memory_format=torch.contiguous_format)  # of its own storage, whatever it shared
    return Imported(config, found, tuple(notes))


def upstream_config(config: ModelConfig) -> dict[str, Any]:
    """The keys that nanochat's own config has."""
    return {key: getattr(config, key) for key in CONFIG_KEYS}


def not_upstream(config: ModelConfig) -> list[str]:
    """The constants in which this network differs from today's nanochat, which has them in its code."""
    default = ModelConfig()
    return [f"{name} {getattr(config, name)}, nanochat has {getattr(default, name)}"
            for name in CONSTANTS if getattr(config, name) != getattr(default, name)]


def _without_prefix(tensors: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """The tensors by the names they have without compilation, without tables that are computed anew."""
    found: dict[str, Tensor] = {}
    for name in list(tensors):
        plain = name.removeprefix(COMPILED_PREFIX)
        if plain in found:
            raise ValueError(f"tensor {plain} is there twice, with and without {COMPILED_PREFIX}")
        found[plain] = tensors.pop(name)
    dropped = [name for name in ROTARY_TABLES if found.pop(name, None) is not None]
    if dropped:
        notes.append(f"left out {' and '.join(dropped)}: rotary tables are computed from the config")
    return found


def _sizes(given: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    unknown = sorted(given.keys() - set(CONFIG_KEYS))
    if unknown:
        raise ValueError(f"its model_config has {_few(unknown)}, of which nothing is known here")
    values = dict(given)
    if "window_pattern" not in values:
        values["window_pattern"] = "L"
        notes.append("no window_pattern: every layer sees the whole context (L)")
    missing = [key for key in CONFIG_KEYS if key not in values]
    if missing:
        raise ValueError(f"its model_config lacks {', '.join(missing)}")
    for key, most in AT_MOST.items():
        value = values[key]
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"its model_config has {key} {str(value)[:50]}: a number from 1 to {most:,} is needed")
    return values


def _constants(named: Mapping[str, Tensor], values: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """What nanochat's code was when this file was made; may change the window pattern."""
    gates = [tensor for name, tensor in named.items() if name.endswith(FIRST_GATE)]
    if not any(name.startswith("value_embeds.") for name in named):
        notes.append(f"no value embeddings: constants of 2025, {_listed(CONSTANTS_2025)}")
        return dict(CONSTANTS_2025)
    if not gates or gates[0].dim() != 2:
        return {}
    channels = gates[0].size(1)
    found: dict[str, Any] = {"value_gate_channels": channels}
    if channels == EARLY_2026_GATE_CHANNELS:
        found |= CONSTANTS_EARLY_2026
        notes.append(f"value gates on {channels} channels: constants of early 2026, {_listed(CONSTANTS_EARLY_2026)}")
        if "S" in str(values["window_pattern"]).upper():
            notes.append(
                f"window_pattern {values['window_pattern']} became L: S was half of the context then, a quarter now; "
                f"nothing changes up to {values['sequence_len'] // 2} tokens, beyond them layers see more than before"
            )
            values["window_pattern"] = "L"
    return found


def _check_constants(values: Mapping[str, Any]) -> None:
    """ValueError for constants of no use: a hostile meta file must not ask for a table of any length."""
    version = ModelConfig().arch_version
    if values.get("arch_version", version) != version:
        raise ValueError(f"its arch_version is {values['arch_version']!r}; this code knows {version}")
    for name in CONSTANTS:
        value = values.get(name, 1)
        if type(value) not in (int, float) or not 0 < value <= MOST_CONSTANT.get(name, 1e9):
            most = MOST_CONSTANT.get(name, 1e9)
            raise ValueError(f"its {name} is {str(value)[:50]}: a number above 0 and up to {most:g} is needed")


def _pad_multiple(named: Mapping[str, Tensor], values: Mapping[str, Any]) -> int:
    """To what the vocabulary was padded, told from the rows of the token table."""
    if WTE not in named:
        raise ValueError(f"tensors do not fit the network: missing {WTE}")
    rows, vocab = named[WTE].size(0) if named[WTE].dim() else 0, values["vocab_size"]
    for multiple in PAD_MULTIPLES:
        if -(-vocab // multiple) * multiple == rows:
            return multiple
    raise ValueError(f"tensor {WTE} has {rows} rows, which is no padding of vocab_size {vocab}")


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in GPT(config).state_dict().items()}


def _add_neutral(
    named: dict[str, Tensor], shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, notes: list[str]
) -> None:
    """Give each part of the network that the file knows nothing of the values at which it does nothing."""
    value_parts = [name for name in shapes if name.startswith("value_embeds.") or name.endswith(FIRST_GATE)]
    parts: list[tuple[str, list[str], float]] = [
        ("resid_lambdas: ones", ["resid_lambdas"], 1.0),
        ("x0_lambdas: zeros", ["x0_lambdas"], 0.0),
        ("smear: a weight of zero", ["smear_gate.weight", "smear_lambda"], 0.0),
        ("backout: a weight of zero", ["backout_lambda"], 0.0),
        ("value embeddings: zeros", value_parts, 0.0),
    ]
    for what, names, value in parts:
        if any(name in named for name in names):
            continue
        for name in names:
            dtype = named[WTE].dtype if name.startswith("value_embeds.") else torch.float32
            named[name] = torch.full(shapes[name], value, dtype=dtype)
        notes.append(f"no {what}, so that it changes nothing")


def _listed(constants: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in constants.items())


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "") if listed else "none"

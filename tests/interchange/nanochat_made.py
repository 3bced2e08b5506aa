"""nanochat's files made from our golden weights, as nanochat would have written them."""

from __future__ import annotations

import base64
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import tiktoken
import torch

from nanochat_ray.text.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN
from tests.parity.goldens import config_of, load_json, load_tensors, stored_names

FOLDERS = {"base": "base_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}
KEYS = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern")


def encoding(vocab_size: int, pattern: str = SPLIT_PATTERN) -> tiktoken.Encoding:
    """The golden tokenizer if there is one of this size, else bytes and made-up pairs of them."""
    if vocab_size in (512, 2048):
        tokens = [base64.b64decode(token) for token in load_json(f"tokenizer_{vocab_size}")["tokens_b64"]]
    else:
        pairs = [bytes([97 + k // 26, 97 + k % 26]) for k in range(vocab_size - 256 - len(SPECIAL_TOKENS))]
        tokens = [bytes([b]) for b in range(256)] + pairs
    assert len(tokens) + len(SPECIAL_TOKENS) == vocab_size
    ranks = {token: rank for rank, token in enumerate(tokens)}
    special = {name: len(tokens) + k for k, name in enumerate(SPECIAL_TOKENS)}
    return tiktoken.Encoding("rustbpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def golden_state(key: str) -> dict[str, torch.Tensor]:
    """The golden network's state dict, by nanochat's names."""
    names = stored_names(key)
    return {names[neutral]: tensor.float() for neutral, tensor in load_tensors(f"weights_{key}").items()}


def golden_config(key: str) -> dict[str, Any]:
    config = config_of(key)
    return {name: getattr(config, name) for name in KEYS}


def write_tokenizer(base: Path, vocab_size: int, protocol: int = 4) -> Path:
    folder = base / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    made = encoding(vocab_size)
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(made, protocol=protocol))
    lengths = [len(made.decode_single_token_bytes(k)) for k in range(vocab_size - len(SPECIAL_TOKENS))]
    torch.save(torch.tensor(lengths + [0] * len(SPECIAL_TOKENS), dtype=torch.int32), folder / "token_bytes.pt")
    return folder / "tokenizer.pkl"


def write_model(
    base: Path, source: str, tag: str, step: int, state: dict[str, torch.Tensor], config: dict[str, Any], **meta: Any
) -> Path:
    folder = base / FOLDERS[source] / tag
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / f"model_{step:06d}.pt")
    known = {} if source == "rl" else {"step": step, "val_bpb": 1.25, "user_config": {"run": "dummy", "depth": -1}}
    text = json.dumps({**known, "model_config": config, **meta}, indent=2)  # as nanochat: Infinity is written as such
    (folder / f"meta_{step:06d}.json").write_text(text)
    return folder / f"model_{step:06d}.pt"


def write_golden(base: Path, key: str, sources: tuple[str, ...] = ("base",), step: int = 20) -> Path:
    """nanochat's base folder with golden network a, b, c or d."""
    for source in sources:
        write_model(base, source, "d4", step, golden_state(key), golden_config(key))
    write_tokenizer(base, config_of(key).vocab_size)
    return base


def call(module: Any, monkeypatch: Any, *argv: str) -> None:
    """A job as a command in this process; what a person got wrong is raised."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *argv])
    module.cli()

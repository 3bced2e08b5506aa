"""What the tests of Transformers share: when they are skipped, and exported folders of the golden networks."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from nanochat_ray.interchange.hf_export import export
from nanochat_ray.model.checkpoint import open_checkpoint, save_checkpoint
from nanochat_ray.text.tokenizer import Tokenizer
from tests.parity.goldens import model_from_golden
from tests.parity.test_tokenizer import golden_tokenizer

PACKAGES = ("transformers", "tokenizers", "huggingface_hub")


def need_hf() -> None:
    """Skip without the extra hf; with NANOCHAT_RAY_NEED_HF=1 fail instead."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        reason = f"the extra hf is not installed: {', '.join(missing)}"
        if os.environ.get("NANOCHAT_RAY_NEED_HF") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


def tokenizer_for(vocab_size: int) -> Tokenizer:
    """The golden tokenizer, with as many tokens as the network has."""
    ordinary = golden_tokenizer(2048)
    return Tokenizer.from_tokens([ordinary.decode_bytes([k]) for k in range(vocab_size - len(ordinary.special))])


def exported(root: Path, key: str, source: str = "sft", dtype: str | None = None) -> tuple[Any, Path]:
    """Golden network a, b, c or d, and the folder that it was exported to."""
    model = model_from_golden(key).eval()
    meta = {"model_config": model.config.model_dump(mode="json")}
    save_checkpoint(root / "checkpoints", 1, {k: v.clone() for k, v in model.state_dict().items()}, None, meta)
    tokenizer = tokenizer_for(model.config.vocab_size)
    return model, export(open_checkpoint(root / "checkpoints", 1), tokenizer, root / "out", source, "# card\n", dtype)

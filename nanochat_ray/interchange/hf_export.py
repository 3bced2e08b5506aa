"""A model as a folder that Transformers loads: weights, network, tokenizer, chat template, card.

The folder is written beside its place and renamed into it, so it is there whole or not at all. An export that was
killed leaves a hidden folder `.<name>.<mark>.tmp` there.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nanochat_ray.config import ModelConfig
from nanochat_ray.interchange.hf_extra import needed
from nanochat_ray.interchange.hf_tokenizer import save_tokenizer
from nanochat_ray.model.checkpoint import Checkpoint
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.precision import DTYPES
from nanochat_ray.run_dir import write_json
from nanochat_ray.text.tokenizer import Tokenizer

CODE = Path(__file__).parent / "hf_folder"  # never imported here: it imports transformers
CODE_FILES = ("configuration_nanochat_ray.py", "modeling_nanochat_ray.py")
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
ARCHITECTURE = "NanochatRayForCausalLM"
MODEL_TYPE = "nanochat_ray"


def export(
    checkpoint: Checkpoint, tokenizer: Tokenizer, out: Path, source: str, card: str, dtype: str | None = None
) -> Path:
    """Write the folder `out`, which must not be there or be empty; returns it.

    `dtype` is that of the matrices and tables (unset: as they are stored, to compute in fp32). Raises ValueError for an
    `out` with files in it, a missing extra, a tokenizer of another model, a tensor without a place.
    """
    needed("tokenizers")
    config = checkpoint.model_config
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already: name another folder, or remove it first")
    tensors = placed(checkpoint.model_tensors(), config)
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        for name in CODE_FILES:
            shutil.copyfile(CODE / name, temporary / name)
        save_file(converted(tensors, dtype), temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        (temporary / WEIGHTS_FILE).chmod(0o644)  # safetensors makes it the owner's only
        ids = token_ids(tokenizer, source)
        write_json(temporary / "config.json", model_json(config, ids, dtype))
        write_json(temporary / "generation_config.json", ids)
        end = next(name for name, token in tokenizer.special.items() if token == ids["eos_token_id"][0])
        save_tokenizer(tokenizer, temporary, config.sequence_len, end)
        (temporary / CARD_FILE).write_text(card, encoding="utf-8")
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def placed(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The tensors if they are just those of the network, else ValueError that names what is too many, few or different.

    Parameters have the same names there as here.
    """
    with torch.device("meta"):
        places = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
    wrong = [f"{name} has no place in it" for name in tensors.keys() - places.keys()]
    wrong += [f"{name} is missing" for name in places.keys() - tensors.keys()]
    wrong += [
        f"{name} is {tuple(tensors[name].shape)}, its place {tuple(places[name])}"
        for name in tensors.keys() & places.keys()
        if tensors[name].shape != places[name]
    ]
    if wrong:
        raise ValueError(f"the weights do not fit the network: {'; '.join(sorted(wrong)[:5])}")
    return dict(tensors)


def converted(tensors: Mapping[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
    """Matrices and tables in `dtype`; the scalars that mix streams stay fp32."""
    if dtype is None:
        return {name: tensor.contiguous() for name, tensor in tensors.items()}
    return {
        name: tensor.contiguous() if tensor.dim() < 2 else tensor.to(DTYPES[dtype]).contiguous()
        for name, tensor in tensors.items()
    }


def token_ids(tokenizer: Tokenizer, source: str) -> dict[str, Any]:
    """Which ids begin, end and fill a text: a base model's texts end with the next one's BOS."""
    bos = tokenizer.bos_id
    ends = [bos] if source == "base" else [tokenizer.encode_special("<|assistant_end|>"), bos]
    return {"bos_token_id": bos, "eos_token_id": ends, "pad_token_id": bos}


def model_json(config: ModelConfig, ids: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """The content of config.json."""
    return {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "auto_map": {
            "AutoConfig": f"{Path(CODE_FILES[0]).stem}.NanochatRayConfig",
            "AutoModelForCausalLM": f"{Path(CODE_FILES[1]).stem}.{ARCHITECTURE}",
        },
        "dtype": dtype or "float32",
        **config.model_dump(mode="json"),
        **ids,
    }

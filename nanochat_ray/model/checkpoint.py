"""Checkpoints: a folder per step with safetensors, JSON and a manifest of sizes and hashes, renamed into place whole.

```
<stage>/checkpoints/step_000100/  model.safetensors  optim.safetensors  meta.json  manifest.json
```
Tensors carry the parameter names of SPEC 1.5, so nothing depends on how many ranks wrote them. No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from nanochat_ray.config import ModelConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.run_dir import MANIFEST_FILE

logger = logging.getLogger(__name__)

MODEL_FILE = "model.safetensors"
OPTIM_FILE = "optim.safetensors"
META_FILE = "meta.json"
_STEP_FOLDER = re.compile(r"step_(\d{6,})")


class CorruptCheckpointError(ValueError):
    """A checkpoint folder whose files do not match its manifest."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    folder: Path
    step: int
    meta: dict[str, Any]

    @property
    def model_config(self) -> ModelConfig:
        return ModelConfig.model_validate(self.meta["model_config"])

    def model_tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / MODEL_FILE)

    def optimizer_tensors(self) -> dict[str, torch.Tensor] | None:
        path = self.folder / OPTIM_FILE
        return load_file(path) if path.exists() else None

    @property
    def model_hash(self) -> str:
        """SHA-256 of the weights file, as the manifest has it."""
        return json.loads((self.folder / MANIFEST_FILE).read_text())["files"][MODEL_FILE]["sha256"]

    def build_model(self, device: str, compute_dtype: torch.dtype, vocab_size: int | None = None) -> GPT:
        """The network with these weights on `device`. `vocab_size` is the tokenizer's, checked against the model's."""
        config = self.model_config
        if vocab_size is not None and vocab_size != config.vocab_size:
            raise ValueError(
                f"the tokenizer has {vocab_size} tokens, the checkpoint {self.folder} was trained with "
                f"{config.vocab_size}; use the tokenizer of the same run"
            )
        model = GPT.build(config, device=device, compute_dtype=compute_dtype)
        load_weights(model, self.model_tensors())
        return model


def load_weights(model: GPT, tensors: dict[str, torch.Tensor]) -> None:
    """Copy weights in, converting to the model's dtypes; every name must match."""
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(f"weights do not fit the model: missing {missing[:5]}, unexpected {unexpected[:5]}")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise ValueError(f"weight {name}: {tuple(tensors[name].shape)} stored, {tuple(tensor.shape)} wanted")
            tensor.copy_(tensors[name])


def model_tensors(model: GPT) -> dict[str, torch.Tensor]:
    """All parameters on the CPU by name."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def step_folder(root: Path, step: int) -> Path:
    return root / f"step_{step:06d}"


def saved_steps(root: Path) -> list[int]:
    """Steps that have a folder, ascending; whether they verify is another question."""
    if not root.is_dir():
        return []
    return sorted(int(m[1]) for entry in root.iterdir() if (m := _STEP_FOLDER.fullmatch(entry.name)))


def save_checkpoint(
    root: Path,
    step: int,
    model: dict[str, torch.Tensor],
    optimizer: dict[str, torch.Tensor] | None,
    meta: dict[str, Any],
    keep_last: int | None = 2,
    guard: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Path:
    """Write a checkpoint beside the others and rename it into place.

    `guard` is held during the rename and may refuse it (run_dir.writing_as). On any failure, a full disk too, the
    earlier checkpoints are untouched and the unfinished one is removed.
    """
    target = step_folder(root, step)
    temporary = root / f".{target.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_file(model, temporary / MODEL_FILE)
        if optimizer is not None:
            save_file(optimizer, temporary / OPTIM_FILE)
        (temporary / META_FILE).write_text(json.dumps({"step": step, **meta}, indent=2, allow_nan=False))
        files = {p.name: {"bytes": p.stat().st_size, "sha256": file_hash(p)} for p in sorted(temporary.iterdir())}
        (temporary / MANIFEST_FILE).write_text(json.dumps({"version": 1, "files": files}, indent=2))
        for path in (*temporary.iterdir(), temporary):
            _fsync(path)
        with guard():
            if target.exists():  # the same step saved before a rollback: one rename away, one in place
                old = root / f".{target.name}.replaced.tmp"
                shutil.rmtree(old, ignore_errors=True)
                os.rename(target, old)
                os.rename(temporary, target)
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.rename(temporary, target)
            _fsync(root)
    except OSError as error:
        raise OSError(error.errno, f"checkpoint of step {step} not saved, earlier ones are kept: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if keep_last is not None:
        for old_step in saved_steps(root)[:-keep_last]:
            shutil.rmtree(step_folder(root, old_step), ignore_errors=True)
    return target


def open_checkpoint(root: Path, step: int) -> Checkpoint:
    """The checkpoint of a step; CorruptCheckpointError if a file is missing or differs from the manifest."""
    folder = step_folder(root, step)
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint of step {step} in {root}; there are {saved_steps(root) or 'none'}")
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        for name, entry in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != entry["bytes"] or file_hash(path) != entry["sha256"]:
                raise CorruptCheckpointError(f"{path} does not match its manifest")
        meta = json.loads((folder / META_FILE).read_text())
    except (OSError, ValueError, KeyError) as error:
        raise CorruptCheckpointError(f"checkpoint {folder} is incomplete: {error}") from error
    return Checkpoint(folder, step, meta)


def latest_checkpoint(root: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies; a corrupt one is passed over with a warning that names it."""
    for step in reversed(saved_steps(root)):
        try:
            return open_checkpoint(root, step)
        except CorruptCheckpointError as error:
            logger.warning("passed over: %s", error)
    return None


def resolve_checkpoint(root: Path, step: int | None) -> Checkpoint:
    """The checkpoint of `step`, or the newest that verifies; FileNotFoundError if there is none."""
    found = latest_checkpoint(root) if step is None else open_checkpoint(root, step)
    if found is None:
        raise FileNotFoundError(f"no checkpoint in {root}; train the stage first")
    return found


def drop_after(root: Path, step: int) -> None:
    """Remove the checkpoints of later steps, so that `step`, which must verify, is the one to go on from."""
    open_checkpoint(root, step)
    for later in saved_steps(root):
        if later > step:
            shutil.rmtree(step_folder(root, later))


def sweep(root: Path) -> None:
    """Remove what writers that were killed left half-written."""
    for leftover in root.glob(".step_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

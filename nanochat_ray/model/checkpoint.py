"""Checkpoints: a folder per step with safetensors, JSON and a manifest of sizes and hashes, renamed into place whole.

```
<stage>/checkpoints/step_000100/  model.safetensors  optim.safetensors  meta.json  manifest.json  (evaluated.json)
```
Tensors carry the parameter names of SPEC 1.5, so nothing depends on how many ranks wrote them. No pickle anywhere.

Below a mirrored folder (remote.py) the store is the truth: a checkpoint is there once its manifest is, which is pushed
last and deleted first; readers pull what they open. There a file's name begins with a mark of its own for every save,
which the manifest has: `step_000100/3f9c...-model.safetensors`. So nobody can write over what a manifest names, and a
writer that lost its lease in the middle leaves only files that no manifest names; they go with the step's folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanochat_ray.config import ModelConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.remote import Remote
from nanochat_ray.run_dir import MANIFEST_FILE, differences, locked, shown, write_json

logger = logging.getLogger(__name__)

MODEL_FILE = "model.safetensors"
OPTIM_FILE = "optim.safetensors"
META_FILE = "meta.json"
EVALUATED_FILE = "evaluated.json"  # validation of this very step, known only after the checkpoint; not in the manifest
PULL_LOCK_FILE = ".pull.lock"
PULL_LOCK_WAIT_S = 1800.0
ABANDONED_S = 86400.0  # a pull that has begun no file for so long is over
_PULLED = ".pulled"
Guard = Callable[[], AbstractContextManager[None]]  # entered while something is committed
_STEP_FOLDER = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class _Manifest:
    """What a checkpoint consists of: name -> {"bytes", "sha256"}."""

    folder: Path
    files: dict[str, dict[str, Any]]
    mark: str  # before the names of its files in a store

    def place(self, name: str) -> Path:
        """The path that stands for a file in the store."""
        return self.folder / f"{self.mark}{name}"


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
        with self._still_there():
            return load_file(self.folder / MODEL_FILE)

    def optimizer_tensors(self) -> dict[str, torch.Tensor] | None:
        with self._still_there():
            return load_file(self.folder / OPTIM_FILE) if OPTIM_FILE in _read_manifest(self.folder).files else None

    @property
    def model_hash(self) -> str:
        """SHA-256 of the weights file, as the manifest has it."""
        with self._still_there():
            return _read_manifest(self.folder).files[MODEL_FILE]["sha256"]

    @contextlib.contextmanager
    def _still_there(self) -> Iterator[None]:
        """A run that goes on removes its older checkpoints, also while somebody reads one."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError, CorruptCheckpointError) as error:  # RuntimeError: torch's mmap
            if self.folder.exists():
                raise
            raise FileNotFoundError(
                f"checkpoint {shown(self.folder)} was removed while it was read: the run keeps its newest and its "
                "best; take one of those, or train with a larger --keep-checkpoints"
            ) from error

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

    def check_architecture(self, config: ModelConfig) -> None:
        """Raise ValueError that names what differs unless the weights are of this architecture."""
        changed = differences(self.meta["model_config"], config.model_dump(mode="json"))
        if changed:
            raise ValueError(
                f"checkpoint {shown(self.folder)} is of another architecture:\n  " + "\n  ".join(changed)
                + "\nGive the settings that it was trained with, or another --model-tag."
            )


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


def snapshot(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Contiguous copies on the CPU by name, which no later update changes.

    From CUDA all copies are queued into pinned memory and waited for once; torch keeps that memory for the next time.
    """
    copies, queued = {}, False
    for name, tensor in tensors:
        pinned = tensor.device.type == "cuda"
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        copies[name] = copy.copy_(tensor.detach(), non_blocking=pinned)
        queued |= pinned
    if queued:
        torch.cuda.synchronize()
    return copies


def model_tensors(model: GPT) -> dict[str, torch.Tensor]:
    """Copies of all parameters on the CPU by name."""
    return snapshot(model.state_dict().items())


def step_folder(root: Path, step: int) -> Path:
    return root / f"step_{step:06d}"


def saved_steps(root: Path) -> list[int]:
    """Steps that have a folder, ascending; whether they verify is another question."""
    if (remote := Remote.of(root)) is not None:
        names = list(remote.patient().listing(root))
    else:
        names = os.listdir(root) if root.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := _STEP_FOLDER.fullmatch(name)))


def newest_whole_step(root: Path) -> int:
    """The newest step whose files are all there with the right sizes, 0 if none is; contents are not looked at."""
    return next((step for step in reversed(saved_steps(root)) if _looks_whole(step_folder(root, step))), 0)


# --- writing -----------------------------------------------------------------------------------------------------


def save_checkpoint(
    root: Path,
    step: int,
    model: dict[str, torch.Tensor],
    optimizer: dict[str, torch.Tensor] | None,
    meta: dict[str, Any],
    keep_last: int | None = None,
    guard: Guard = nullcontext,
) -> Path:
    """Write a checkpoint beside the others and rename it into place, then remove those that `prune` does not keep.

    `guard` is held during the rename and may refuse it (run_dir.writing_as). On any failure, a full disk too, the
    earlier checkpoints are untouched and the unfinished one is removed. Errors keep their number and kind
    (ConnectionError: the store does not answer).
    """
    target = step_folder(root, step)
    temporary = _hidden(target)
    leftovers: list[Path] = []
    remote = Remote.of(root)
    try:
        temporary.mkdir(parents=True)
        save_file(model, temporary / MODEL_FILE)
        if optimizer is not None:
            save_file(optimizer, temporary / OPTIM_FILE)
        (temporary / META_FILE).write_text(json.dumps({"step": step, **meta}, indent=2, allow_nan=False))
        files = {p.name: {"bytes": p.stat().st_size, "sha256": file_hash(p)} for p in sorted(temporary.iterdir())}
        manifest = {"version": 1, "files": files} | ({"mark": f"{uuid.uuid4().hex}-"} if remote else {})
        (temporary / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2))
        for path in (*temporary.iterdir(), temporary):
            _fsync(path)
        with guard():
            leftovers = [path for path in _abandoned(root) if path != temporary]  # of writers that were killed
            if target.exists():  # the same step saved before a rollback: one rename away, one in place
                leftovers.append(_hide(target))
            os.rename(temporary, target)
            _fsync(root)
        if remote is not None:
            _push(remote, target, guard)
    except (OSError, SafetensorError) as error:  # which is safetensors' own for a full disk
        message = f"checkpoint of step {step} not saved, earlier ones are kept: {error}"
        kind = next((kind for kind in (ConnectionError, TimeoutError) if isinstance(error, kind)), OSError)
        number = getattr(error, "errno", None)
        raise (kind(number, message) if number else kind(message)) from error
    finally:
        for path in (temporary, *leftovers):
            shutil.rmtree(path, ignore_errors=True)
    if keep_last is not None:
        prune(root, keep_last, guard)
    return target


def note_evaluation(root: Path, step: int, val_bpb: float, guard: Guard = nullcontext) -> None:
    """Write down what a saved step's own evaluation found, if that step was saved; see `known_bpb`."""
    folder = step_folder(root, step)
    if folder.is_dir():
        with guard():
            write_json(folder / EVALUATED_FILE, {"val_bpb": val_bpb})
        if (remote := Remote.of(root)) is not None:
            remote.patient().push(folder / EVALUATED_FILE, to=_read_manifest(folder).place(EVALUATED_FILE))


def known_bpb(root: Path, step: int) -> float | None:
    """Bits per byte of a step's own evaluation, else of the last one before it was saved; None if there was none."""
    for name in (EVALUATED_FILE, META_FILE):
        with contextlib.suppress(FileNotFoundError, ValueError, AttributeError):
            bpb = json.loads(_read(step_folder(root, step), name)).get("val_bpb")
            if isinstance(bpb, int | float):
                return float(bpb)
    return None


def prune(root: Path, keep_last: int, guard: Guard = nullcontext) -> None:
    """Remove all checkpoints older than the newest `keep_last` except the best.

    Counted are those that have all files of their manifest. The best has the lowest bits per byte, the earliest of
    equals, for it is the nearest to its evaluation.
    """
    whole = _whole_steps(root)
    if len(whole) <= keep_last:
        return
    best = _best_first(root, whole)[:1]
    doomed = [step for step in saved_steps(root) if step < whole[-keep_last] and step not in best]
    _remove(root, doomed, guard)


def drop_after(root: Path, step: int) -> None:
    """Remove the checkpoints of later steps, so that `step`, which must verify, is the one to go on from."""
    open_checkpoint(root, step)
    _remove(root, [later for later in saved_steps(root) if later > step])


def sweep(root: Path) -> None:
    """Remove what writers that were killed left half-written."""
    for leftover in _abandoned(root):
        shutil.rmtree(leftover, ignore_errors=True)


def _abandoned(root: Path) -> list[Path]:
    """Hidden folders that nobody works on. A pull is any reader's business, so what one has just written is left."""
    found = []
    for path in root.glob(".step_*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if _PULLED not in path.name or time.time() - path.stat().st_mtime > ABANDONED_S:
                found.append(path)
    return found


def _hidden(folder: Path, what: str = "") -> Path:
    """A name beside a checkpoint that readers do not look at, and that no other process takes."""
    return folder.with_name(f".{folder.name}{what}.{uuid.uuid4().hex}.tmp")


def _remove(root: Path, steps: list[int], guard: Guard = nullcontext) -> None:
    """Remove checkpoints so that a reader sees each of them whole or not at all."""
    folders = [step_folder(root, step) for step in steps]
    if (remote := Remote.of(root)) is not None:
        for folder in folders:
            with guard():
                remote.delete(folder / MANIFEST_FILE)
                remote.delete(folder)
        left = set(saved_steps(root))
        here = os.listdir(root) if root.is_dir() else []
        folders = [root / n for n in here if (m := _STEP_FOLDER.fullmatch(n)) and int(m[1]) not in left]
    with guard():
        hidden = [_hide(folder) for folder in folders if folder.exists()]
    for path in hidden:
        shutil.rmtree(path, ignore_errors=True)


def _hide(folder: Path) -> Path:
    """Rename a checkpoint to a name that readers do not look at."""
    hidden = _hidden(folder)
    os.rename(folder, hidden)
    return hidden


def _push(remote: Remote, folder: Path, guard: Guard) -> None:
    manifest = _read_manifest(folder)
    for name in manifest.files:
        remote.patient().push(folder / name, to=manifest.place(name))
    with guard():
        remote.push(folder / MANIFEST_FILE)


# --- reading -----------------------------------------------------------------------------------------------------


def open_checkpoint(root: Path, step: int, beat: Callable[[], None] = lambda: None) -> Checkpoint:
    """The checkpoint of a step, pulled first if it is in a store; `beat` is called again and again meanwhile.

    Raises FileNotFoundError if there is none, CorruptCheckpointError if a file is missing or differs from the manifest.
    """
    folder = step_folder(root, step)
    remote = Remote.of(root)
    try:
        if remote is not None:
            return _pull(remote.patient(), folder, step, beat)
        return _verified(folder, step, beat)
    except CorruptCheckpointError:
        if remote is None and not folder.is_dir():
            raise FileNotFoundError(
                f"no checkpoint of step {step} in {root}; there are {saved_steps(root) or 'none'}"
            ) from None
        raise


def _verified(folder: Path, step: int, beat: Callable[[], None]) -> Checkpoint:
    try:
        for name, entry in _read_manifest(folder).files.items():
            beat()
            path = folder / name
            if path.stat().st_size != entry["bytes"] or file_hash(path) != entry["sha256"]:
                raise CorruptCheckpointError(f"{path} does not match its manifest")
        meta = json.loads((folder / META_FILE).read_text())
        if meta["step"] != step:
            raise CorruptCheckpointError(f"{folder} holds the checkpoint of step {meta['step']}")
    except CorruptCheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(f"checkpoint {folder} is incomplete: {error!r}") from error
    return Checkpoint(folder, step, meta)


def _pull(remote: Remote, folder: Path, step: int, beat: Callable[[], None]) -> Checkpoint:
    """The checkpoint from the store, or the copy that is here already if it is the same; one process at a time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / PULL_LOCK_FILE, PULL_LOCK_WAIT_S, beat):
        stored = remote.read(folder / MANIFEST_FILE)
        if stored is None:
            steps = saved_steps(folder.parent)
            what = "the push of this one was not finished" if step in steps else f"there are {steps or 'none'}"
            raise FileNotFoundError(f"no checkpoint of step {step} in {shown(folder.parent)}; {what}")
        with contextlib.suppress(FileNotFoundError, CorruptCheckpointError):
            if (folder / MANIFEST_FILE).read_bytes() == stored:
                return _verified(folder, step, beat)
        manifest, temporary = _parse_manifest(stored, folder), _hidden(folder, _PULLED)
        try:
            temporary.mkdir()
            (temporary / MANIFEST_FILE).write_bytes(stored)
            for name in manifest.files:
                beat()
                if not remote.pull(manifest.place(name), temporary / name):
                    raise CorruptCheckpointError(f"checkpoint {shown(folder)} is incomplete: no {name}")
            remote.pull(manifest.place(EVALUATED_FILE), temporary / EVALUATED_FILE)
            _verified(temporary, step, beat)
            if folder.exists():
                shutil.rmtree(_hide(folder), ignore_errors=True)
            os.rename(temporary, folder)
        except CorruptCheckpointError as error:
            raise CorruptCheckpointError(f"in {shown(folder)}: {error}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return _verified(folder, step, beat)


def latest_checkpoint(root: Path, beat: Callable[[], None] = lambda: None) -> Checkpoint | None:
    """The newest checkpoint that verifies; a corrupt one is passed over with a warning that names it."""
    passed: set[int] = set()
    while steps := [step for step in saved_steps(root) if step not in passed]:
        try:
            return open_checkpoint(root, steps[-1], beat)
        except CorruptCheckpointError as error:
            logger.warning("passed over: %s", error)
        except FileNotFoundError as error:  # removed since it was listed, or its push was not finished
            logger.info("passed over: %s", error)
        passed.add(steps[-1])
    return None


def best_checkpoint(root: Path) -> Checkpoint | None:
    """The checkpoint with the lowest bits per byte that verifies, None if no evaluation is known of any."""
    for step in _best_first(root, _whole_steps(root)):
        try:
            return open_checkpoint(root, step)
        except (CorruptCheckpointError, FileNotFoundError) as error:
            logger.warning("passed over: %s", error)
    return None


def resolve_checkpoint(root: Path, step: int | None) -> Checkpoint:
    """The checkpoint of `step`, or the newest that verifies; FileNotFoundError if there is none."""
    found = latest_checkpoint(root) if step is None else open_checkpoint(root, step)
    if found is None:
        raise FileNotFoundError(f"no checkpoint in {shown(root)}; train the stage first")
    return found


def _best_first(root: Path, steps: list[int]) -> list[int]:
    bpb = {step: known_bpb(root, step) for step in steps}
    return [step for _, step in sorted((value, step) for step, value in bpb.items() if value is not None)]


def _whole_steps(root: Path) -> list[int]:
    """Steps whose files are all there with the right sizes, ascending; contents are not looked at."""
    return [step for step in saved_steps(root) if _looks_whole(step_folder(root, step))]


def _looks_whole(folder: Path) -> bool:
    try:
        if (remote := Remote.of(folder)) is not None:
            manifest = _parse_manifest(_read(folder, MANIFEST_FILE), folder)
            there = remote.patient().listing(folder)
            sizes = {name: there[manifest.place(name).name].size_bytes for name in manifest.files}
        else:
            manifest = _read_manifest(folder)
            sizes = {name: (folder / name).stat().st_size for name in manifest.files}
    except (FileNotFoundError, NotADirectoryError, KeyError, ValueError):  # such as a name with a null byte
        return False
    return all(sizes[name] == entry["bytes"] for name, entry in manifest.files.items())


def _read(folder: Path, name: str) -> bytes:
    """A small file of a checkpoint, from the store if there is one; FileNotFoundError if it is not there."""
    if (remote := Remote.of(folder)) is None:
        return (folder / name).read_bytes()
    path = folder / name if name == MANIFEST_FILE else _parse_manifest(_read(folder, MANIFEST_FILE), folder).place(name)
    data = remote.patient().read(path)
    if data is None:
        raise FileNotFoundError(f"no {shown(path)}")
    return data


def _read_manifest(folder: Path) -> _Manifest:
    return _parse_manifest((folder / MANIFEST_FILE).read_bytes(), folder)


def _parse_manifest(data: bytes, folder: Path) -> _Manifest:
    """CorruptCheckpointError unless it lists plain names, weights and meta among them."""
    try:
        value = json.loads(data)
        files, mark = value["files"], value.get("mark", "")
        plain = all(name == Path(name).name and name not in ("", "..") for name in (*files, f"{mark}x"))
        full = all(isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str) for entry in files.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(f"the manifest of {folder} cannot be read: {error!r}") from error
    if not (plain and full and {MODEL_FILE, META_FILE} <= files.keys()):
        raise CorruptCheckpointError(
            f"the manifest of {folder} lists {sorted(files)[:5]}; it needs plain names, {MODEL_FILE} and {META_FILE}"
        )
    return _Manifest(folder, files, mark)


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Reading and writing torch's `.pt` archives as tensors and nothing else.

`torch.load(weights_only=True)` reads a pickle with a machine of its own that knows the functions tensors are rebuilt
with and refuses every other name; it checks each storage against the size of its record. Before it the archive is
looked at: a plain zip from its first byte, nothing compressed, a small pickle, so that no short file can ask for much
memory. What comes out is checked again: a dict of names to dense tensors on the CPU, together no larger than the file.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

MAX_PICKLE_BYTES = 16 << 20  # of names and shapes; those of 10,000 tensors take 2 MB
MAX_ENTRIES = 1 << 17
ZIP_BEGINS = b"PK\x03\x04"
_REFUSED_NAME = re.compile(r"GLOBAL ([\w.]+)")


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The state dict in a `.pt` file, which has this hash if one is given.

    ValueError that names the file if it holds anything else, or has another hash.
    """
    found = _load(path, sha256)
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds a {type(found).__name__}, not tensors by name")
    tensors: dict[str, Tensor] = {}
    for name, value in found.items():
        if not isinstance(name, str) or not _is_plain(value):
            raise ValueError(f"{path}: {str(name)[:100]!r} is no dense tensor but {_describe(value)}")
        tensors[name] = value.detach()
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if n_bytes > path.stat().st_size:  # one storage under many names, of which each would get its own copy
        raise ValueError(f"{path}: its tensors have {n_bytes:,} bytes, more than the file")
    return tensors


def read_tensor(path: Path) -> Tensor:
    """The one tensor in a `.pt` file. ValueError that names the file if it holds anything else."""
    found = _load(path)
    if not _is_plain(found):
        raise ValueError(f"{path} holds {_describe(found)}, not one dense tensor")
    return found.detach()


def write_pt(path: Path, value: Tensor | Mapping[str, Tensor]) -> None:
    """Write a tensor, or tensors by name, as a `.pt` file, whole or not at all. OSError if it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:  # torch's own, on top of the full disk's
        raise OSError(f"{path} could not be written: {error.__context__ or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _load(path: Path, sha256: str | None = None) -> Any:
    with open(path, "rb") as file:  # once, so that what is looked at is what is read
        if sha256 is not None and hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise ValueError(f"{path} was changed while it was read")
        _check_archive(path, file)
        file.seek(0)
        return _read(path, file)


def _read(path: Path, file: BinaryIO) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises many kinds; its text may advise to read the file unsafely
        named = _REFUSED_NAME.search(str(error))
        why = f"it names {named[1]}" if named else type(error).__name__
        raise ValueError(f"{path} holds something else than tensors, or is damaged ({why})") from None


def _check_archive(path: Path, file: BinaryIO) -> None:
    """ValueError unless the file is a zip archive as torch writes it."""
    try:
        file.seek(0)
        if file.read(len(ZIP_BEGINS)) != ZIP_BEGINS:  # by which torch tells its kinds of files apart; a zip may end one
            raise ValueError("it does not begin as one")
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if archive.comment or min((entry.header_offset for entry in entries), default=0):
                raise ValueError("something stands before or behind the archive")
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        raise ValueError(
            f"{path} is no whole torch archive ({error}); it may be cut off, or from torch before 1.6"
        ) from None
    pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ValueError(f"{path}: {packed[0][:100]!r} is compressed, which torch does not do")
    if len(entries) > MAX_ENTRIES or sum(entry.file_size for entry in entries) > os.fstat(file.fileno()).st_size:
        raise ValueError(f"{path}: its {len(entries)} entries say that they are larger than the file")
    if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
        sizes = [(entry.filename[:100], entry.file_size) for entry in pickles[:5]]
        raise ValueError(f"{path}: one list of tensors of at most {MAX_PICKLE_BYTES:,} bytes is needed, not {sizes}")


def _is_plain(value: Any) -> bool:
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_complex()
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()  # not one number shown many times
    )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {type(value).__name__} of {value.layout}, {value.dtype}, {tuple(value.shape)}, on {value.device}"
    return f"a {type(value).__name__}"

"""A file that is on its way: its temporary name, its lock, and the note that lets another process go on with it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from nanochat_ray.corpus.source import DownloadError, Version

CHUNK_BYTES = 1 << 18
LOCK_POLL_S = 0.2
LOCK_WAIT_S = 1800.0  # for another process that fetches the same file


class Part:
    """A file under its temporary name, with a note of which version of which address it is a part of.

    Whoever writes it holds its lock, which ends with the process. A part without a fitting note is worthless.
    """

    def __init__(self, path: Path, address: str, file: BinaryIO):
        self.path, self.address = path, address
        self.part, self.note = _names(path)
        self._file = file
        self._digest: Any = hashlib.sha256()
        self.size_bytes = 0
        self.version = self._read_note()
        if self.version is None:
            self._file.truncate(0)
            return
        file.seek(0)
        while chunk := file.read(CHUNK_BYTES):
            self._digest.update(chunk)
            self.size_bytes += len(chunk)

    @staticmethod
    @contextlib.contextmanager
    def locked(path: Path, address: str) -> Iterator[Part]:
        """The part of the file that is to lie at `path`, once no other process writes it."""
        part, _ = _names(path)
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            with open(part, "a+b") as file:
                if _lock(file):
                    if _is(part, file):
                        yield Part(path, address, file)
                        return
                    continue  # the one before has just given it its name
            if time.monotonic() > deadline:
                raise DownloadError(f"{address}: another process has been fetching it to {path} for {LOCK_WAIT_S:g} s")
            time.sleep(LOCK_POLL_S)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    @property
    def validator(self) -> str | None:
        return self.version.validator if self.version else None

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing by what the source said of its size."""
        return self.version is not None and self.size_bytes == self.version.size_bytes

    def append(self, chunk: bytes) -> None:
        self._file.write(chunk)  # opened for appending
        self._digest.update(chunk)
        self.size_bytes += len(chunk)

    def restart(self, version: Version | None) -> None:
        """Empty the part and note which version comes now."""
        self._file.truncate(0)
        self._digest, self.size_bytes, self.version = hashlib.sha256(), 0, version
        if version is None or version.validator is None:
            self.note.unlink(missing_ok=True)
        else:
            self.note.write_text(json.dumps({"address": self.address, **asdict(version)}))

    def flush(self) -> None:
        self._file.flush()

    def commit(self) -> None:
        """Give the whole file its name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self.part, self.path)
        self.note.unlink(missing_ok=True)

    def leave(self) -> None:
        """Keep what another try can go on with, and nothing else."""
        with contextlib.suppress(OSError):
            self._file.flush()
        if not self.size_bytes or self.validator is None:
            self.discard()

    def discard(self) -> None:
        self.part.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def _read_note(self) -> Version | None:
        # the process before may have died while it wrote the note
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            note = json.loads(self.note.read_text())
            if note.pop("address") == self.address:
                return Version(**note)
        return None


def _names(path: Path) -> tuple[Path, Path]:
    return path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.part.json")


def _lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is(path: Path, file: BinaryIO) -> bool:
    """Whether the open file still has this name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False

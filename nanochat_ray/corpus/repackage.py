"""Any data set of documents, written as data shards: parquet with one text column, row groups of 1,024, zstd.

The first `val_docs` documents become the last shard, for validation; all others fill the training shards. Each one is
written exactly once, also those of the last, smaller row groups. The folder appears as a whole, with a record of sizes
and SHA-256; what a killed process left is removed by the next one.

Reading is a plain stream in one process, not Ray Data: where a shard ends depends on all documents before it.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import io
import itertools
import json
import logging
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_ray.corpus.download import Fetched, file_sha256
from nanochat_ray.corpus.shards import write_checksums
from nanochat_ray.corpus.source import file_system

logger = logging.getLogger(__name__)

ROW_GROUP_DOCS = 1024
ZSTD_LEVEL = 3
SCHEMA = pa.schema([("text", pa.string())])
ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")
LOCK_FILE = ".lock"
READ_DOCS = 256  # documents of a parquet file in memory at a time


@dataclass(frozen=True)
class Repackaged:
    """What was written."""

    folder: Path
    documents: int
    characters: int
    empty: int  # documents without a character; they are written too
    shards: int  # the validation shard included


# --- reading -----------------------------------------------------------------------------------------------------


def find_files(source: str, pattern: str = "*") -> list[tuple[str, Any]]:
    """The files below a folder or URI that hold documents, in order of path, each with its file system.

    `pattern` is compared with the path below the folder and with the file's name. Raises FileNotFoundError.
    """
    from pyarrow import fs

    system, root = file_system(source)
    info = system.get_file_info(root)
    if info.type == fs.FileType.NotFound:
        raise FileNotFoundError(f"data {source} does not exist")
    infos = [info] if info.is_file else system.get_file_info(fs.FileSelector(root, recursive=True))
    root = root.rpartition("/")[0] if info.is_file else root
    found = []
    for file in sorted(infos, key=lambda file: file.path):
        below = file.path[len(root) :].lstrip("/")
        is_hidden = any(part.startswith(".") for part in below.split("/"))
        matches = fnmatch.fnmatch(below, pattern) or fnmatch.fnmatch(file.base_name, pattern)
        if file.is_file and matches and not is_hidden and file.path.endswith(ENDINGS):
            found.append((file.path, system))
    if not found:
        raise FileNotFoundError(f"data {source} has no {', '.join(ENDINGS)} file whose name is like {pattern!r}")
    return found


def read_documents(source: str, text_column: str = "text", pattern: str = "*") -> Iterator[str]:
    """Every document once, in order of file and place in it. A missing value is an empty document.

    A text file is one document; a line of a JSON lines file is one, in the key `text_column`. Raises ValueError naming
    file and place for what is no text.
    """
    for path, system in find_files(source, pattern):
        try:
            if path.endswith(".parquet"):
                yield from _parquet(path, system, text_column)
            elif path.endswith(".txt"):
                with system.open_input_stream(path) as stream:
                    yield stream.read().decode("utf-8-sig")
            else:
                yield from _json_lines(path, system, text_column)
        except (pa.ArrowInvalid, UnicodeDecodeError, OSError) as error:  # pyarrow has both for broken files
            raise ValueError(f"{path} cannot be read: {error}") from error


def _parquet(path: str, system: Any, text_column: str) -> Iterator[str]:
    with system.open_input_file(path) as stream, pq.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20) as file:
        schema = file.schema_arrow
        if text_column not in schema.names:
            raise ValueError(f"{path} has no column {text_column!r}; its columns are {schema.names}")
        kind = schema.field(text_column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise ValueError(f"column {text_column!r} of {path} holds {kind}, not text")
        for batch in file.iter_batches(READ_DOCS, columns=[text_column], use_threads=False):
            for value in batch.column(0).to_pylist():
                yield value or ""


def _json_lines(path: str, system: Any, text_column: str) -> Iterator[str]:
    with system.open_input_stream(path, compression=_compression(path)) as stream:
        lines = io.TextIOWrapper(io.BufferedReader(stream, 1 << 20), encoding="utf-8-sig", newline="\n")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict) or text_column not in row:
                known = f"its keys are {sorted(row)}" if isinstance(row, dict) else f"it is a {type(row).__name__}"
                raise ValueError(f"{path}, line {number}: no key {text_column!r}; {known}")
            value = row[text_column]
            if not isinstance(value, str | None):
                raise ValueError(f"{path}, line {number}: {text_column!r} holds {json.dumps(value)[:40]}, not text")
            yield value or ""


def _compression(path: str) -> str | None:
    return {".gz": "gzip", ".zst": "zstd"}.get(Path(path).suffix)


def shuffled(documents: Iterator[str], seed: int, scratch: Path) -> Iterator[str]:
    """All documents in the order of `datasets.Dataset.shuffle(seed)`, the one of the published sets.

    They are laid down in a file in `scratch` and read from there one by one; in memory are 16 bytes of each.
    """
    offsets = array("Q", [0])
    with tempfile.TemporaryFile(dir=scratch) as file:
        for document in documents:
            offsets.append(offsets[-1] + file.write(document.encode("utf-8", "surrogatepass")))
        file.flush()
        for i in np.random.default_rng(seed).permutation(len(offsets) - 1):
            start, stop = offsets[i], offsets[i + 1]
            yield os.pread(file.fileno(), stop - start, start).decode("utf-8", "surrogatepass")


# --- writing -----------------------------------------------------------------------------------------------------


class _Shard:
    """One shard under way: documents are written by the row group."""

    def __init__(self, path: Path):
        self.path = path
        self.documents = self.characters = 0
        self._group: list[str] = []
        self._writer = pq.ParquetWriter(
            path, SCHEMA, compression="zstd", compression_level=ZSTD_LEVEL, use_dictionary=False, write_statistics=False
        )

    def add(self, document: str) -> None:
        self._group.append(document)
        self.documents += 1
        self.characters += len(document)
        if len(self._group) == ROW_GROUP_DOCS:
            self._write_group()

    @property
    def is_at_border(self) -> bool:
        """Whether all documents are in whole row groups."""
        return not self._group

    def _write_group(self) -> None:
        table = pa.table({"text": pa.array(self._group, pa.string())}, schema=SCHEMA)
        self._writer.write_table(table, row_group_size=ROW_GROUP_DOCS)
        self._group = []

    def close(self) -> Fetched:
        if self._group:
            self._write_group()
        self._writer.close()
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
        return Fetched(self.path.stat().st_size, file_sha256(self.path))


def repackage(
    source: str,
    folder: Path,
    text_column: str = "text",
    pattern: str = "*",
    chars_per_shard: float = 2.5e8,
    val_docs: int = 10_240,
    seed: int | None = None,
) -> Repackaged:
    """Write the documents of `source` as shards into `folder`, which must not be there.

    Raises FileExistsError if it is, FileNotFoundError and ValueError for a source that cannot be read or holds no more
    than `val_docs` documents.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; remove it or name another folder")
    find_files(source, pattern)  # before anything is made
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _work_folder(folder) as work:
        documents = read_documents(source, text_column, pattern)
        if seed is not None:
            documents = shuffled(documents, seed, work)
        result = _write(map(_without_lone_surrogates, documents), work, folder, chars_per_shard, val_docs, source, seed)
    return result


def _write(
    documents: Iterator[str], work: Path, folder: Path, chars_per_shard: float, val_docs: int, source: str,
    seed: int | None,
) -> Repackaged:
    files: dict[str, Fetched] = {}
    totals = {"documents": 0, "characters": 0, "empty": 0}

    def finish(shard: _Shard, name: str) -> None:
        files[name] = shard.close()
        os.replace(shard.path, work / name)
        totals["documents"] += shard.documents
        totals["characters"] += shard.characters
        logger.info(
            "%s: %s documents, %s characters, %.1f MB", name, f"{shard.documents:,}", f"{shard.characters:,}",
            files[name].size_bytes / 1e6,
        )

    def counted() -> Iterator[str]:
        for document in documents:
            totals["empty"] += not document
            yield document

    stream = counted()
    val = _Shard(work / "val.tmp")
    for document in itertools.islice(stream, val_docs):
        val.add(document)
    shard: _Shard | None = None
    for document in stream:
        if shard is None:
            shard = _Shard(work / "train.tmp")
        shard.add(document)
        if shard.characters >= chars_per_shard and shard.is_at_border:
            finish(shard, _name(len(files)))
            shard = None
    if shard is not None:
        finish(shard, _name(len(files)))
    if not files:
        raise ValueError(
            f"{source} holds {val.documents} documents and validation takes {val_docs}: none is left to train on; "
            "give a smaller --val-docs"
        )
    finish(val, _name(len(files)))
    write_checksums(
        work, files, source=source, seed=seed, row_group_docs=ROW_GROUP_DOCS, val_shard=_name(len(files) - 1), **totals
    )
    return Repackaged(folder, totals["documents"], totals["characters"], totals["empty"], len(files))


def _name(index: int) -> str:
    return f"shard_{index:05d}.parquet"


@contextlib.contextmanager
def _work_folder(folder: Path) -> Iterator[Path]:
    """A folder of temporary name that becomes `folder` at the end, and is gone if that is not reached.

    One process holds it; what a killed one left in it is removed.
    """
    work = folder.with_name(f".{folder.name}.repackaging")
    work.mkdir(exist_ok=True)
    with open(work / LOCK_FILE, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"{folder} is being written by another process") from None
        if folder.exists():  # that other process has just finished
            raise FileExistsError(f"{folder} is there already")
        for path in work.iterdir():
            if path.name != LOCK_FILE:
                path.unlink()
        try:
            yield work
            os.rename(work, folder)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        (folder / LOCK_FILE).unlink()


def _without_lone_surrogates(text: str) -> str:
    """JSON can spell half a character; parquet cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text

"""Plain reading of parquet shards, from a local folder or any URI that pyarrow knows, and rows packed from them.

A manifest is made once, by the driver, and handed to every process: nobody lists the folder a second time.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate, chain, count, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from nanochat_ray.corpus.items import WorkItem
from nanochat_ray.messages import PackedRows
from nanochat_ray.text.packing import pack_documents, pack_stream, reference_rows
from nanochat_ray.text.tokenizer import Tokenizer

Split = Literal["train", "val"]
Packing = Literal["best-fit", "stream"]
VALIDATION_BUFFER = 1000  # documents, and
NAMED_CHANGES = 10  # shards named in an error
VALIDATION_SLICE = 128  # documents per refill: the constants of nanochat's loader, which validation keeps


@dataclass(frozen=True)
class ShardInfo:
    """One parquet file."""

    name: str
    path: str  # within the file system of the manifest's source
    bytes: int
    row_groups: int
    rows: int


@dataclass(frozen=True)
class DataManifest:
    """A data set as it was found, with its validation shard pinned by name."""

    source: str
    text_column: str
    train: tuple[ShardInfo, ...]
    val: ShardInfo
    skip_corrupt: bool = False
    skipped: tuple[str, ...] = ()  # corrupt shards left out, by name

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> DataManifest:
        train = tuple(ShardInfo(**shard) for shard in data["train"])
        parts = {"train": train, "val": ShardInfo(**data["val"]), "skipped": tuple(data["skipped"])}
        return DataManifest(**{**data, **parts})

    @cached_property
    def hash(self) -> str:
        """SHA-256 of what decides the documents; the place where they lie does not."""
        shards = [[shard.name, shard.bytes, shard.row_groups, shard.rows] for shard in (*self.train, self.val)]
        return hashlib.sha256(json.dumps([self.text_column, self.skip_corrupt, shards]).encode()).hexdigest()

    def check(self) -> None:
        """Raise ValueError that names the shards which are not what they were when the manifest was made."""
        changed = changed_shards(self)
        if changed:
            rest = f"\n  and {len(changed) - NAMED_CHANGES} more" if len(changed) > NAMED_CHANGES else ""
            raise ValueError(
                f"the data in {self.source} has changed since this run pinned it:\n  "
                + "\n  ".join(changed[:NAMED_CHANGES]) + rest
                + "\nBring those files back, or start a new run (another --model-tag)."
            )

    @property
    def n_items(self) -> int:
        return self._first_items[-1]

    def item(self, index: int) -> WorkItem:
        """Work item number `index`, counted through the shards in order."""
        shard = bisect_right(self._first_items, index) - 1
        return WorkItem(shard, index - self._first_items[shard])

    @cached_property
    def _first_items(self) -> list[int]:
        return [0, *accumulate(shard.row_groups for shard in self.train)]


def scan_data(
    source: str,
    text_column: str = "text",
    val_shard: str | None = None,
    skip_corrupt: bool = False,
    max_shards: int | None = None,
) -> DataManifest:
    """Look at every parquet shard in `source` (a folder or a URI) and say what is there.

    Validation is the shard named `val_shard`, or the last by name; training is all others in order of name, or the
    first `max_shards` of them. Raises FileNotFoundError if folder, shards or the validation shard are missing, and
    ValueError for a single shard, a shard without the text column, a split without documents or a corrupt shard. With
    `skip_corrupt` a corrupt training shard is warned about, listed in the manifest and left out.
    """
    system, files = _list_shards(source)
    by_name = {file.base_name: file for file in files}
    names = sorted(by_name)
    if val_shard is None:
        val_shard = names[-1]
    elif val_shard not in by_name:
        nearest = difflib.get_close_matches(val_shard, names, n=1, cutoff=0.0)[0]
        raise FileNotFoundError(f"validation shard {val_shard!r} is not in {source}; the nearest name is {nearest!r}")
    train_names = [name for name in names if name != val_shard][:max_shards]
    if not train_names:
        raise ValueError(
            f"{source} holds the one shard {val_shard!r}: one shard is for validation, so training needs a second one"
        )
    with ThreadPoolExecutor(16) as pool:  # a remote footer costs a round trip
        wanted = [by_name[name] for name in (*train_names, val_shard)]
        looked_at = list(pool.map(lambda file: _look_at(system, file, text_column), wanted))
    for name, info in zip(train_names, looked_at, strict=False):
        if isinstance(info, CorruptShard):
            if not skip_corrupt:
                raise ValueError(f"{info}; fetch it again, or leave it out with --skip-corrupt")
            warnings.warn(f"data shard {name} is left out: {info}", stacklevel=2)
    val = looked_at[-1]
    if isinstance(val, CorruptShard):
        raise ValueError(f"{val}; it is the validation shard: fetch it again, or name another with --val-shard")
    train = tuple(info for info in looked_at[:-1] if isinstance(info, ShardInfo))
    skipped = tuple(name for name, info in zip(train_names, looked_at, strict=False) if isinstance(info, CorruptShard))
    if not sum(shard.rows for shard in train):
        raise ValueError(f"the training shards of {source} hold no documents: {', '.join(train_names[:5])}")
    if not val.rows:
        raise ValueError(f"validation shard {val.name} of {source} holds no documents")
    return DataManifest(source, text_column, train, val, skip_corrupt, skipped)


def changed_shards(manifest: DataManifest) -> list[str]:
    """What differs between the manifest and the files that lie there now, one line a shard: name and difference.

    Compares sizes, and numbers of row groups and documents; it reads no page. Other files in the folder do not matter.
    """
    system, _ = _file_system(manifest.source)

    def difference(shard: ShardInfo) -> str | None:
        file = system.get_file_info(shard.path)
        if file.type != fs.FileType.File:
            return f"{shard.name}: missing"
        if file.size != shard.bytes:
            return f"{shard.name}: {file.size:,} bytes, was {shard.bytes:,}"
        try:
            now = _look_at(system, file, manifest.text_column)
        except ValueError as error:  # another column
            return f"{shard.name}: {error}"
        if isinstance(now, CorruptShard):
            return f"{shard.name}: no readable parquet file any more"
        if now != shard:
            was = f"{shard.row_groups} row groups and {shard.rows:,} documents"
            return f"{shard.name}: {now.row_groups} row groups and {now.rows:,} documents, was {was}"
        return None

    with ThreadPoolExecutor(16) as pool:  # a remote footer costs a round trip
        return [line for line in pool.map(difference, (*manifest.train, manifest.val)) if line]


def read_row_group(manifest: DataManifest, item: WorkItem) -> list[str]:
    """The documents of one work item; a missing value is an empty document.

    ValueError naming shard and row group if it is corrupt; with the manifest's `skip_corrupt` a warning and none.
    ConnectionError if a store or server does not give the bytes, whatever `skip_corrupt` says.
    """
    return _read(manifest, manifest.train[item.shard], item.row_group)


def iter_documents(manifest: DataManifest, split: Split) -> Iterator[str]:
    """All documents of a split once, in order of shard, row group and row."""
    for shard in _shards(manifest, split):
        for row_group in range(shard.row_groups):
            yield from _read(manifest, shard, row_group)


def read_slices(manifest: DataManifest, split: Split, slice_size: int = VALIDATION_SLICE) -> Iterator[list[str]]:
    """All documents of a split once, in order, at most `slice_size` at a time and never from two row groups."""
    for shard in _shards(manifest, split):
        for row_group in range(shard.row_groups):
            documents = _read(manifest, shard, row_group)
            for start in range(0, len(documents), slice_size):
                yield documents[start : start + slice_size]


def pack_item(
    manifest: DataManifest, item: WorkItem, tokenizer: Tokenizer, sequence_len: int, packing: Packing = "best-fit",
    num_threads: int = 1,
) -> PackedRows:
    """Read, tokenize and pack one work item into rows of T+1 tokens. Depends on nothing but the arguments."""
    documents = tokenizer.encode_to_arrays(read_row_group(manifest, item), num_threads=num_threads)
    return (pack_stream if packing == "stream" else pack_documents)(documents, sequence_len + 1)


def validation_rows(
    manifest: DataManifest, tokenizer: Tokenizer, sequence_len: int, n_rows: int, split: Split = "val"
) -> PackedRows:
    """The first `n_rows` rows of a split by the reference loader: one fixed set, whoever asks.

    The loader goes round, as nanochat's does. A split with fewer documents than its buffer is gone through only once,
    which may give fewer rows: going round would show the same few documents again and again. ValueError for no row.
    """
    shards = _shards(manifest, split)
    rounds = count() if sum(shard.rows for shard in shards) >= VALIDATION_BUFFER else range(1)
    slices = chain.from_iterable(read_slices(manifest, split) for _ in rounds)
    documents = (tokenizer.encode_to_arrays(texts) for texts in slices)
    rows = list(islice(reference_rows(documents, sequence_len + 1, VALIDATION_BUFFER), n_rows))
    if not rows:
        raise ValueError(
            f"the {split} documents of {manifest.source} do not fill {min(n_rows, 1)} row of {sequence_len + 1} tokens"
        )
    return PackedRows(np.stack(rows))  # (n, T+1)


class CorruptShard(ValueError):
    """A shard that is no readable parquet file."""


def _list_shards(source: str) -> tuple[fs.FileSystem, list[fs.FileInfo]]:
    system, path = _file_system(source)
    info = system.get_file_info(path)
    if info.type != fs.FileType.Directory:
        what = "does not exist" if info.type == fs.FileType.NotFound else "is not a folder"
        raise FileNotFoundError(f"data folder {source} {what}; --data takes a folder or URI of parquet shards")
    files = [file for file in system.get_file_info(fs.FileSelector(path)) if file.type == fs.FileType.File]
    shards = [file for file in files if file.base_name.endswith(".parquet")]
    if not shards:
        raise FileNotFoundError(f"data folder {source} holds no *.parquet shard ({len(files)} other files)")
    return system, shards


def _file_system(source: str) -> tuple[fs.FileSystem, str]:
    if "://" in source:
        return fs.FileSystem.from_uri(source)
    return fs.LocalFileSystem(), str(Path(source).expanduser().resolve())


class _FarFile:
    """A file of a store or server as pyarrow reads it; bytes that do not come are a ConnectionError.

    pyarrow says OSError for a connection that broke as well as for pages that it cannot make sense of. Here the two
    part: a page is corrupt only if its bytes came.
    """

    def __init__(self, system: fs.FileSystem, path: str):
        self._path, self.closed = path, False
        self._file = self._far(lambda: system.open_input_file(path))
        self._size = self._far(self._file.size)

    def read(self, n_bytes: int = -1) -> Any:
        missing = self._size - self._file.tell()
        data = self._far(lambda: self._file.read_buffer(n_bytes))
        if len(data) < (missing if n_bytes < 0 else min(n_bytes, missing)):
            raise ConnectionError(f"data shard {self._path}: only {len(data)} bytes came of {min(n_bytes, missing)}")
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self.closed = True
        self._file.close()

    def _far(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (FileNotFoundError, PermissionError):
            raise
        except OSError as error:
            raise ConnectionError(f"data shard {self._path} did not come: {error}") from error


def _open(system: fs.FileSystem, path: str) -> pa.NativeFile:
    near = system.type_name == "local"
    return system.open_input_file(path) if near else pa.PythonFile(_FarFile(system, path), mode="r")


def _look_at(system: fs.FileSystem, file: fs.FileInfo, text_column: str) -> ShardInfo | CorruptShard:
    try:
        with _open(system, file.path) as stream, pq.ParquetFile(stream) as parquet:
            metadata, schema = parquet.metadata, parquet.schema_arrow
    except ConnectionError:
        raise
    except (pa.ArrowInvalid, OSError) as error:  # pyarrow's word for unreadable pages is OSError
        return CorruptShard(f"data shard {file.path} is not a readable parquet file ({error})")
    if text_column not in schema.names:
        raise ValueError(f"data shard {file.path} has no column {text_column!r}; its columns are {schema.names}")
    kind = schema.field(text_column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"column {text_column!r} of data shard {file.path} holds {kind}, not text")
    return ShardInfo(file.base_name, file.path, file.size, metadata.num_row_groups, metadata.num_rows)


def _shards(manifest: DataManifest, split: Split) -> tuple[ShardInfo, ...]:
    return manifest.train if split == "train" else (manifest.val,)


def _read(manifest: DataManifest, shard: ShardInfo, row_group: int) -> list[str]:
    system, _ = _file_system(manifest.source)
    stream = _open(system, shard.path)  # outside the try: a shard that is gone is never passed over
    try:
        with stream, pq.ParquetFile(stream) as parquet:
            table = parquet.read_row_group(row_group, columns=[manifest.text_column], use_threads=False)
            values = table[manifest.text_column].to_pylist()
    except ConnectionError:
        raise
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        problem = f"row group {row_group} of data shard {shard.path} cannot be read ({error})"
        if not manifest.skip_corrupt or getattr(error, "errno", None):  # a failing disk is no corrupt file
            raise ValueError(f"{problem}; fetch the shard again, or leave such out with --skip-corrupt") from error
        warnings.warn(f"left out: {problem}", stacklevel=2)
        return []
    return [value or "" for value in values]

"""The rows of a published data set, from a folder or from the hub, read lazily and in nanochat's shuffled order.

Where a data set is looked for, first match wins, with D each of `--task-data` and `<storage>/task_data`:

1. plain files: `D/<folder>/<split>` or `D/<folder>/<config>/<split>`, each as `.jsonl`, as `.parquet`, as the parquet
   files `<split>-*.parquet` of a cloned hub repository, or as a folder of parquet or JSONL files; for HumanEval also
   `D/human_eval/HumanEval.jsonl`. Folders: arc/ARC-Easy, arc/ARC-Challenge, mmlu, gsm8k, human_eval, smoltalk.
2. the hub cache: `D/<repo with -- for />/<config>/<split>/00000.parquet ...` with a `manifest.json` written last.
3. the hub, if there is a network: into the hub cache below the storage (HF_TOKEN and HF_ENDPOINT are respected).
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from nanochat_ray.corpus.download import DownloadError, fetch, fetch_json, why_unreachable
from nanochat_ray.run_dir import read_json, write_json

SHUFFLE_SEED = 42
HUB = "https://huggingface.co"
MANIFEST = "manifest.json"
SCAN_BYTES = 1 << 24
FileIdentity: TypeAlias = tuple[tuple[str, int, int], ...]  # name, bytes and time of change of each file


class TaskDataMissing(FileNotFoundError):
    """A task's data is neither on the disk nor to be had."""


@dataclass(frozen=True)
class TaskSources:
    """The folders in which task data lies. Downloads go below the storage."""

    task_data: Path | None = None
    storage: Path | None = None

    @property
    def folders(self) -> list[Path]:
        own = [self.storage / "task_data"] if self.storage else []
        return list(dict.fromkeys(([self.task_data] if self.task_data else []) + own))

    @property
    def download_folder(self) -> Path | None:
        return self.storage / "task_data" if self.storage else None


@dataclass(frozen=True)
class DataSet:
    """One split of a data set on the hub, and its names on the disk."""

    folder: str
    repo: str
    config: str
    split: str
    local_file: str | None = None  # another name that is known for it

    @property
    def hub_folder(self) -> str:
        return f"{self.repo.replace('/', '--')}/{self.config}/{self.split}"


class Rows(Protocol):
    """Rows by number, each a dict of plain Python values."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> dict[str, Any]: ...


class JsonlRows:
    """The values of a JSONL file, one parsed at a time; blank lines are no rows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            empty = os.fstat(file.fileno()).st_size == 0  # an empty file cannot be mapped
            self.bytes: mmap.mmap | bytes = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        breaks = [np.flatnonzero(piece == ord("\n")) + offset for offset, piece in self._pieces()]
        ends = np.concatenate([*breaks, [len(self.bytes)]]).astype(np.int64)  # (lines,)
        starts = np.concatenate([[0], ends[:-1] + 1])  # (lines,)
        spans = zip(starts.tolist(), ends.tolist(), strict=True)
        filled = np.array([bool(self.bytes[start:end].strip()) for start, end in spans])
        self.starts, self.ends = starts[filled], ends[filled]  # (n,) bytes
        self.numbers = np.flatnonzero(filled) + 1  # (n,) line numbers, from 1

    def __reduce__(self) -> tuple[Any, ...]:
        return JsonlRows, (self.path,)

    def _pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        for offset in range(0, len(self.bytes), SCAN_BYTES):
            yield offset, np.frombuffer(self.bytes[offset : offset + SCAN_BYTES], dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> Any:
        """The value in line i. ValueError with file and line number if it is no JSON."""
        try:
            return json.loads(self.bytes[self.starts[i] : self.ends[i]])
        except ValueError as error:
            raise ValueError(f"{self.path}, line {self.numbers[i]}: not JSON ({error})") from error


class ArrowRows:
    """The rows of a table. It may be larger than memory if it is a mapped file."""

    def __init__(self, table: pa.Table) -> None:
        self.batches = table.to_batches()
        self.ends = np.cumsum([len(batch) for batch in self.batches], dtype=np.int64)  # (batches,)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, i: int) -> dict[str, Any]:
        batch = int(np.searchsorted(self.ends, i, side="right"))
        first = int(self.ends[batch - 1]) if batch else 0
        row: dict[str, Any] = self.batches[batch].slice(i - first, 1).to_pylist()[0]
        return row


class JoinedRows:
    """Several files' rows, one file after another."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])  # (parts,)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> dict[str, Any]:
        part = int(np.searchsorted(self.ends, i, side="right"))
        return self.parts[part][i - (int(self.ends[part - 1]) if part else 0)]


class ShuffledRows:
    """Rows in the order of `datasets.Dataset.shuffle(seed=42)`, which is nanochat's. Pickled as its files' names."""

    def __init__(self, identity: FileIdentity, scratch: Path | None) -> None:
        self.source = identity, scratch
        self.rows = _read(identity, scratch)
        self.order = permutation(len(self.rows))  # (n,) row i of the shuffled data stands at order[i]

    def __reduce__(self) -> tuple[Any, ...]:
        return open_once, self.source

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.rows[int(self.order[i])]


def permutation(n: int) -> np.ndarray:
    """Row order of n shuffled rows. (n,) int64."""
    return np.random.default_rng(SHUFFLE_SEED).permutation(n)


def permutation_sha256(n: int) -> str:
    return hashlib.sha256(permutation(n).astype("<i8").tobytes()).hexdigest()


def open_rows(data: DataSet, sources: TaskSources) -> ShuffledRows:
    """The shuffled rows of a data set. Raises TaskDataMissing with what was looked for and how to provide it."""
    scratch = sources.download_folder
    looked: list[str] = []
    for folder in sources.folders:
        for files in _plain_candidates(data, folder, looked):
            return _open(files, scratch)
        manifest = folder / data.hub_folder / MANIFEST
        looked.append(str(manifest))
        if manifest.exists():
            return _open_cached(manifest, scratch)
    if scratch is None:
        reason = "no storage folder to download to"
    else:
        try:
            return _open_cached(_download(data, scratch / data.hub_folder), scratch)
        except DownloadError as error:
            reason = str(error)
    raise TaskDataMissing(
        f"no data for {data.folder} ({data.config}, {data.split}): "
        f"not found as {', '.join(looked) or 'no folder was named'}; not downloaded: {reason}. "
        f"Put one of these files there, name their folder with --task-data, "
        f"or run once where {HUB} can be reached (hub data set {data.repo})."
    )


def _plain_candidates(data: DataSet, folder: Path, looked: list[str]) -> Iterator[list[Path]]:
    """Lists of files that hold the data set, best first; notes in `looked` what it looked for."""
    if data.local_file:
        looked.append(str(folder / data.local_file))
        if (folder / data.local_file).is_file():
            yield [folder / data.local_file]
    for base in (folder / data.folder, folder / data.folder / data.config):
        looked.append(str(base / f"{data.split}.jsonl|.parquet|-*.parquet|/"))
        for ending in (".jsonl", ".parquet"):
            if (base / f"{data.split}{ending}").is_file():
                yield [base / f"{data.split}{ending}"]
        for pattern in (f"{data.split}-*.parquet", f"{data.split}/*.parquet", f"{data.split}/*.jsonl"):
            if files := sorted(base.glob(pattern)):
                yield files


def _open(files: Sequence[Path], scratch: Path | None) -> ShuffledRows:
    return open_once(tuple((str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files), scratch)


@functools.lru_cache(maxsize=32)
def open_once(identity: FileIdentity, scratch: Path | None) -> ShuffledRows:
    """Files are opened once per process: evaluations inside a training loop come back to them again and again."""
    return ShuffledRows(identity, scratch)


def _read(identity: FileIdentity, scratch: Path | None) -> Rows:
    files = [Path(name) for name, _, _ in identity]
    if files[0].suffix == ".jsonl":
        return JoinedRows([JsonlRows(file) for file in files])
    if scratch is None:
        return ArrowRows(pa.concat_tables([pq.read_table(file) for file in files]))
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    return ArrowRows(_mapped(files, scratch / "arrow" / f"{key}.arrow"))


def _mapped(files: Sequence[Path], arrow_file: Path) -> pa.Table:
    """Parquet files as one memory-mapped Arrow file, made at the first call.

    Shuffled access to parquet decodes a whole row group per row; here a row costs microseconds, and all processes of a
    machine share the pages.
    """
    if not arrow_file.exists():
        arrow_file.parent.mkdir(parents=True, exist_ok=True)
        temporary = arrow_file.with_name(f".{arrow_file.name}.{os.getpid()}.tmp")
        try:
            with ipc.new_file(str(temporary), pq.read_schema(files[0])) as writer:
                for file in files:
                    for batch in pq.ParquetFile(file).iter_batches():
                        writer.write_batch(batch)
            os.replace(temporary, arrow_file)
        finally:
            temporary.unlink(missing_ok=True)
    return ipc.open_file(pa.memory_map(str(arrow_file))).read_all()


def _open_cached(manifest_file: Path, scratch: Path | None) -> ShuffledRows:
    """The data set of a hub cache. Reads also nanochat's manifests, which are plain lists of file names."""
    manifest = read_json(manifest_file)
    entries = [{"name": name} for name in manifest] if isinstance(manifest, list) else manifest["files"]
    files = []
    for entry in entries:
        file = manifest_file.parent / entry["name"]
        if not file.is_file() or file.stat().st_size != entry.get("size_bytes", file.stat().st_size):
            raise TaskDataMissing(f"{file} is not there as {MANIFEST} describes it; delete {manifest_file.parent}")
        files.append(file)
    rows = _open(files, scratch)
    if isinstance(manifest, dict) and manifest["permutation_sha256"] != permutation_sha256(len(rows)):
        raise ValueError(
            f"NumPy {np.__version__} shuffles {len(rows)} rows in another order than the one that made "
            f"{manifest_file}, so train and validation would differ too. Use that NumPy, or delete the folder."
        )
    return rows


def _download(data: DataSet, folder: Path) -> Path:
    """Fetch all parquet files of a data set from the hub; the manifest, written last, says that they are complete."""
    hub = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
    if reason := why_unreachable(hub):  # before anything is made on the disk
        raise DownloadError(f"{hub}: {reason}")
    folder.mkdir(parents=True, exist_ok=True)
    manifest_file = folder / MANIFEST
    with open(folder / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if manifest_file.exists():  # another process was faster
            return manifest_file
        token = os.environ.get("HF_TOKEN")
        urls = fetch_json(f"{hub}/api/datasets/{data.repo}/parquet/{data.config}/{data.split}", token)
        if not urls:
            raise DownloadError(f"{hub} lists no parquet files for {data.repo} {data.config} {data.split}")
        names = [f"{i:05d}.parquet" for i in range(len(urls))]
        fetched = [fetch(url, folder / name, token) for url, name in zip(urls, names, strict=True)]
        n = sum(pq.read_metadata(folder / name).num_rows for name in names)
        files = [{"name": name} | asdict(file) for name, file in zip(names, fetched, strict=True)]
        write_json(
            manifest_file,
            {"repo": data.repo, "config": data.config, "split": data.split, "rows": n, "files": files}
            | {"permutation_sha256": permutation_sha256(n)},
        )
    return manifest_file

"""Sets of data shards: the published ones by name, what lies at any other source, and getting them into a folder.

A folder of fetched shards has a `checksums.json` with each one's size and SHA-256, by which a later call knows what is
whole, and which makes the folder a source that others can verify.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from nanochat_ray.corpus.download import (
    Cancelled,
    DownloadError,
    Fetched,
    Retry,
    fetch,
    fetch_bytes,
    file_sha256,
    why_unreachable,
)
from nanochat_ray.corpus.source import SHA256, file_system, is_http, join_address
from nanochat_ray.run_dir import write_json

logger = logging.getLogger(__name__)

CHARS_PER_SHARD = 2.5e8
CHARS_PER_TOKEN = 4.8  # of the default 32,768-token tokenizer on this text
CROPPED_FRAC = 0.35  # of the tokens read, lost to best-fit packing at T = 2048
CAPPED_FRAC = 0.2  # of the characters, beyond the tokenizer's cap on a document; an upper bound
HUB = "https://huggingface.co"
CHECKSUMS_FILE = "checksums.json"
GIVE_UP_AFTER = 16  # shards in a row that could not be had
STOP_POLL_S = 0.5


@dataclass(frozen=True)
class PublishedSet:
    """A data set published on the hub as numbered parquet shards; the last one is for validation."""

    folder: str  # below the storage
    repo: str
    n_shards: int

    def name(self, index: int) -> str:
        return f"shard_{index:05d}.parquet"

    @property
    def names(self) -> list[str]:
        return [self.name(i) for i in range(self.n_shards)]

    @property
    def val_shard(self) -> str:
        return self.name(self.n_shards - 1)

    @property
    def base_url(self) -> str:
        return f"{os.environ.get('HF_ENDPOINT', HUB).rstrip('/')}/datasets/{self.repo}/resolve/main"


PUBLISHED = {
    "climbmix": PublishedSet("base_data_climbmix", "karpathy/climbmix-400b-shuffle", 6543),
    "fineweb-edu": PublishedSet("base_data_fineweb_edu", "karpathy/fineweb-edu-100b-shuffle", 1823),
}


def shards_needed(training_tokens: int) -> int:
    """Shards that hold at least this many tokens after packing."""
    return math.ceil(training_tokens * CHARS_PER_TOKEN / ((1 - CROPPED_FRAC) * CHARS_PER_SHARD))


def tokenizer_shards(max_chars: int) -> int:
    """Shards that hold at least this many characters after the tokenizer's cap on a document."""
    return math.ceil(max_chars / ((1 - CAPPED_FRAC) * CHARS_PER_SHARD))


@dataclass(frozen=True)
class ShardTask:
    """One shard to be had."""

    address: str
    path: Path
    expected: Fetched | None = None  # what the source or an earlier call says of it
    unreachable: str | None = None  # why the source cannot be asked
    token: str | None = field(default=None, repr=False)
    retry: Retry = field(default_factory=Retry)


@dataclass(frozen=True)
class ShardResult:
    """How it went: `file`, or an `error` in words."""

    name: str
    file: Fetched | None
    was_there: bool = False
    error: str | None = None


Runner = Callable[[Sequence[ShardTask], int, threading.Event], Iterator[ShardResult]]


def get_shard(task: ShardTask, stop: threading.Event | None = None) -> ShardResult:
    """Keep a shard that is there and whole, or fetch it. What cannot be had is told in the result."""
    name = task.path.name
    try:
        kept = _if_whole(task)
        if kept is not None:
            return ShardResult(name, kept, was_there=True)
        if task.unreachable:
            raise DownloadError(f"{task.address}: {task.unreachable}")
        sha256 = task.expected.sha256 if task.expected else None
        fetched = fetch(
            task.address, task.path, task.token, sha256=sha256, check=not_parquet, retry=task.retry, probe=False,
            stop=stop,
        )
        return ShardResult(name, fetched)
    except Cancelled:
        return ShardResult(name, None, error="cancelled")
    except OSError as error:
        return ShardResult(name, None, error=str(error))


def not_parquet(path: Path) -> str | None:
    """Why a file is no whole parquet file, or None."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.read_metadata(path)
    except (pa.ArrowInvalid, OSError) as error:
        return f"it is no whole parquet file ({error})"
    return None


def in_threads(tasks: Sequence[ShardTask], concurrency: int, stop: threading.Event) -> Iterator[ShardResult]:
    """Results as they come, of tasks done by threads of this process."""
    leave = threading.Event()  # the reader may go before the end
    running: set[Future[ShardResult]] = set()
    waiting = iter(tasks)
    with ThreadPoolExecutor(concurrency, thread_name_prefix="download") as pool:
        try:
            while True:
                while len(running) < concurrency and not stop.is_set() and (task := next(waiting, None)):
                    running.add(pool.submit(get_shard, task, leave))
                if not running:
                    return
                done, running = wait(running, STOP_POLL_S, return_when=FIRST_COMPLETED)
                if stop.is_set():
                    leave.set()
                for future in done:
                    yield future.result()
        finally:
            leave.set()


def download(
    source: str,
    names: Sequence[str],
    folder: Path,
    run: Runner = in_threads,
    concurrency: int = 4,
    retry: Retry | None = None,
    checksums: Mapping[str, Fetched] | None = None,
    verify: bool = False,
    stop: threading.Event | None = None,
    on_result: Callable[[ShardResult], None] | None = None,
) -> None:
    """Get these shards of a source into a folder; those that are whole are kept.

    `checksums` are the source's own, if it has any. Raises DownloadError naming the shards that could not be had, after
    all others were.
    """
    stop = stop or threading.Event()
    recorded, tasks = read_checksums(folder), []
    for name in names:
        before, expected = recorded.get(name), (checksums or {}).get(name)
        if before and (expected is None or expected.sha256 == before.sha256):
            expected = before  # which has the size too
        task = ShardTask(join_address(source, name), folder / name, expected, None, _token(source), retry or Retry())
        if verify or not _has_size(task):
            tasks.append(task)
        elif on_result:
            on_result(ShardResult(name, expected, was_there=True))
    if not tasks:
        return
    if reason := why_unreachable(source):  # asked once, here, for all processes
        missing = [task.path.name for task in tasks if not task.path.exists()]
        if missing:
            raise DownloadError(f"{len(missing)} of {len(names)} shards are not in {folder}, and {source}: {reason}")
        tasks = [replace(task, unreachable=reason) for task in tasks]
    folder.mkdir(parents=True, exist_ok=True)
    failures = _run(tasks, run, concurrency, stop, folder, on_result)
    if stop.is_set():
        raise Cancelled(f"the download to {folder} was cancelled; what has come is kept")
    if failures:
        named = "\n  ".join(f"{name}: {error}" for name, error in failures[:5])
        raise DownloadError(
            f"{len(failures)} of {len(tasks)} shards could not be had:\n  {named}\nThe same command fetches the rest."
        )


def _run(
    tasks: Sequence[ShardTask], run: Runner, concurrency: int, stop: threading.Event, folder: Path,
    on_result: Callable[[ShardResult], None] | None,
) -> list[tuple[str, str]]:
    """Do the tasks, and note what was had even when this is interrupted; returns names and errors of the others."""
    had: dict[str, Fetched] = {}
    failures: list[tuple[str, str]] = []
    in_a_row = 0
    try:
        for result in run(tasks, concurrency, stop):
            if on_result:
                on_result(result)
            if result.file is not None:
                had[result.name] = result.file
                in_a_row = 0
                continue
            failures.append((result.name, result.error or ""))
            in_a_row += 1
            if in_a_row == GIVE_UP_AFTER:
                break
    finally:
        if had:
            write_checksums(folder, read_checksums(folder) | had)
    return failures


# --- what is at a source -----------------------------------------------------------------------------------------


def choose(names: Sequence[str], n_train: int | None, val_shard: str | None, source: str) -> list[str]:
    """The first `n_train` training shards (None: all) and the validation shard, which is the last unless named."""
    names = sorted(names)
    if not names:
        raise FileNotFoundError(f"{source} has no *.parquet shards")
    val_shard = val_shard or names[-1]
    if val_shard not in names:
        near = difflib.get_close_matches(val_shard, names, n=1, cutoff=0.0)[0]
        raise FileNotFoundError(f"validation shard {val_shard!r} is not in {source}; the nearest name is {near!r}")
    return [*[name for name in names if name != val_shard][:n_train], val_shard]


def list_source(source: str, retry: Retry | None = None) -> tuple[list[str], dict[str, Fetched]]:
    """The shards at a source (a web address, a URI or a folder) and their checksums, as far as it has them.

    A web server lists nothing, so there the checksum file names the shards. Raises DownloadError, FileNotFoundError.
    """
    if reason := why_unreachable(source):
        raise DownloadError(f"{source}: {reason}")
    if is_http(source):
        checksums = _source_checksums(source, (CHECKSUMS_FILE, "SHA256SUMS"), retry)
        return sorted(checksums), checksums
    from pyarrow import fs

    system, path = file_system(source)
    try:
        found = system.get_file_info(fs.FileSelector(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"{source}: there is no such folder") from None
    names = {info.base_name for info in found if info.is_file}
    there = [name for name in (CHECKSUMS_FILE, "SHA256SUMS") if name in names]
    checksums = _source_checksums(source, there, retry)
    return sorted(name for name in names if name.endswith(".parquet")), checksums


def _source_checksums(source: str, files: Iterable[str], retry: Retry | None) -> dict[str, Fetched]:
    for name in files:
        try:
            content = fetch_bytes(join_address(source, name), _token(source), retry).decode()
        except DownloadError as error:
            logger.debug("no checksums: %s", error)
            continue
        return parse_checksums(content, join_address(source, name))
    return {}


def parse_checksums(content: str, where: str) -> dict[str, Fetched]:
    """Shards by name in a checksum file: our own, a JSON object of name to SHA-256, or lines as sha256sum prints them.

    A size that is not told is -1. ValueError for anything else.
    """
    try:
        if content.lstrip().startswith("{"):
            data = json.loads(content)
            entries = data["files"] if isinstance(data.get("files"), dict) else data
            found = {
                name: Fetched(-1, value)
                if isinstance(value, str)
                else Fetched(value["size_bytes"], value["sha256"], value.get("revision"))
                for name, value in entries.items()
            }
        else:
            lines = [line.split(maxsplit=1) for line in content.splitlines() if line.strip()]
            found = {name.removeprefix("*").strip().removeprefix("./"): Fetched(-1, sha) for sha, name in lines}
        if wrong := [name for name, file in found.items() if not SHA256.fullmatch(file.sha256)]:
            raise ValueError(f"no SHA-256 for {wrong[0]}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where} is no list of SHA-256 checksums: {error!r}") from error
    return {name: file for name, file in found.items() if name.endswith(".parquet")}


def read_checksums(folder: Path) -> dict[str, Fetched]:
    """What is recorded of a folder's shards; nothing if it has no record."""
    path = folder / CHECKSUMS_FILE
    return parse_checksums(path.read_text(), str(path)) if path.exists() else {}


def write_checksums(folder: Path, files: Mapping[str, Fetched], **more: object) -> None:
    entries = {name: asdict(file) for name, file in sorted(files.items())}
    write_json(folder / CHECKSUMS_FILE, {**more, "files": entries})


def _token(source: str) -> str | None:
    """The hub's token, for the hub only."""
    return os.environ.get("HF_TOKEN") if source.startswith(os.environ.get("HF_ENDPOINT", HUB)) else None


def _has_size(task: ShardTask) -> bool:
    """Whether the shard is there with the size that is recorded of it."""
    expected = task.expected
    return expected is not None and task.path.exists() and task.path.stat().st_size == expected.size_bytes


def _if_whole(task: ShardTask) -> Fetched | None:
    """The shard as it is there, or None if it is not, or is not what it should be."""
    if not task.path.exists():
        return None
    wrong = not_parquet(task.path)
    found = Fetched(task.path.stat().st_size, file_sha256(task.path))
    if wrong is None and task.expected is not None and task.expected.sha256 != found.sha256:
        wrong = f"its content has the SHA-256 {found.sha256}, not {task.expected.sha256}"
    if wrong is None:
        return found
    logger.warning("%s is fetched again: %s", task.path, wrong)
    return None

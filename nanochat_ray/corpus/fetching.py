"""Getting data shards into a folder: what is whole is kept, the rest is fetched, in threads or by another runner."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path

from nanochat_ray.corpus.download import Cancelled, DownloadError, Fetched, Retry, fetch, file_sha256, why_unreachable
from nanochat_ray.corpus.shards import hub_token, read_checksums, write_checksums
from nanochat_ray.corpus.source import join_address

logger = logging.getLogger(__name__)

GIVE_UP_AFTER = 16  # shards in a row that could not be had
STOP_POLL_S = 0.5


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
        task = ShardTask(join_address(source, name), folder / name, expected, None, hub_token(source), retry or Retry())
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

"""Get data shards: of a published set, or from any web address, object storage or folder. The same command goes on.

Shards that are whole are kept. On a cluster the tasks run on all nodes and each writes its own file, so --storage or
--to must be a folder that the nodes share.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from _runtime import Stopped, main, ray_cluster

from nanochat_ray.config import DownloadSettings
from nanochat_ray.corpus.download import Fetched, Retry
from nanochat_ray.corpus.fetching import ShardResult, ShardTask, download, in_threads
from nanochat_ray.corpus.shards import PUBLISHED, choose, list_source
from nanochat_ray.flags import Section, read_flags
from nanochat_ray.run_dir import storage_path

logger = logging.getLogger("nanochat_ray")

BAR_INTERVAL_S = 0.5
LINE_INTERVAL_S = 30.0  # where there is no terminal


class Display:
    """A bar on a terminal, a line now and then in a log. What is under way is seen by the size of its parts."""

    def __init__(self, n_shards: int, folder: Path):
        self.n_shards, self.folder = n_shards, folder
        self.kept = self.fetched = self.failed = 0
        self.fetched_bytes = 0
        self._begun = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._show, name="display", daemon=True)

    def __enter__(self) -> Display:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed.set()
        self._thread.join()

    def note(self, result: ShardResult) -> None:
        if result.file is None:
            self.failed += 1
        elif result.was_there:
            self.kept += 1
        else:
            self.fetched += 1
            self.fetched_bytes += result.file.size_bytes

    def line(self) -> str:
        failed = f", {self.failed} failed" if self.failed else ""
        done = self.kept + self.fetched
        return f"{done} of {self.n_shards} shards ({self.kept} were there{failed}), {self._amount()}"

    def _amount(self) -> str:
        parts = []
        for part in self.folder.glob(".*.part"):
            with contextlib.suppress(FileNotFoundError):  # it has just become whole
                parts.append(part.stat().st_size)
        megabytes, seconds = (self.fetched_bytes + sum(parts)) / 1e6, time.monotonic() - self._begun
        coming = f"{len(parts)} coming, " if parts else ""
        return f"{coming}{megabytes:,.1f} MB, {megabytes / max(seconds, 0.1):,.1f} MB/s"

    def _show(self) -> None:
        from tqdm import tqdm

        if not sys.stderr.isatty():
            while not self._closed.wait(LINE_INTERVAL_S):
                logger.info("%s", self.line())
            return
        with tqdm(total=self.n_shards, unit="shard") as bar:
            while True:
                ended = self._closed.wait(BAR_INTERVAL_S)
                bar.set_postfix_str(self._amount(), refresh=False)
                bar.update(self.kept + self.fetched - bar.n)
                bar.refresh()
                if ended:
                    return


def plan(settings: DownloadSettings) -> tuple[str, list[str], Path, dict[str, Fetched]]:
    """Source, shards, folder to write, and the source's checksums. ValueError, FileNotFoundError, DownloadError."""
    published = PUBLISHED.get(settings.data)
    retry = Retry(settings.tries, settings.backoff_s)
    if published is not None:
        folder = Path(settings.to).expanduser() if settings.to else storage_path(settings.storage) / published.folder
        source, names = published.base_url, published.names
        checksums: dict[str, Fetched] = {}
    else:
        if settings.to is None:
            raise ValueError(f"--data {settings.data}: say with --to which folder its shards shall be written to")
        if "://" in settings.to:
            raise ValueError(f"--to {settings.to}: shards are written to a local or mounted folder, not to a URI")
        source, folder = settings.data, Path(settings.to).expanduser()
        names, checksums = list_source(source, retry)
        if not names and settings.names is None:
            raise ValueError(f"{source} has no checksum file that lists its shards; name them with --names")
    if settings.names is not None:
        names = list(settings.names)
    names = choose(names, settings.max_shards, settings.val_shard, settings.data)
    return source, names, folder.absolute(), checksums


def run(settings: DownloadSettings) -> None:
    source, names, folder, checksums = plan(settings)
    logger.info("%d shards of %s into %s", len(names), settings.data, folder)
    if settings.ray and os.environ.get("RAY_ADDRESS"):
        logger.info("tasks run on all nodes: %s must be the same folder on each", folder)
    with Display(len(names), folder) as display:
        try:
            download(
                source, names, folder, in_ray_tasks if settings.ray else in_threads, settings.concurrency,
                Retry(settings.tries, settings.backoff_s), checksums, settings.verify, on_result=display.note,
            )
        except KeyboardInterrupt:
            raise Stopped(f"{display.line()}; stopped, the same command goes on") from None
    print(display.line(), flush=True)


def in_ray_tasks(tasks: Sequence[ShardTask], concurrency: int, stop: threading.Event) -> Iterator[ShardResult]:
    """The runner on Ray, which is joined or started only when there is something to do."""
    with ray_cluster(1):
        from nanochat_ray.data import download as on_ray

        yield from on_ray.in_ray_tasks(tasks, concurrency, stop)


def cli() -> None:
    run(read_flags(__doc__ or "", [Section("download", DownloadSettings())]).settings(DownloadSettings))


if __name__ == "__main__":
    main(cli)

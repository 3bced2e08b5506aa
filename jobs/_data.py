"""Which data a run trains on: found or fetched once, then pinned by name in the run's folder.

Of a published set the tokenizer needs only the first shards. They are pinned for it in a file of their own, and the
rest arrives while it trains; what has come when never decides which documents a stage reads.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from _runtime import Job

from nanochat_ray.config import DownloadSettings, RunSettings
from nanochat_ray.corpus.download import DownloadError
from nanochat_ray.corpus.fetching import Runner, download, in_threads
from nanochat_ray.corpus.reader import DataManifest, scan_data
from nanochat_ray.corpus.shards import PUBLISHED, choose, tokenizer_shards
from nanochat_ray.corpus.world import write_world
from nanochat_ray.run_dir import DATA_FILE, RunDir, differences, read_json, storage_path, write_json

logger = logging.getLogger("nanochat_ray")

WORLD_SEED = 42
DEFAULT_SHARDS = 8
TOKENIZER_DATA_FILE = "tokenizer_data.json"  # of a published set: the shards that the tokenizer reads
WAITING_LINE_S = 30.0


def world_folder(storage: str | None) -> Path:
    """Where the embedded corpus lies; generated on first use."""
    folder = storage_path(storage) / f"embedded_world_{WORLD_SEED}"
    write_world(folder, WORLD_SEED)
    return folder


def pinned_world(run_dir: RunDir, storage: str | None) -> Path | None:
    """The embedded corpus' folder if the run was begun with it, else None."""
    path = run_dir.root / DATA_FILE
    source = DataManifest.from_json(read_json(path)).source if path.exists() else None
    return world_folder(storage) if source and Path(source).name == f"embedded_world_{WORLD_SEED}" else None


def data_name(settings: RunSettings, device: str) -> str:
    """The data to take: what was asked for, else the embedded corpus without a GPU and climbmix with one."""
    return settings.data or ("climbmix" if device.startswith("cuda") else "embedded")


def pin_data(settings: RunSettings, run_dir: RunDir, device: str, n_shards: int | None = None) -> DataManifest:
    """The run's data: as pinned before, or found now and pinned.

    Raises ValueError if other data is asked for than what the run was begun with.
    """
    path = run_dir.root / DATA_FILE
    if path.exists() and not _asks_for_data(settings):
        return DataManifest.from_json(read_json(path))
    return _pin(path, find_data(settings, data_name(settings, device), n_shards))


def pinned_for_tokenizer(job: Job) -> DataManifest:
    """The data that the run's tokenizer was trained on."""
    path = job.run_dir.root / TOKENIZER_DATA_FILE
    if path.exists():
        return DataManifest.from_json(read_json(path))
    return pin_data(job.settings, job.run_dir, job.device)


def find_data(settings: RunSettings, name: str, n_shards: int | None) -> DataManifest:
    """Scan a folder or URI, generate the embedded corpus, or fetch a published set."""
    if name in PUBLISHED:
        return fetch_published(settings, name, settings.max_shards or n_shards or DEFAULT_SHARDS)
    source = str(world_folder(settings.storage)) if name == "embedded" else name
    return scan_data(source, settings.text_column, settings.val_shard, settings.skip_corrupt, settings.max_shards)


def fetch_published(settings: RunSettings, name: str, n_train: int) -> DataManifest:
    """The first `n_train` training shards of a published set and its validation shard, fetched if need be.

    The manifest is the same whatever else lies in the folder. Raises DownloadError.
    """
    names, folder = _published(settings, name, n_train)
    missing = _missing(names, folder)
    if missing:
        logger.info("%s: fetching %d of %d shards into %s", name, len(missing), len(names), folder)
    _get(name, names, folder)
    return scan_data(str(folder), settings.text_column, names[-1], settings.skip_corrupt, len(names) - 1)


class RunData:
    """The data of one run as its stages come to need it: first the tokenizer's, the whole when pretraining begins."""

    def __init__(self, job: Job, n_shards: int | None = None):
        """`n_shards` training shards of a published set are wanted in the end; None: nobody needs the rest."""
        self.job, self.n_shards = job, n_shards
        self._rest: _Background | None = None

    def for_tokenizer(self, max_chars: int) -> DataManifest:
        """What the tokenizer trains on: all, or of a published set as many shards as hold `max_chars` characters.

        Then the rest begins to come in the background, if it is wanted and not there.
        """
        settings, root = self.job.settings, self.job.run_dir.root
        name, path = data_name(settings, self.job.device), root / TOKENIZER_DATA_FILE
        if path.exists() and not _asks_for_data(settings):
            manifest = DataManifest.from_json(read_json(path))
        elif name not in PUBLISHED or ((root / DATA_FILE).exists() and not path.exists()):
            return self.whole()
        else:
            first = min(tokenizer_shards(max_chars), settings.max_shards or PUBLISHED[name].n_shards)
            manifest = _pin(path, fetch_published(settings, name, first))
        if name in PUBLISHED and self.n_shards is not None and not (root / DATA_FILE).exists():
            self._start_rest(name)
        return manifest

    def whole(self) -> DataManifest:
        """The whole data of the run, pinned. Raises DownloadError for what could not be had of it."""
        if self._rest is not None:
            self._rest.wait()
        return pin_data(self.job.settings, self.job.run_dir, self.job.device, self.n_shards)

    def _start_rest(self, name: str) -> None:
        settings = self.job.settings
        names, folder = _published(settings, name, settings.max_shards or self.n_shards or DEFAULT_SHARDS)
        missing = _missing(names, folder)
        if not missing:
            return
        runner: Runner = in_threads
        if self.job.use_ray():
            from nanochat_ray.data.download import in_ray_tasks

            runner = in_ray_tasks
        logger.info("%s: %d more shards arrive while the tokenizer trains", name, len(missing))
        self._rest = _Background(name, names, folder, runner)
        self.job.resources.callback(self._rest.cancel)


class _Background:
    """A download in a thread of this process, which leads Ray tasks or other threads."""

    def __init__(self, name: str, names: list[str], folder: Path, runner: Runner):
        self.name, self.names, self.folder, self.runner = name, names, folder, runner
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="download", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            _get(self.name, self.names, self.folder, self.runner, self._stop)
        except Exception as error:
            self._error = error

    def wait(self) -> None:
        """Return when all shards are there. Raises DownloadError for those that could not be had."""
        begun = last = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(0.2)
            if time.monotonic() - last >= WAITING_LINE_S:
                last = time.monotonic()
                there = len(self.names) - len(_missing(self.names, self.folder))
                logger.info("waiting for %s for %.0f s: %d of %d shards are there", self.name, last - begun, there,
                            len(self.names))
        if self._error is not None:
            raise DownloadError(f"pretraining needs shards that did not arrive: {self._error}") from self._error

    def cancel(self) -> None:
        """End it if it still runs; what has come is kept."""
        self._stop.set()
        self._thread.join()


def _published(settings: RunSettings, name: str, n_train: int) -> tuple[list[str], Path]:
    """The names of a published set's first training shards and, last, its validation shard; and their folder."""
    published = PUBLISHED[name]
    names = choose(published.names, n_train, settings.val_shard, name)
    return names, storage_path(settings.storage) / published.folder


def _missing(names: list[str], folder: Path) -> list[str]:
    return [shard for shard in names if not (folder / shard).exists()]


def _get(
    name: str, names: list[str], folder: Path, runner: Runner = in_threads, stop: threading.Event | None = None
) -> None:
    try:
        download(PUBLISHED[name].base_url, names, folder, runner, DownloadSettings().concurrency, stop=stop)
    except DownloadError as error:
        raise DownloadError(f"{error}\n--data takes a folder of your own parquet shards instead of {name}.") from error


def _asks_for_data(settings: RunSettings) -> bool:
    return any(value is not None for value in (settings.data, settings.val_shard, settings.max_shards))


def _pin(path: Path, manifest: DataManifest) -> DataManifest:
    """Write down the manifest. ValueError if another one was."""
    if path.exists():
        pinned = DataManifest.from_json(read_json(path))
        if pinned.hash != manifest.hash:
            changed = differences(pinned.to_json(), manifest.to_json())
            raise ValueError(
                "this run was begun with other data:\n  " + "\n  ".join(changed[:10])
                + f"\nGive the same data, another --model-tag, or delete {path.parent}."
            )
    write_json(path, manifest.to_json())
    return manifest

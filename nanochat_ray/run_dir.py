"""A run's folder `<storage>/<model_tag>/`: every name in it, atomic writes, stage state, and the one writer's lease.

One subfolder per stage. A stage writes `config.json` first and `_SUCCESS` last, so a folder without `_SUCCESS` is an
interrupted stage. Plain files only: nothing here needs torch or Ray.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

STAGES = ("tokenizer", "tokenizer_eval", "pretrain", "base_eval", "sft", "chat_eval", "rl", "report")
STAGE_OF_SOURCE = {"base": "pretrain", "sft": "sft", "rl": "rl"}  # nanochat's names of models
CONFIG_FILE = "config.json"
RESULT_FILE = "result.json"
METRICS_FILE = "metrics.jsonl"
DONE_FILE = "_SUCCESS"
STOP_FILE = "stop_requested"
LEASE_FILE = "lease.json"
LEASE_LOCK_FILE = "lease.lock"
CHECKPOINTS = "checkpoints"
MANIFEST_FILE = "manifest.json"
DATA_FILE = "data.json"

HEARTBEAT_S = 5.0
HEARTBEAT_STALE_S = 60.0

StageState = Literal["fresh", "interrupted", "done"]


class RunBusyError(RuntimeError):
    """Another live process holds the run's folder."""


class StaleWriterError(RuntimeError):
    """This process lost the run's folder to a later one and may not write to it."""


def default_storage() -> Path:
    """`NANOCHAT_BASE_DIR`, else `~/.cache/nanochat_ray`."""
    return Path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat_ray").expanduser()


def storage_path(storage: str | None) -> Path:
    """The storage folder as an absolute path; URIs are refused."""
    if storage and "://" in storage:
        raise ValueError(f"--storage {storage}: runs are kept in a local or mounted folder, not behind a URI")
    path = Path(storage).expanduser() if storage else default_storage()
    return path.absolute()


def find_model_tag(storage: Path) -> str:
    """The run to take when none is named: the largest d<depth>, the latest among equals; else the latest run."""
    runs = [folder for folder in storage.iterdir() if (folder / LEASE_FILE).exists()] if storage.is_dir() else []
    if not runs:
        raise FileNotFoundError(f"no run in {storage}; train one first (python jobs/speedrun.py) or give --storage")

    def key(folder: Path) -> tuple[int, float]:
        digits = folder.name[1:].split("_")[0] if folder.name.startswith("d") else ""
        return (int(digits) if digits.isdigit() else -1, (folder / LEASE_FILE).stat().st_mtime)

    return max(runs, key=key).name


def existing_run(storage: str | None, model_tag: str | None) -> str:
    """The tag of a run that is there: the named one, else what `find_model_tag` takes. FileNotFoundError if none is."""
    folder = storage_path(storage)
    if model_tag is None:
        return find_model_tag(folder)
    if not (folder / model_tag / LEASE_FILE).exists():
        runs = sorted(path.parent.name for path in folder.glob(f"*/{LEASE_FILE}"))
        raise FileNotFoundError(f"no run {model_tag!r} in {folder}; there are {', '.join(runs) or 'none'}")
    return model_tag


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """The leaves in which two JSON values differ, as 'name: old -> new'."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += differences(old.get(key), new.get(key), f"{prefix}{key}.")
        return found
    return [] if old == new else [f"{prefix.rstrip('.')}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True)
class RunDir:
    """The folder of one run."""

    root: Path

    @staticmethod
    def of(storage: str | None, model_tag: str) -> RunDir:
        if not model_tag or "/" in model_tag or model_tag.startswith("."):
            raise ValueError(f"model tag {model_tag!r}: a plain folder name is needed")
        return RunDir(storage_path(storage) / model_tag)

    def stage(self, name: str) -> Path:
        return self.root / name

    def checkpoints(self, stage: str) -> Path:
        return self.root / stage / CHECKPOINTS

    def is_done(self, stage: str) -> bool:
        return (self.stage(stage) / DONE_FILE).exists()

    def begin_stage(self, stage: str, config: dict[str, Any]) -> StageState:
        """Open a stage for this config and say where it stands.

        Raises ValueError if the stage was begun or finished with another config, naming each difference.
        """
        folder = self.stage(stage)
        config = json.loads(json.dumps(config))  # tuples become lists, as they will be when read back
        if (folder / CONFIG_FILE).exists():
            changed = differences(read_json(folder / CONFIG_FILE), config)
            if changed:
                state = "finished" if self.is_done(stage) else "begun"
                raise ValueError(
                    f"stage {stage} of this run was {state} with other settings:\n  "
                    + "\n  ".join(changed)
                    + f"\nGive the same settings, another --model-tag, or delete {folder} to make it anew."
                )
            return "done" if self.is_done(stage) else "interrupted"
        write_json(folder / CONFIG_FILE, config)
        return "fresh"

    def finish_stage(self, stage: str) -> None:
        write_json(self.stage(stage) / DONE_FILE, {"finished_at": time.strftime("%Y-%m-%dT%H:%M:%S%z")})

    def require_stage(self, stage: str, job: str) -> Path:
        """The folder of a finished stage, or FileNotFoundError that names the job to run."""
        if not self.is_done(stage):
            command = f"jobs/{job} --model-tag {self.root.name}"
            raise FileNotFoundError(f"stage {stage} of {self.root} is not finished; run {command} first")
        return self.stage(stage)


# --- the lease ---------------------------------------------------------------------------------------------------


def _host_identity() -> str:
    """Host, boot and pid namespace: within one value of it, process ids can be compared."""
    parts = [socket.gethostname()]
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        with contextlib.suppress(OSError):
            parts.append(read())
    return "|".join(parts)


def _process_start(pid: int) -> str | None:
    """Start time of a live process in clock ticks since boot, None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return _process_start_portable(pid)
    return None if fields[0] in "ZX" else fields[19]


def _process_start_portable(pid: int) -> str | None:
    if os.path.isdir("/proc/self"):
        return None
    try:
        import psutil

        return str(psutil.Process(pid).create_time())
    except psutil.Error:
        return None


def _holder_is_alive(lease: dict[str, Any]) -> bool:
    if lease.get("released"):
        return False
    if lease["host"] == _host_identity():
        return _process_start(int(lease["pid"])) == lease["started"]
    return time.time() - float(lease["heartbeat"]) < HEARTBEAT_STALE_S


@contextlib.contextmanager
def _lease_lock(root: Path) -> Iterator[None]:
    root.mkdir(parents=True, exist_ok=True)
    with open(root / LEASE_LOCK_FILE, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def lease_epoch(root: Path) -> int:
    """The epoch number of the run's current writer, 0 before the first."""
    try:
        return int(read_json(root / LEASE_FILE)["epoch"])
    except FileNotFoundError:
        return 0


def check_writer(root: Path, epoch: int) -> None:
    """Raise StaleWriterError unless `epoch` is still the run's current writer."""
    current = lease_epoch(root)
    if current != epoch:
        raise StaleWriterError(f"{root}: this process holds lease {epoch}, the run's writer is now lease {current}")


@contextlib.contextmanager
def writing_as(root: Path, epoch: int) -> Iterator[None]:
    """Hold the run's lease lock while committing a file; StaleWriterError if `epoch` is no longer the writer."""
    with _lease_lock(root):
        check_writer(root, epoch)
        yield


class Lease:
    """The right to write checkpoints and stage state of one run, taken by a job's driver.

    Each holder has an epoch number; whoever takes over counts it up, and from then on `check_writer` refuses the old
    epoch wherever the old job's processes still run.
    """

    def __init__(self, root: Path, record: dict[str, Any]):
        self.root = root
        self.epoch: int = record["epoch"]
        self._record = record
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)
        self._thread.start()

    @staticmethod
    def acquire(root: Path) -> Lease:
        """Take the run's folder, at once if its last holder is dead; raises RunBusyError if it is alive."""
        with _lease_lock(root):
            path = root / LEASE_FILE
            held = read_json(path) if path.exists() else None
            if held is not None and _holder_is_alive(held):
                raise RunBusyError(
                    f"{root} is being written by process {held['pid']} on {held['host'].split('|')[0]} "
                    f"(lease {held['epoch']}); wait for it, stop it, or give another --model-tag"
                )
            record = {
                "epoch": (held["epoch"] if held else 0) + 1,
                "host": _host_identity(),
                "pid": os.getpid(),
                "started": _process_start(os.getpid()),
                "heartbeat": time.time(),
                "released": False,
            }
            write_json(path, record)
        return Lease(root, record)

    def _update(self, change: Callable[[dict[str, Any]], None]) -> None:
        with _lease_lock(self.root):
            if lease_epoch(self.root) == self.epoch:
                change(self._record)
                write_json(self.root / LEASE_FILE, self._record)

    def _beat(self) -> None:
        while not self._closed.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):  # a full disk must not end the job; the next beat tries again
                self._update(lambda record: record.update(heartbeat=time.time()))

    def check(self) -> None:
        check_writer(self.root, self.epoch)

    def advance(self) -> int:
        """The next epoch number, still held by this job: what its earlier processes try to write is refused from now on.

        For a second launch of the training workers, when one of the first may not have noticed yet that it is over.
        """
        with _lease_lock(self.root):
            check_writer(self.root, self.epoch)
            self._record["epoch"] = self.epoch = self.epoch + 1
            write_json(self.root / LEASE_FILE, self._record)
        return self.epoch

    def release(self) -> None:
        self._closed.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._update(lambda record: record.update(released=True))

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

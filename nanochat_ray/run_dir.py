"""A run's folder `<storage>/<model_tag>/`: every name in it, atomic writes, stage state, and the one writer's lease.

One subfolder per stage. A stage writes `config.json` first and `_SUCCESS` last, so a folder without `_SUCCESS` is an
interrupted stage. Plain files only: nothing here needs torch or Ray. With a URI as storage the folder is a mirror
(remote.py): its records are pulled when a job begins and pushed as stages begin and end; checkpoints go their own way.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nanochat_ray.remote import Every, Remote, mirror_folder

STAGES = ("tokenizer", "tokenizer_eval", "pretrain", "base_eval", "sft", "chat_eval", "rl", "chat_eval_rl", "report")
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
DEFAULT_STORAGE = "~/.cache/nanochat_ray"

HEARTBEAT_S = 5.0
HEARTBEAT_STALE_S = 60.0
LOCK_POLL_S = 0.1
LEASE_LOCK_WAIT_S = 60.0
READ_AGAIN_S = (0.05, 0.1, 0.2, 0.4, 0.8)
SETTLE_S = 1.0  # between writing a lease into a store and reading it back
FOLLOW_REMOTE_S = 5.0
NOT_RECORDS = (LEASE_FILE, LEASE_LOCK_FILE, STOP_FILE)

StageState = Literal["fresh", "interrupted", "done"]


class RunBusyError(RuntimeError):
    """Another live process holds the run's folder."""


class StaleWriterError(RuntimeError):
    """This process lost the run's folder to a later one and may not write to it."""


def storage_path(storage: str | None) -> Path:
    """The storage folder as an absolute path; for a URI the local folder that mirrors it.

    None is `NANOCHAT_BASE_DIR`, a folder or a URI too, else `~/.cache/nanochat_ray`.
    """
    base = os.environ.get("NANOCHAT_BASE_DIR") or DEFAULT_STORAGE
    storage = storage or base
    if "://" in storage:
        mirrors = DEFAULT_STORAGE if "://" in base else base
        return mirror_folder(storage, Path(mirrors).expanduser().absolute())
    return Path(storage).expanduser().absolute()


def _runs(storage: Path) -> dict[str, float]:
    """The runs of a storage folder, and when each one's lease was last written (seconds since 1970)."""
    remote = Remote.of(storage)
    if remote is None:
        return {path.parent.name: path.stat().st_mtime for path in storage.glob(f"*/{LEASE_FILE}")}
    folders = [name for name, entry in remote.listing(storage).items() if entry.size_bytes is None]
    leases = {name: remote.find(storage / name / LEASE_FILE) for name in folders}
    return {name: lease.modified_s for name, lease in leases.items() if lease is not None}


def find_model_tag(storage: Path) -> str:
    """The run to take when none is named: the largest d<depth>, the latest among equals; else the latest run."""
    runs = _runs(storage)
    if not runs:
        raise FileNotFoundError(
            f"no run in {shown(storage)}; train one first (python jobs/speedrun.py) or give --storage"
        )

    def key(tag: str) -> tuple[int, float]:
        digits = tag[1:].split("_")[0] if tag.startswith("d") else ""
        return (int(digits) if digits.isdigit() else -1, runs[tag])

    return max(runs, key=key)


def existing_run(storage: str | None, model_tag: str | None) -> str:
    """The tag of a run that is there: the named one, else what `find_model_tag` takes. FileNotFoundError if none is."""
    folder = storage_path(storage)
    if model_tag is None:
        return find_model_tag(folder)
    if model_tag not in (runs := _runs(folder)):
        there = ", ".join(sorted(runs)) or "none"
        raise FileNotFoundError(f"no run {model_tag!r} in {shown(folder)}; there are {there}")
    return model_tag


def shown(path: Path) -> str:
    """A path as a person knows it: a mirrored one as its URI."""
    remote = Remote.of(path)
    return remote.uri_of(path) if remote else str(path)


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(path: Path, wait_s: float, beat: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a file's lock; TimeoutError that names it after `wait_s` seconds, in which `beat` is called all the time."""
    deadline = time.monotonic() + wait_s
    with open(path, "a") as file:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"another process has held the lock {path} for {wait_s:g} s")
            beat()
            time.sleep(LOCK_POLL_S)
        yield


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

    def open(self) -> Lease:
        """Take the run's lease, and for a run in object storage make the local records those of the store.

        Raises RunBusyError, or ValueError for storage that cannot be written, before anything is done.
        """
        remote = Remote.of(self.root)
        if remote is not None:
            remote.probe()
        lease = Lease.acquire(self.root)
        try:
            self._pull(remote)
        except BaseException:
            lease.release()
            raise
        return lease

    def fetch(self) -> RunDir:
        """For readers: the same run with its records here, unless a job on this machine is just writing them."""
        held = _local_lease(self.root)
        if held is None or not (held["host"] == host_identity() and holder_is_alive(held)):
            self._pull(Remote.of(self.root))
        return self

    def _pull(self, remote: Remote | None) -> None:
        if remote is not None:
            for folder in (self.root, *(self.stage(name) for name in STAGES)):
                remote.pull_files(folder, NOT_RECORDS, DONE_FILE, exact=True)

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
        push_records(self.root)
        push_records(folder)
        return "fresh"

    def finish_stage(self, stage: str) -> None:
        write_json(self.stage(stage) / DONE_FILE, {"finished_at": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
        push_records(self.stage(stage))

    def following(self, stage: str) -> contextlib.AbstractContextManager[object]:
        """While open, brings the stage's metrics here that a training worker on another machine pushes."""
        remote, path = Remote.of(self.root), self.stage(stage) / METRICS_FILE
        if remote is None:
            return contextlib.nullcontext()
        return Every(FOLLOW_REMOTE_S, lambda: remote.pull_log(path), f"follow-{stage}")

    def require_stage(self, stage: str, job: str) -> Path:
        """The folder of a finished stage, or FileNotFoundError that names the job to run."""
        if not self.is_done(stage):
            command = f"jobs/{job} --model-tag {self.root.name}"
            raise FileNotFoundError(f"stage {stage} of {shown(self.root)} is not finished; run {command} first")
        return self.stage(stage)


def push_records(folder: Path) -> None:
    """Copy the files directly in a folder of a run to the run's store, `_SUCCESS` last; nothing for a local run."""
    if (remote := Remote.of(folder)) is not None:
        remote.patient().push_files(folder, NOT_RECORDS, DONE_FILE)


def pull_records(folder: Path) -> Path:
    """Bring files directly in a folder of a run here that are in its store only; nothing for a local run.

    For processes on other machines than the job's, before they read a stage's folder or add to its metrics.
    """
    if (remote := Remote.of(folder)) is not None:
        remote.pull_files(folder, NOT_RECORDS, DONE_FILE, exact=False)
    return folder


def have_records(folder: Path) -> Path:
    """The folder of a finished stage, with its files here; pulled only if they are not."""
    return folder if (folder / DONE_FILE).exists() else pull_records(folder)


def request_stop(folder: Path) -> None:
    """Ask the training of a stage to save and stop. Returns at once; safe in a signal's handler."""
    path = folder / STOP_FILE
    path.touch()
    if (remote := Remote.of(path)) is not None:
        threading.Thread(target=remote.write, args=(path, b"stop"), name="request-stop", daemon=True).start()


def clear_stop(folder: Path) -> None:
    """Take a request to stop back."""
    path = folder / STOP_FILE
    path.unlink(missing_ok=True)
    if (remote := Remote.of(path)) is not None:
        remote.patient().delete(path)


# --- the lease ---------------------------------------------------------------------------------------------------


def host_identity() -> str:
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


def holder_is_alive(lease: dict[str, Any]) -> bool:
    if lease.get("released"):
        return False
    if lease["host"] == host_identity():
        return _process_start(int(lease["pid"])) == lease["started"]
    return time.time() - float(lease["heartbeat"]) < HEARTBEAT_STALE_S


def _busy(root: Path, held: dict[str, Any]) -> RunBusyError:
    return RunBusyError(
        f"{shown(root)} is being written by process {held['pid']} on {held['host'].split('|')[0]} "
        f"(lease {held['epoch']}); wait for it, stop it, or give another --model-tag"
    )


@contextlib.contextmanager
def _lease_lock(root: Path) -> Iterator[None]:
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / LEASE_LOCK_FILE, LEASE_LOCK_WAIT_S):
        yield


def _record(path: Path, read: Callable[[], bytes | None]) -> Any:
    """The JSON that `read` gives of a file, None if there is no file. Tried again while the file is being replaced: NFS
    then says ESTALE, and a store that shows objects as they grow gives half of one."""
    for wait_s in (*READ_AGAIN_S, None):
        try:
            data = read()
            return None if data is None else json.loads(data)
        except FileNotFoundError:
            return None
        except ValueError as error:
            problem: Exception = ValueError(f"{shown(path)} is damaged ({error}); delete it if no job writes this run")
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            problem = ConnectionError(f"{path} cannot be read: {error}")
        if wait_s is not None:
            time.sleep(wait_s)
    raise problem


def _local_lease(root: Path) -> Any:
    return _record(root / LEASE_FILE, (root / LEASE_FILE).read_bytes)


def stored_lease(root: Path) -> Any:
    """The lease's record where it counts: in the run's store if there is one."""
    if (remote := Remote.of(root)) is None:
        return _local_lease(root)
    path = root / LEASE_FILE
    return _record(path, lambda: remote.read(path))


def _store_lease(root: Path, record: dict[str, Any]) -> None:
    if (remote := Remote.of(root)) is not None:
        remote.write(root / LEASE_FILE, json.dumps(record).encode())
    write_json(root / LEASE_FILE, record)


def lease_epoch(root: Path) -> int:
    """The epoch number of the run's current writer, 0 before the first."""
    record = stored_lease(root)
    return 0 if record is None else int(record["epoch"])


def check_writer(root: Path, epoch: int) -> None:
    """Raise StaleWriterError unless `epoch` is still the run's current writer."""
    current = lease_epoch(root)
    if current != epoch:
        raise StaleWriterError(
            f"{shown(root)}: this process holds lease {epoch}, the run's writer is now lease {current}"
        )


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

    In a folder this is strict: taking over and committing exclude each other by a file lock. A store has no locks:
    there the new holder writes its record, waits `SETTLE_S` and reads it back. Of two that come at the same moment one
    gives up, or, if its write took longer than that, finds at its next heartbeat that the number is not its own (they
    grow by random steps, so no two are alike). A holder that was followed commits no checkpoint that it begins to
    commit after that; one already on its way to the store may still arrive, whole.
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
        remote = Remote.of(root)
        with _lease_lock(root):
            found = [_local_lease(root), stored_lease(root) if remote else None]
            for held in (record for record in found if record is not None):
                if holder_is_alive(held):
                    raise _busy(root, held)
            step = 1 if remote is None else 1 + secrets.randbelow(1 << 20)
            record = {
                "epoch": max((held["epoch"] for held in found if held is not None), default=0) + step,
                "host": host_identity(),
                "pid": os.getpid(),
                "started": _process_start(os.getpid()),
                "heartbeat": time.time(),
                "released": False,
            }
            _store_lease(root, record)
            if remote is not None:
                time.sleep(SETTLE_S)
                if (now := stored_lease(root)) != record:
                    write_json(root / LEASE_FILE, record | {"released": True})
                    raise _busy(root, now or record)
        return Lease(root, record)

    def _update(self, change: Callable[[dict[str, Any]], None]) -> None:
        with _lease_lock(self.root):
            if lease_epoch(self.root) == self.epoch:
                change(self._record)
                _store_lease(self.root, self._record)

    def _beat(self) -> None:
        while not self._closed.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError, ValueError):  # a full disk must not end the job; the next beat tries
                self._update(lambda record: record.update(heartbeat=time.time()))

    def check(self) -> None:
        check_writer(self.root, self.epoch)

    def advance(self) -> int:
        """The next epoch number, still held by this job: what its earlier processes try to write is refused from now.

        For a second launch of the training workers, when one of the first may not have noticed yet that it is over.
        """
        with _lease_lock(self.root):
            check_writer(self.root, self.epoch)
            record = self._record | {"epoch": self.epoch + 1}
            _store_lease(self.root, record)
            self._record, self.epoch = record, record["epoch"]
        return self.epoch

    def release(self) -> None:
        self._closed.set()
        self._thread.join()
        with contextlib.suppress(OSError, ValueError):
            self._update(lambda record: record.update(released=True))

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

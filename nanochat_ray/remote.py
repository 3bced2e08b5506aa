"""Object storage behind a local folder: files are written locally and pushed, or pulled when they are wanted.

The local folder carries its origin in its name, `<cache>/remote/<URI, percent-encoded>`. So whoever holds a path below
it, in whatever process on whatever machine, finds the store that the path mirrors: `Remote.of(path)`. The store is the
truth, the folder a cache of it. Any URI that pyarrow's file systems know will do: s3, gs, abfs, hdfs, file.

An object appears whole or not at all, but several of them do not appear together: what belongs together has a manifest
or a marker that is pushed last and deleted first.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import re
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

CACHE_FOLDER = "remote"
RETRY_WAITS_S = (0.5, 1.0, 2.0, 4.0)
PATIENT_WAITS_S = (0.5, 1.0, 2.0, 5.0, 10.0, 17.0, 25.0)
LASTING = {  # what no second try makes better: a full disk, a missing right, something in the way
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
}  # fmt: skip
PROBE_TIMEOUT_S = 20.0
LONGEST_NAME = 255  # of a folder, in bytes
_ENCODED_SCHEME_END = urllib.parse.quote("://", safe="")
PASSWORD = re.compile(r"://[^/@:]*:(?!\d+/)[^@]*@")  # user:password@, and not the port of a host
_SECRET_FIELD = re.compile(r"(^|&)([^=&]*(secret|token|password|signature|account_key|access_key)[^=&]*|sig)=", re.I)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Entry:
    """A file or a folder in the store."""

    size_bytes: int | None  # None: a folder
    modified_s: float  # since 1970


def mirror_folder(uri: str, cache: Path) -> Path:
    """The local folder that mirrors `uri`. ValueError for a URI that cannot stand in a folder's name.

    A name before an @ is welcome (abfs://container@account.dfs.core.windows.net), a password or key is not.
    """
    path, mark, query = uri.partition("?")
    if PASSWORD.search(path) or _SECRET_FIELD.search(query):
        raise ValueError(
            "a storage URI must not hold keys, for it is written into logs and names of folders; give them in the "
            "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, "
            "AZURE_CLIENT_ID and AZURE_CLIENT_SECRET)"
        )
    name = urllib.parse.quote(path.rstrip("/") + mark + query, safe="")
    if len(name) > LONGEST_NAME:
        raise ValueError(f"storage URI {uri}: with %-escapes it has {len(name)} characters, {LONGEST_NAME} is the most")
    return cache / CACHE_FOLDER / name


@functools.lru_cache(maxsize=8)
def _file_system(uri: str) -> tuple[Any, str]:
    """pyarrow's file system for a URI, and the path in it.

    A file system made from an s3 URI tries each request ten times, about 100 s, and holds up the process' end so long;
    the same one made anew tries twice.
    """
    from pyarrow import fs

    system, path = fs.FileSystem.from_uri(uri)
    given = dict(urllib.parse.parse_qsl(uri.partition("?")[2]))
    if system.type_name == "s3" and given.keys() <= {"region", "scheme", "endpoint_override"}:
        twice = fs.AwsStandardS3RetryStrategy(max_attempts=2)
        system = fs.S3FileSystem(**given | {"region": system.region, "retry_strategy": twice})
    return system, path


@dataclass(frozen=True)
class Remote:
    """The store behind a mirrored folder. Files are named by their local paths.

    A call that fails is tried again with growing waits, about 8 s in all (`patient`: a minute), and then raises
    ConnectionError that names the URI. What waiting cannot mend (`LASTING`) is raised at once as what it is.
    """

    uri: str
    local: Path
    retry_waits_s: tuple[float, ...] = RETRY_WAITS_S

    @staticmethod
    def of(path: Path) -> Remote | None:
        """The store that `path` mirrors, None for an ordinary path."""
        for folder in (path, *path.parents):
            if _ENCODED_SCHEME_END in folder.name and folder.parent.name == CACHE_FOLDER:
                return Remote(urllib.parse.unquote(folder.name), folder)
        return None

    def patient(self) -> Remote:
        """The same store for calls that may take long, as those in the background do."""
        return replace(self, retry_waits_s=PATIENT_WAITS_S)

    def uri_of(self, path: Path) -> str:
        """The URI of the object that `path` mirrors."""
        base, mark, query = self.uri.partition("?")
        relative = path.relative_to(self.local).as_posix()
        return (base if relative == "." else f"{base}/{relative}") + mark + query

    # --- objects ---

    def read(self, path: Path) -> bytes | None:
        """The object's bytes, None if there is none."""

        def attempt() -> bytes | None:
            with contextlib.suppress(FileNotFoundError), self._fs.open_input_stream(self._key(path)) as stream:
                return stream.read()
            return None

        return self._tried("read", path, attempt)

    def write(self, path: Path, data: bytes) -> None:
        """Put bytes into the store only; nothing is written locally."""

        def put(key: str) -> None:
            with self._fs.open_output_stream(key) as stream:
                stream.write(data)

        self._tried("write", path, lambda: self._put_whole(path, put))

    def push(self, path: Path, to: Path | None = None) -> None:
        """Copy a local file into the store, to its own place or to that of another path; its size there is checked."""
        from pyarrow import fs

        target = to or path

        def put(key: str) -> None:
            fs.copy_files(str(path), key, fs.LocalFileSystem(), self._fs)
            size, wanted = self._fs.get_file_info(key).size, path.stat().st_size
            if size != wanted:
                raise OSError(f"{size} bytes arrived of {wanted}")

        self._tried("write", target, lambda: self._put_whole(target, put))

    def pull(self, path: Path, to: Path | None = None) -> bool:
        """Copy an object to its local place, or to another one, whole; False if there is none in the store."""
        from pyarrow import fs

        target = to or path
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")

        def attempt() -> bool:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                if not self._fs.get_file_info(self._key(path)).is_file:
                    return False
                fs.copy_files(self._key(path), str(temporary), self._fs, fs.LocalFileSystem())
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
            return True

        return self._tried("read", path, attempt)

    def listing(self, folder: Path) -> dict[str, Entry]:
        """What stands in a folder of the store, by name; empty if there is no such folder."""
        from pyarrow import fs

        def attempt() -> dict[str, Entry]:
            found = self._fs.get_file_info(fs.FileSelector(self._key(folder), allow_not_found=True))
            return {
                info.base_name: Entry(info.size if info.is_file else None, (info.mtime_ns or 0) / 1e9) for info in found
            }

        return self._tried("list", folder, attempt)

    def find(self, path: Path) -> Entry | None:
        """The object's size and time, None if there is none."""

        def attempt() -> Entry | None:
            info = self._fs.get_file_info(self._key(path))
            return Entry(info.size, (info.mtime_ns or 0) / 1e9) if info.is_file else None

        return self._tried("read", path, attempt)

    def delete(self, path: Path) -> None:
        """Delete an object, or a folder with all that is in it; nothing happens if there is none."""
        from pyarrow import fs

        def attempt() -> None:
            kind = self._fs.get_file_info(self._key(path)).type
            with contextlib.suppress(FileNotFoundError):
                if kind == fs.FileType.Directory:
                    self._fs.delete_dir(self._key(path))
                elif kind == fs.FileType.File:
                    self._fs.delete_file(self._key(path))

        self._tried("delete", path, attempt)

    # --- files of a folder ---

    def push_files(self, folder: Path, skip: Collection[str], last: str) -> None:
        """Push the files that lie directly in a folder, `last` after all others. Hidden ones stay here.

        A log (.jsonl) that is longer in the store is left as it is: another machine writes it.
        """
        names = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
        for name in _in_order(names, skip, last):
            if name.endswith(".jsonl"):
                self.push_log(folder / name)
            else:
                self.push(folder / name)

    def pull_files(self, folder: Path, skip: Collection[str], last: str, exact: bool) -> None:
        """Bring the files directly in a folder of the store here, `last` after all others.

        With `exact` those that are here are replaced, and removed if the store does not have them; else only missing
        ones are fetched. A log (.jsonl) of which the store has the beginning is kept, for the store's copy lags behind.
        """
        there = [name for name, entry in self.listing(folder).items() if entry.size_bytes is not None]
        here = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
        if exact:
            for name in reversed(_in_order(set(here) - set(there), skip, last)):
                if not (there and name.endswith(".jsonl")):
                    (folder / name).unlink()
        for name in _in_order(there, skip, last):
            path = folder / name
            if name.endswith(".jsonl") and path.exists():
                if not path.read_bytes().startswith(self.read(path) or b""):
                    self.pull(path)
            elif exact or not path.exists():
                self.pull(path)

    def push_log(self, path: Path) -> None:
        """Push a file that only grows, if it is longer here than in the store."""
        there = self.find(path)
        if path.exists() and (there is None or path.stat().st_size > (there.size_bytes or 0)):
            self.push(path)

    def pull_log(self, path: Path) -> None:
        """Pull a file that only grows, if it is longer in the store than here."""
        there = self.find(path)
        if there is not None and (not path.exists() or path.stat().st_size < (there.size_bytes or 0)):
            self.pull(path)

    # --- the rest ---

    def probe(self) -> None:
        """Write, read and delete a small object. ValueError naming URI and cause if that fails or takes too long."""
        once = replace(self, retry_waits_s=())
        path, text = self.local / f"probe-{uuid.uuid4().hex}", b"can this be written?"
        outcome: list[Exception | None] = []

        def attempt() -> None:
            try:
                once.write(path, text)
                if once.read(path) != text:
                    raise OSError("what was written could not be read back")
                once.delete(path)
                outcome.append(None)
            except Exception as error:  # pyarrow has many kinds: OSError, ValueError, NotImplementedError, ...
                outcome.append(error)

        thread = threading.Thread(target=attempt, name="probe-storage", daemon=True)
        thread.start()
        thread.join(PROBE_TIMEOUT_S)
        cause = outcome[0] if outcome else f"no answer in {PROBE_TIMEOUT_S:.0f} s"
        if cause is not None:
            raise ValueError(
                f"--storage {self.uri} cannot be written: {cause}\nCheck the bucket's name, region or "
                "endpoint_override in the URI, and the right to write: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or "
                "the machine's role for s3, GOOGLE_APPLICATION_CREDENTIALS for gs."
            )

    @property
    def _fs(self) -> Any:
        return _file_system(self.uri)[0]

    def _key(self, path: Path) -> str:
        base = _file_system(self.uri)[1]
        relative = path.relative_to(self.local).as_posix()
        return base if relative == "." else f"{base}/{relative}"

    def _put_whole(self, path: Path, put: Callable[[str], None]) -> None:
        """An object store shows an object when it is closed; a folder would show it growing, and needs its parents."""
        key = self._key(path)
        if self._fs.type_name != "local":
            put(key)
            return
        self._fs.create_dir(key.rpartition("/")[0], recursive=True)
        temporary = f"{key.rpartition('/')[0]}/.{path.name}.{uuid.uuid4().hex}.tmp"
        try:
            put(temporary)
            self._fs.move(temporary, key)
        except BaseException:
            with contextlib.suppress(OSError):
                self._fs.delete_file(temporary)
            raise

    def _tried(self, what: str, path: Path, attempt: Callable[[], Result]) -> Result:
        for wait_s in (*self.retry_waits_s, None):
            try:
                return attempt()
            except FileNotFoundError:
                raise
            except OSError as error:
                if error.errno in LASTING:
                    raise OSError(error.errno, f"cannot {what} {self.uri_of(path)}: {error}") from error
                if wait_s is None:
                    tries = len(self.retry_waits_s) + 1
                    again = f" after {tries} tries" if tries > 1 else ""
                    raise ConnectionError(f"cannot {what} {self.uri_of(path)}{again}: {error}") from error
                logger.info("%s: %s; trying again in %g s", self.uri_of(path), error, wait_s)
            time.sleep(wait_s)
        raise AssertionError("not reached")


def _in_order(names: Collection[str], skip: Collection[str], last: str) -> list[str]:
    wanted = [name for name in names if not name.startswith(".") and name not in skip]
    return sorted(wanted, key=lambda name: (name == last, name))


class Every:
    """Calls a function at an interval in a thread of its own, until closed. A failed call is tried at the next turn."""

    def __init__(self, interval_s: float, call: Callable[[], None], name: str):
        self._closed = threading.Event()
        self._interval_s, self._call = interval_s, call
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closed.wait(self._interval_s):
            try:
                self._call()
            except Exception as error:  # whatever it is, the thread must go on looking
                logger.warning("%s: %s: %s", self._thread.name, type(error).__name__, error)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> Every:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

"""Fetching files whole or not at all, with retries, and without waiting where there is no network.

A file grows under a temporary name and gets its own when its size and, where one is known, its SHA-256 are right. What
a dropped connection or a killed process left is gone on with if the source can (HTTP Range and If-Range).
"""

from __future__ import annotations

import contextlib
import email.utils
import functools
import hashlib
import http.client
import json
import os
import random
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from nanochat_ray.corpus.part import CHUNK_BYTES, Part
from nanochat_ray.corpus.source import DownloadError, TryAgain, is_http, open_remote

OFFLINE_VARIABLE = "NANOCHAT_RAY_OFFLINE"  # "1": never try the network
PROBE_TIMEOUT_S = 5.0
LONGEST_ASKED_WAIT_S = 900.0  # of a server's Retry-After; more is an error, so that nobody waits in silence

Result = TypeVar("Result")
Check = Callable[[Path], str | None]  # what is wrong with a file, if anything


@dataclass(frozen=True)
class Retry:
    """When to try again: `tries` in a row that brought nothing new, with waits that double and vary."""

    tries: int = 5
    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0

    def wait_s(self, failures: int) -> float:
        """Seconds before the next try: half to all of the doubled wait, so that many readers do not come at once."""
        return min(self.first_wait_s * 2 ** (failures - 1), self.longest_wait_s) * random.uniform(0.5, 1.0)


RETRY = Retry()


class Cancelled(DownloadError):
    """The caller asked to stop; what has come is kept."""


TRANSIENT = (
    urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError, TryAgain
)  # fmt: skip


@dataclass(frozen=True)
class Fetched:
    """A file that lies on the disk now."""

    size_bytes: int
    sha256: str
    revision: str | None = None  # the commit that the hub names for it


# --- retries -----------------------------------------------------------------------------------------------------


@functools.cache
def _host_answers(host: str) -> bool:
    """Whether this host answers at all, asked once per process. A thread, because a name look-up has no timeout."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(host, method="HEAD"), timeout=PROBE_TIMEOUT_S).close()
        except urllib.error.HTTPError as error:
            error.close()  # an error page is an answer too
        except (OSError, http.client.HTTPException):
            return
        answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_TIMEOUT_S)
    return bool(answers)


def why_unreachable(url: str) -> str | None:
    """Why nothing can be fetched from this address' host, or None if it can be tried."""
    if not is_http(url):
        return None
    if os.environ.get(OFFLINE_VARIABLE) == "1":
        return f"{OFFLINE_VARIABLE}=1"
    parts = urllib.parse.urlsplit(url)
    return None if _host_answers(f"{parts.scheme}://{parts.netloc}/") else f"{parts.netloc} does not answer"


def _retry_after_s(headers: Any) -> float | None:
    """Seconds that a Retry-After header asks for, given as a number or as a date."""
    text = (headers.get("Retry-After") or "").strip()
    if text.isdigit():
        return float(text)
    with contextlib.suppress(ValueError):
        return max(0.0, (email.utils.parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    return None


def _with_retries(
    url: str, attempt: Callable[[], Result], retry: Retry, has_grown: Callable[[], bool], stop: threading.Event | None
) -> Result:
    failures = 0
    while True:
        asked_s: float | None = None
        try:
            return attempt()
        except urllib.error.HTTPError as error:
            error.close()
            problem: Exception = error
            if error.code < 500 and error.code not in (408, 416, 429):
                break  # asking again would not help
            if error.code in (429, 503):
                asked_s = _retry_after_s(error.headers)
        except TRANSIENT as error:
            problem = error
        failures = 1 if has_grown() else failures + 1
        if failures >= retry.tries:
            break
        if asked_s is not None and asked_s > LONGEST_ASKED_WAIT_S:
            raise DownloadError(f"{url}: {problem}; the server asks to come back in {asked_s:.0f} s") from problem
        wait_s = max(retry.wait_s(failures), asked_s or 0.0)
        if stop is None:
            time.sleep(wait_s)
        elif stop.wait(wait_s):
            raise Cancelled(f"{url}: cancelled")
    raise DownloadError(f"{url}: {problem}") from problem


# --- files -------------------------------------------------------------------------------------------------------


def fetch_bytes(address: str, token: str | None = None, retry: Retry | None = None) -> bytes:
    """The content of a small file. Raises DownloadError."""

    def attempt() -> bytes:
        with contextlib.closing(open_remote(address, token).stream) as stream:
            return b"".join(iter(lambda: stream.read(CHUNK_BYTES), b""))

    if reason := why_unreachable(address):
        raise DownloadError(f"{address}: {reason}")
    return _with_retries(address, attempt, retry or RETRY, lambda: False, None)


def fetch_json(url: str, token: str | None = None) -> Any:
    """The JSON value behind an address. Raises DownloadError."""
    return json.loads(fetch_bytes(url, token))


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(
    address: str,
    path: Path,
    token: str | None = None,
    *,
    sha256: str | None = None,
    check: Check | None = None,
    retry: Retry | None = None,
    probe: bool = True,
    stop: threading.Event | None = None,
) -> Fetched:
    """Put the file behind an address (http, a URI that pyarrow knows, a path) at `path`, which never has a part of it.

    The size is compared with the source's, the content with `sha256` or the hub's own; `check` may look at the file
    before it gets its name and say what is wrong with it. A second caller for the same path waits for the first.
    `probe=False`: the caller has asked `why_unreachable`. Raises DownloadError, Cancelled once `stop` is set.
    """
    if probe and (reason := why_unreachable(address)):
        raise DownloadError(f"{address}: {reason}")
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with Part.locked(path, address) as part:
            if path.exists() and not existed:  # the process that had the lock was fetching the same file
                part.discard()
                return Fetched(path.stat().st_size, file_sha256(path))
            try:
                return _fetch_part(part, token, sha256, check, retry or RETRY, stop)
            except BaseException:
                part.leave()
                raise
    except DownloadError:
        raise
    except OSError as error:  # of the local disk: full, read-only
        raise DownloadError(f"{address} cannot be written to {path}: {error}") from error


def _fetch_part(
    part: Part, token: str | None, sha256: str | None, check: Check | None, retry: Retry, stop: threading.Event | None
) -> Fetched:
    most = part.size_bytes

    def has_grown() -> bool:
        nonlocal most
        before, most = most, max(most, part.size_bytes)
        return most > before

    def attempt() -> Fetched:
        if not part.is_complete:
            _append_rest(part, token, stop)
        if wrong := _what_is_wrong(part, sha256, check):
            raise TryAgain(wrong)
        fetched = Fetched(part.size_bytes, part.sha256, part.version.revision if part.version else None)
        part.commit()
        return fetched

    return _with_retries(part.address, attempt, retry, has_grown, stop)


def _append_rest(part: Part, token: str | None, stop: threading.Event | None) -> None:
    try:
        remote = open_remote(part.address, token, part.size_bytes, part.validator)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # what is here is longer than the file
            part.restart(None)
        raise
    with contextlib.closing(remote.stream) as stream:
        if not part.size_bytes or remote.start != part.size_bytes or remote.version.validator != part.validator:
            part.restart(remote.version)
            if remote.start:
                raise TryAgain("the file changed at its source")
        while chunk := stream.read(CHUNK_BYTES):
            part.append(chunk)
            if stop is not None and stop.is_set():
                raise Cancelled(f"{part.address}: cancelled")


def _what_is_wrong(part: Part, sha256: str | None, check: Check | None) -> str | None:
    """Why the file is not what it should be, or None; a part that cannot become right is emptied."""
    assert part.version is not None
    expected_bytes, expected = part.version.size_bytes, sha256 or part.version.sha256
    if expected_bytes is not None and part.size_bytes < expected_bytes:  # a dropped connection ends quietly
        return f"{part.size_bytes} of {expected_bytes} bytes arrived"
    wrong = None
    if expected_bytes is not None and part.size_bytes > expected_bytes:
        wrong = f"{part.size_bytes} bytes arrived instead of {expected_bytes}"
    elif expected is not None and part.sha256 != expected:
        wrong = f"its content has the SHA-256 {part.sha256}, not {expected}"
    elif check is not None:
        part.flush()
        wrong = check(part.part)
    if wrong:
        part.restart(None)
    return wrong

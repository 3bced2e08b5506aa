"""Fetching files over HTTP: whole or not at all, with retries, and without waiting where there is no network."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

OFFLINE_VARIABLE = "NANOCHAT_RAY_OFFLINE"  # "1": never try the network
PROBE_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 30.0
RETRY_WAITS_S = (1.0, 3.0, 9.0)
CHUNK_BYTES = 1 << 20

Result = TypeVar("Result")


class DownloadError(OSError):
    """A file could not be fetched."""


@dataclass(frozen=True)
class Fetched:
    """A file that lies on the disk now."""

    size_bytes: int
    sha256: str
    revision: str | None  # the commit that the hub names for it


TRANSIENT = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, DownloadError)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, keeps the hub's commit name, and shows the token to the first host only."""

    def __init__(self) -> None:
        self.revision: str | None = None

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        self.revision = headers.get("X-Repo-Commit") or self.revision
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and urllib.parse.urlsplit(newurl).netloc != urllib.parse.urlsplit(req.full_url).netloc:
            new.remove_header("Authorization")
        return new


@functools.cache
def _host_answers(host: str) -> bool:
    """Whether this host answers at all, asked once per process. A thread, because a name look-up has no timeout."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(host, method="HEAD"), timeout=PROBE_TIMEOUT_S).close()
        except urllib.error.HTTPError:
            pass  # an error page is an answer too
        except (OSError, http.client.HTTPException):
            return
        answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_TIMEOUT_S)
    return bool(answers)


def why_unreachable(url: str) -> str | None:
    """Why nothing can be fetched from this address' host, or None if it can be tried."""
    if os.environ.get(OFFLINE_VARIABLE) == "1":
        return f"{OFFLINE_VARIABLE}=1"
    parts = urllib.parse.urlsplit(url)
    return None if _host_answers(f"{parts.scheme}://{parts.netloc}/") else f"{parts.netloc} does not answer"


def _with_retries(url: str, attempt: Callable[[], Result]) -> Result:
    reason = why_unreachable(url)
    if reason:
        raise DownloadError(f"{url}: {reason}")
    for wait_s in (*RETRY_WAITS_S, None):
        try:
            return attempt()
        except urllib.error.HTTPError as error:
            problem: Exception = error
            if error.code < 500 and error.code not in (408, 429):
                break  # asking again would not help
        except TRANSIENT as error:
            problem = error
        if wait_s is not None:
            time.sleep(wait_s)
    raise DownloadError(f"{url}: {problem}") from problem


def _open(url: str, token: str | None) -> tuple[Any, _Redirects]:
    redirects = _Redirects()
    headers = {"User-Agent": "nanochat-ray"} | ({"Authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(url, headers=headers)
    return urllib.request.build_opener(redirects).open(request, timeout=READ_TIMEOUT_S), redirects


def fetch_json(url: str, token: str | None = None) -> Any:
    """The JSON value behind an address. Raises DownloadError."""

    def attempt() -> Any:
        response, _ = _open(url, token)
        with response:
            return json.loads(response.read())

    return _with_retries(url, attempt)


def fetch(url: str, path: Path, token: str | None = None) -> Fetched:
    """Put the file behind an address at `path`, which never holds a part of it. Raises DownloadError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")

    def attempt() -> Fetched:
        path.parent.mkdir(parents=True, exist_ok=True)
        response, redirects = _open(url, token)
        digest, size_bytes = hashlib.sha256(), 0
        with response, open(temporary, "wb") as file:
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                digest.update(chunk)
                size_bytes += len(chunk)
            file.flush()
            os.fsync(file.fileno())
        expected = response.headers.get("Content-Length")
        if expected is not None and int(expected) != size_bytes:  # a dropped connection ends the stream quietly
            raise DownloadError(f"{url}: {size_bytes} of {expected} bytes arrived")
        os.replace(temporary, path)
        return Fetched(size_bytes, digest.hexdigest(), response.headers.get("X-Repo-Commit") or redirects.revision)

    try:
        return _with_retries(url, attempt)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()

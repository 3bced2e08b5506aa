"""Opening files at their source: over HTTP, or in any file system that pyarrow knows, from any byte on."""

from __future__ import annotations

import contextlib
import re
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

READ_TIMEOUT_S = 30.0
SHA256 = re.compile(r"[0-9a-f]{64}")


class DownloadError(OSError):
    """A file could not be fetched."""


class TryAgain(Exception):
    """Something went wrong that another try may mend."""


@dataclass(frozen=True)
class Version:
    """What a source says of a file's content."""

    validator: str | None  # changes with the content; None: a part of it cannot be gone on with
    size_bytes: int | None
    sha256: str | None = None
    revision: str | None = None  # the commit that the hub names for it


@dataclass(frozen=True)
class Remote:
    """An opened file."""

    stream: Any  # read(n) -> bytes, close()
    start: int  # of the first byte that the stream gives
    version: Version


def is_http(address: str) -> bool:
    return address.startswith(("http://", "https://"))


def join_address(base: str, name: str) -> str:
    """The address of a file in the folder behind `base`, which may have a query."""
    path, mark, query = base.partition("?") if "://" in base else (base, "", "")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


def file_system(address: str) -> tuple[Any, str]:
    """pyarrow's file system for a URI or a local path, and the path within it. ValueError if it knows no such URI."""
    from pyarrow import fs

    if "://" not in address:
        return fs.LocalFileSystem(), str(Path(address).expanduser().resolve())
    try:
        return fs.FileSystem.from_uri(address)
    except ValueError as error:  # also pyarrow's own errors
        raise ValueError(f"{address}: {error}; http(s)://, s3://, gs://, hdfs:// or a folder is needed") from error


def open_remote(address: str, token: str | None = None, offset: int = 0, validator: str | None = None) -> Remote:
    """Open a file from byte `offset` on if it is still the version of `validator` and its source can, else from 0.

    Raises TryAgain or what urllib raises for what may be mended, DownloadError for what may not.
    """
    return _open_http(address, token, offset, validator) if is_http(address) else _open_file(address, offset, validator)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, keeps what the hub says on the way, and shows the token to the first host only."""

    def __init__(self) -> None:
        self.said: dict[str, str] = {}

    def note(self, headers: Any) -> None:
        for name in ("X-Repo-Commit", "X-Linked-Etag"):
            if headers.get(name):
                self.said.setdefault(name, headers[name])

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        self.note(headers)
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and urllib.parse.urlsplit(newurl).netloc != urllib.parse.urlsplit(req.full_url).netloc:
            new.remove_header("Authorization")
        return new

    @property
    def sha256(self) -> str | None:
        """The hub's ETag of a large file is the SHA-256 of its content."""
        tag = self.said.get("X-Linked-Etag", "").strip('"').lower()
        return tag if SHA256.fullmatch(tag) else None


def _open_http(url: str, token: str | None, offset: int, validator: str | None) -> Remote:
    redirects = _Redirects()
    headers = {"User-Agent": "nanochat-ray"} | ({"Authorization": f"Bearer {token}"} if token else {})
    if offset and validator:
        headers |= {"Range": f"bytes={offset}-", "If-Range": validator}
    request = urllib.request.Request(url, headers=headers)
    response = urllib.request.build_opener(redirects).open(request, timeout=READ_TIMEOUT_S)
    redirects.note(response.headers)
    length = response.headers.get("Content-Length")
    start, size = 0, int(length) if length is not None else None
    if response.status == 206:
        said = response.headers.get("Content-Range", "")
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", said.strip())
        if found is None or int(found[1]) != offset:
            response.close()
            raise TryAgain(f"the bytes from {offset} on were asked for, and {said!r} came")
        start = offset
        size = int(found[2]) if found[2] != "*" else None if size is None else offset + size
    etag = response.headers.get("ETag")
    strong = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")
    return Remote(response, start, Version(strong, size, redirects.sha256, redirects.said.get("X-Repo-Commit")))


class _Stream:
    """A pyarrow stream whose failures can be told from those of the local disk."""

    def __init__(self, file: Any):
        self.file = file

    def read(self, n: int) -> bytes:
        try:
            return self.file.read(n)
        except OSError as error:
            raise TryAgain(str(error)) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.file.close()


def _open_file(address: str, offset: int, validator: str | None) -> Remote:
    system, path = file_system(address)
    try:
        info = system.get_file_info(path)
        if not info.is_file:
            raise DownloadError(f"{address}: there is no such file")
        version = Version(f"{info.size} bytes, {info.mtime_ns}", info.size)
        start = offset if validator == version.validator else 0
        stream = system.open_input_file(path)
        stream.seek(start)
    except DownloadError:
        raise
    except OSError as error:
        raise TryAgain(str(error)) from error
    return Remote(_Stream(stream), start, version)

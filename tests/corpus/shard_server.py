"""A web server on this machine that has shards, and all the ways in which a server can fail."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

PIECE = 16384


@dataclass
class ShardServer:
    """Files by path, the troubles that come first for each, and what was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    url: str = ""
    ranges: bool = True  # whether it honours Range
    tags: bool = True  # whether it sends an ETag
    is_hub: bool = False  # whether it tells the SHA-256 as the hub does
    bytes_per_s: float | None = None
    statuses: dict[str, list[tuple[int, dict[str, str]]]] = field(default_factory=dict)  # answered first
    drop_after: dict[str, list[int]] = field(default_factory=dict)  # bytes of the body, then the connection ends
    instead: dict[str, list[bytes]] = field(default_factory=dict)  # bodies that are wrong, with a right length
    short: dict[str, int] = field(default_factory=dict)  # always this many bytes, and a Content-Length that says so
    held: dict[str, threading.Event] = field(default_factory=dict)  # answered once the event is set
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # path, Range
    times: list[tuple[str, float]] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)  # bytes of bodies, by path
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]

    def forget(self) -> None:
        self.asked.clear()
        self.sent.clear()


@contextlib.contextmanager
def serving(server: ShardServer) -> Iterator[ShardServer]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_GET(self) -> None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the reader was killed
                answer(self, server)

        def log_message(self, *args: Any) -> None:
            pass

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.daemon_threads = True
    server.url = f"http://127.0.0.1:{web.server_port}"
    threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        for event in server.held.values():
            event.set()
        web.shutdown()
        web.server_close()


def answer(request: http.server.BaseHTTPRequestHandler, server: ShardServer) -> None:
    path, wanted = request.path, request.headers.get("Range")
    with server.lock:
        server.asked.append((path, wanted))
        server.times.append((path, time.monotonic()))
    if path in server.held:
        server.held[path].wait(60)
    if server.statuses.get(path):
        status, headers = server.statuses[path].pop(0)
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", "0")
        request.end_headers()
        return
    if path not in server.files:
        request.send_error(404)
        return
    right = server.files[path]
    body = server.instead[path].pop(0) if server.instead.get(path) else right
    body = body[: server.short.get(path, len(body))]
    tag = '"' + hashlib.md5(body).hexdigest() + '"'
    start = 0
    if wanted and server.ranges and request.headers.get("If-Range") in (None, tag):
        start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(body):
            request.send_response(416)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        request.send_response(206)
        request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
    else:
        request.send_response(200)
    request.send_header("Content-Length", str(len(body) - start))
    if server.tags:
        request.send_header("ETag", tag)
    if server.is_hub:
        request.send_header("X-Repo-Commit", "c0ffee")
        request.send_header("X-Linked-Etag", f'"{hashlib.sha256(right).hexdigest()}"')
    request.end_headers()
    stop = len(body)
    if server.drop_after.get(path):
        stop = min(stop, start + server.drop_after[path].pop(0))
    with server.lock:
        server.at_once += 1
        server.most_at_once = max(server.most_at_once, server.at_once)
    for piece in range(start, stop, PIECE):
        part = body[piece : min(piece + PIECE, stop)]
        if server.bytes_per_s:
            time.sleep(len(part) / server.bytes_per_s)
        with server.lock:
            server.sent[path] = server.sent.get(path, 0) + len(part)
            server.at_once -= piece + PIECE >= stop  # before the reader can have the last byte and come again
        request.wfile.write(part)
    request.close_connection = True

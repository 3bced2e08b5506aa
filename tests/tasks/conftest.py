"""Small data sets on the disk, and a hub on this machine."""

from __future__ import annotations

import http.server
import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_ray.corpus import download


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    return path


@dataclass
class Hub:
    """A web server: files by path, failures to come first, redirects, and what was asked of it."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    failures: dict[str, list[int]] = field(default_factory=dict)  # status codes to answer with first, by path
    truncate: set[str] = field(default_factory=set)  # paths whose body ends early
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # path, authorization


def serve(hub: Hub) -> http.server.ThreadingHTTPServer:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_GET(self) -> None:
            hub.asked.append((self.path, self.headers.get("Authorization")))
            if hub.failures.get(self.path):
                self.send_error(hub.failures[self.path].pop(0))
            elif self.path in hub.redirects:
                self.send_response(302)
                self.send_header("Location", hub.redirects[self.path])
                self.send_header("X-Repo-Commit", "c0ffee")
                self.end_headers()
            elif self.path in hub.files:
                body = hub.files[self.path]
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[:-1] if self.path in hub.truncate else body)
            else:
                self.send_error(404)

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(download, "RETRY", download.Retry(3, 0.0))
    monkeypatch.delenv(download.OFFLINE_VARIABLE, raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    hub = Hub()
    server = serve(hub)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv(download.OFFLINE_VARIABLE, "1")

"""A hub for tests: repositories of files behind the few addresses that publishing asks for; a commit is one request."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What the server holds: files by repository, and how often it was written to."""

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    commits: int = 0
    refuse_commits: bool = False

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        files = dict(self.repos[repo])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.repos[repo] = files
        self.commits += 1


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, body: Any = b"", **headers: str) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            repo, found, file = path[1:].partition("/resolve/main/")
            if found:
                if (data := hub.repos.get(repo, {}).get(file)) is None:
                    return self.answer(404, X_Error_Code="EntryNotFound")
                etag = f'"{hashlib.sha256(data).hexdigest()}"'
                return self.answer(200, data, ETag=etag, X_Repo_Commit="c" * 40)
            repo = "/".join(path.removeprefix("/api/models/").split("/")[:2])
            if repo not in hub.repos:
                return self.answer(404, X_Error_Code="RepoNotFound")
            names = sorted(hub.repos[repo])
            if "/tree/" in path:
                return self.answer(200, [
                    {"type": "file", "path": name, "size": len(hub.repos[repo][name]), "oid": "0"} for name in names
                ])
            siblings = [{"rfilename": name} for name in names]
            self.answer(200, {"id": repo, "private": hub.private[repo], "sha": "c" * 40, "siblings": siblings})

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path == "/api/repos/create":
                wanted = json.loads(body)
                repo = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
                hub.repos.setdefault(repo, {})
                hub.private.setdefault(repo, wanted.get("private") or wanted.get("visibility") == "private")
                return self.answer(200, {"url": f"{hub.url}/{repo}"})
            if self.path == "/api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            repo = "/".join(self.path.removeprefix("/api/models/").split("/")[:2])
            if "/preupload/" in self.path:
                wanted = [file["path"] for file in json.loads(body)["files"]]
                return self.answer(200, {"files": [
                    {"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for path in wanted
                ]})
            if "/commit/" in self.path:
                if hub.refuse_commits:
                    return self.answer(403, {"error": "no"})
                hub.commit(repo, [json.loads(line) for line in body.splitlines()])
                return self.answer(200, {"commitUrl": f"{hub.url}/{repo}/commit/{'c' * 40}", "commitOid": "c" * 40})
            self.answer(404)

    return Handler


@contextlib.contextmanager
def hub_server() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()

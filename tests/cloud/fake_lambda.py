"""A Lambda Cloud on the loopback device: its instances, its limits and its bad days.

Every request and every answer is checked against the facts of the real API's description; what does not fit is kept in
`violations`. Instances boot after a while, appear and vanish as a test wants.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jsonschema

from tests.cloud import api_facts

KEY = "secret_test_0123456789"
LIST, TYPES, SSH_KEYS = "get /api/v1/instances", "get /api/v1/instance-types", "get /api/v1/ssh-keys"
FILE_SYSTEMS = "get /api/v1/file-systems"
LAUNCH = "post /api/v1/instance-operations/launch"
TERMINATE = "post /api/v1/instance-operations/terminate"
MACHINES = {  # vcpus, GiB, GPUs, cents an hour
    "cpu_4x_general": (4, 16, 0, 20), "gpu_1x_a10": (30, 200, 1, 75), "gpu_8x_h100_sxm5": (208, 1800, 8, 2392),
    "gpu_1x_a6000": (14, 100, 1, 80),
}  # fmt: skip


@dataclass
class Fault:
    """What goes wrong with the next requests of a kind. `how`: an HTTP status, or lost before or after it was done."""

    request: str
    how: int | str  # 429, 500, ..., "lost before", "lost after", "garbage"
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    def __init__(self, status: int, code: str, message: str = "no") -> None:
        self.status = status
        self.error = {"code": code, "message": message, "suggestion": "think"}


class FakeLambda:
    """The server and its state; `scale` makes its clock's limits shorter. Use `serve`."""

    def __init__(self, scale: float = 0.01, boot_s: float = 0.05) -> None:
        self.facts = api_facts.load()
        self.scale, self.boot_s = scale, boot_s
        self.url = ""
        self.lock = threading.RLock()
        self.instances: dict[str, dict[str, Any]] = {}
        self.born: dict[str, float] = {}
        self.hidden_s = 0.0  # how long a launched instance is missing from the list
        self.capacity = {name: ["us-east-1", "us-west-1"] for name in MACHINES}
        self.ssh_keys = {"my-key": "ssh-ed25519 AAAA test"}
        self.file_systems = {"my-files": "us-east-1"}
        self.quota = 100
        self.faults: list[Fault] = []
        self.seen: list[tuple[str, Any]] = []  # requests that were answered, with their bodies
        self.violations: list[str] = []
        self.last = {"request": 0.0, "launch": 0.0}
        self.addresses: Callable[[int], tuple[str, str]] = lambda n: (f"198.51.100.{n}", f"10.0.0.{n}")
        self.on_terminate: Callable[[str], None] = lambda instance_id: None
        self.stuck: set[str] = set()  # instances that are never ended

    # --- what a test does ---------------------------------------------------------------------------------------------

    def alive(self) -> list[str]:
        """Ids of what costs money, in the order of launch."""
        with self.lock:
            costly = ("booting", "active", "unhealthy")
            return [name for name, each in self.instances.items() if each["status"] in costly]

    def becomes(self, instance_id: str, status: str) -> None:
        with self.lock:
            self.instances[instance_id]["status"] = status

    def forget(self, instance_id: str) -> None:
        with self.lock:
            del self.instances[instance_id]

    def tags(self, instance_id: str) -> dict[str, str]:
        return {each["key"]: each["value"] for each in self.instances[instance_id]["tags"]}

    def count(self, request: str) -> int:
        return sum(name == request for name, _ in self.seen)

    # --- what it does -------------------------------------------------------------------------------------------------

    def answer(self, request: str, body: Any, authorization: str) -> tuple[int, dict[str, str], Any]:
        """Status, headers and answer of one request; a status 0 is no answer at all."""
        facts = self.facts["requests"].get(request)
        if facts is None:
            self.violations.append(f"no such request: {request}")
            return 404, {}, {}
        if authorization != f"Bearer {KEY}":
            return self.checked(request, 401, Refusal(401, "global/invalid-api-key").error)
        with self.lock:
            if self.too_fast(request):
                return 429, {"Retry-After": "0"}, {"error": {"code": "global/too-many-requests", "message": "slow"}}
            fault = next((each for each in self.faults if each.request == request and each.times > 0), None)
            if fault:
                fault.times -= 1
                if fault.how != "lost after":
                    status = fault.how if isinstance(fault.how, int) else 0 if "lost" in fault.how else 200
                    return status, fault.headers, {}
            self.seen.append((request, body))
            try:
                if facts["body"] is not None:
                    self.check(f"body of {request}", body, facts["body"])
                    known = self.facts["components"]["schemas"][facts["body"]["$ref"].rpartition("/")[2]]["properties"]
                    if unknown := body.keys() - known.keys():
                        self.violations.append(f"{request}: unknown fields {unknown}")
                status, _, answer = self.checked(request, 200, self.do(request, body))
            except Refusal as refusal:
                status, _, answer = self.checked(request, refusal.status, refusal.error)
            return (0 if fault else status), {}, answer

    def checked(self, request: str, status: int, content: Any) -> tuple[int, dict[str, str], Any]:
        answer = {"data": content} if status == 200 else {"error": content}
        self.check(f"answer {status} of {request}", answer, self.facts["requests"][request]["answers"][str(status)])
        return status, {}, answer

    def check(self, what: str, value: Any, schema: Any) -> None:
        try:
            jsonschema.Draft202012Validator({**schema, "components": self.facts["components"]}).validate(value)
        except jsonschema.ValidationError as trouble:
            self.violations.append(f"{what}: {trouble.message}")

    def too_fast(self, request: str) -> bool:
        """Whether it comes too soon behind the last one; half of the limit, for the way here is not always as long."""
        limits, now = self.facts["limits"], time.monotonic()
        kinds = {"request": limits["request_gap_s"]} | ({"launch": limits["launch_gap_s"]} if request == LAUNCH else {})
        if any(now - self.last[kind] < gap_s * self.scale / 2 for kind, gap_s in kinds.items()):
            return True
        self.last.update(dict.fromkeys(kinds, now))
        return False

    def do(self, request: str, body: Any) -> Any:
        if request == LIST:
            return [self.shown(name) for name in self.instances if time.monotonic() - self.born[name] >= self.hidden_s]
        if request == TYPES:
            return {name: {"instance_type": machine(name), "regions_with_capacity_available": regions(free)}
                    for name, free in self.capacity.items()}  # fmt: skip
        if request == SSH_KEYS:
            return [{"id": f"id {name}", "name": name, "public_key": key} for name, key in self.ssh_keys.items()]
        if request == FILE_SYSTEMS:
            user = {"id": "u1", "email": "a@example.com", "status": "active"}
            return [{"id": f"id {name}", "name": name, "mount_point": f"/lambda/nfs/{name}", "created_by": user,
                     "created": "2025-01-01T00:00:00Z", "is_in_use": False, "region": regions([region])[0]}
                    for name, region in self.file_systems.items()]  # fmt: skip
        return self.launch(body) if request == LAUNCH else self.terminate(body["instance_ids"])

    def launch(self, body: dict[str, Any]) -> dict[str, Any]:
        kind, region = body["instance_type_name"], body["region_name"]
        if kind not in MACHINES or not set(body["ssh_key_names"]) <= self.ssh_keys.keys():
            raise Refusal(404, "global/object-does-not-exist", "type or key")
        for name in body.get("file_system_names", ()):
            if self.file_systems.get(name) != region:
                raise Refusal(400, "instance-operations/launch/file-system-in-wrong-region")
        if region not in self.capacity[kind]:
            raise Refusal(400, "instance-operations/launch/insufficient-capacity", "Not enough capacity.")
        if len(self.alive()) >= self.quota:
            raise Refusal(400, "global/quota-exceeded")
        name = uuid.uuid4().hex
        can = {"available": True}
        self.born[name] = time.monotonic()
        self.instances[name] = {
            "id": name, "name": body.get("name", ""), "status": "booting", "ssh_key_names": body["ssh_key_names"],
            "file_system_names": body.get("file_system_names", []), "region": regions([region])[0],
            "instance_type": machine(kind), "tags": body.get("tags", []),
            "actions": dict.fromkeys(("migrate", "rebuild", "restart", "cold_reboot", "terminate"), can),
        }  # fmt: skip
        return {"instance_ids": [name]}

    def shown(self, name: str) -> dict[str, Any]:
        each = self.instances[name]
        if each["status"] == "booting" and time.monotonic() - self.born[name] >= self.boot_s:
            ip, private_ip = self.addresses(list(self.instances).index(name))
            each |= {"status": "active", "ip": ip, "private_ip": private_ip}
        return dict(each)

    def terminate(self, ids: list[str]) -> dict[str, Any]:
        for name in ids:
            if name not in self.instances or self.instances[name]["status"] == "terminated":
                raise Refusal(404, "global/object-does-not-exist")
        ended = [name for name in ids if name not in self.stuck]
        for name in ended:
            self.instances[name]["status"] = "terminating"
            self.on_terminate(name)
        return {"terminated_instances": [dict(self.instances[name]) for name in ended]}


def machine(name: str) -> dict[str, Any]:
    vcpus, memory_gib, gpus, cents = MACHINES[name]
    specs = {"vcpus": vcpus, "memory_gib": memory_gib, "storage_gib": 512, "gpus": gpus}
    return {"name": name, "description": name, "gpu_description": "GPU", "price_cents_per_hour": cents, "specs": specs}


def regions(names: list[str]) -> list[dict[str, str]]:
    return [{"name": name, "description": name} for name in names]


@contextmanager
def serve(fake: FakeLambda, host: str = "127.0.0.1") -> Iterator[FakeLambda]:
    """Answer at a free port of `host`; the fake's url says which."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.reply("get")

        def do_POST(self) -> None:
            self.reply("post")

        def reply(self, method: str) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            content = json.loads(body) if body else None
            authorization = self.headers.get("Authorization", "")
            status, headers, answer = fake.answer(f"{method} {self.path}", content, authorization)
            if status == 0:
                self.close_connection = True
                return
            text = json.dumps(answer).encode()
            self.send_response(status)
            headers |= {"Content-Length": str(len(text)), "Content-Type": "application/json"}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer((host, 0), Handler)
    server.daemon_threads = True
    fake.url = f"http://{host}:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

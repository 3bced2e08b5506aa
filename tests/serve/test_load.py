"""Load of bounded size with a replica killed in the middle; and `serve run` with a config, as a person starts it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.jobs.running import environment
from tests.serve.runs import make_run
from tests.serve.server import Server, free_port, until

CONFIGS = Path(__file__).parent.parent.parent / "serve_configs"
REQUESTS = 60
ROWS = 4
pytestmark = pytest.mark.slow


@dataclass
class Outcome:
    """What one client saw."""

    stream: bool
    asked_s: float = field(default_factory=time.monotonic)
    status: int = 0
    first_s: float | None = None  # when the first text came
    text: str = ""
    error: str | None = None  # the code of the stream's error event
    whole: bool = False


def ask(url: str, number: int) -> Outcome:
    """A request of some size; every second one streams."""
    rng = random.Random(number)
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "bread and lantern " * rng.randint(1, 60)}],
        "max_tokens": rng.choice([5, 50, 200, 400]), "seed": number, "stream": number % 2 == 0,
    }  # fmt: skip
    outcome = Outcome(stream=body["stream"])
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=90) as answer:
        outcome.status = answer.status_code
        if not outcome.stream:
            message = json.loads(answer.read())
            outcome.text = message["choices"][0]["message"]["content"] if answer.status_code == 200 else ""
            outcome.whole = answer.status_code == 200 and message["usage"]["completion_tokens"] == body["max_tokens"]
            return outcome
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                outcome.whole = True
            elif line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    outcome.error = event["error"]["code"]
                    continue
                text = event["choices"][0]["delta"].get("content") or ""
                outcome.first_s = outcome.first_s or (time.monotonic() if text else None)
                outcome.text += text
    return outcome


def replicas(server: Server, n: int) -> dict[int, dict[str, Any]]:
    """The statistics of all replicas by process id, once there are n alive."""

    def look() -> dict[int, dict[str, Any]]:
        seen = {(stats := server.stats())["pid"]: stats for _ in range(12 * n)}
        return {pid: stats for pid, stats in seen.items() if psutil.pid_exists(pid)}

    return until(lambda: (seen := look()) and len(seen) == n and seen)


@pytest.fixture(scope="module")
def server(ray_cluster, tmp_path_factory) -> Iterator[Server]:
    from ray import serve

    storage = tmp_path_factory.mktemp("storage")
    make_run(storage)
    # In bf16 torch keeps CPU code for every shape that it has met: memory would grow for a thousand requests.
    yield Server(storage, {"replicas": 2, "max_rows": ROWS, "max_queue": REQUESTS, "dtype": "float32"})
    serve.shutdown()


def load(server: Server) -> list[Outcome]:
    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(lambda number: ask(server.url, number), range(REQUESTS)))


def rss_mb(pid: int) -> float:
    return psutil.Process(pid).memory_info().rss / 1e6


def test_a_replica_killed_in_the_middle(server):
    quiet = load(server)
    assert [outcome.status for outcome in quiet] == [200] * REQUESTS
    assert all(outcome.whole and not outcome.error for outcome in quiet)
    load(server)
    victim, survivor = replicas(server, 2)
    before_mb = rss_mb(survivor)
    outcomes: list[Outcome] = []
    running = threading.Thread(target=lambda: outcomes.extend(load(server)))
    running.start()
    until(lambda: server.stats()["running"] == ROWS)
    time.sleep(0.3)
    killed_s = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    running.join(timeout=120)
    assert not running.is_alive(), "a request hangs"
    assert [outcome.status for outcome in outcomes] == [200] * REQUESTS
    broken = [outcome for outcome in outcomes if not outcome.whole]
    assert broken, "the replica had nothing to do"
    for outcome in broken:  # only what had begun to stream
        assert outcome.stream and outcome.error == "stream_interrupted"
        assert outcome.first_s is None or outcome.first_s <= killed_s + 1
    assert len(broken) <= 2 * ROWS
    after = replicas(server, 2)
    assert victim not in after and survivor in after
    until(lambda: all(stats["running"] == stats["waiting"] == 0 for stats in replicas(server, 2).values()))
    for stats in replicas(server, 2).values():
        assert all(model["blocks_used"] == 0 for model in stats["models"].values())
    assert load(server) and rss_mb(survivor) < before_mb + 30


def test_a_conversation_stays_with_its_replica(server):
    replicas(server, 2)

    def replica_of(session: str) -> int:
        return httpx.get(f"{server.url}/stats", headers={"x-session-id": session}).json()["pid"]

    places = {session: {replica_of(session) for _ in range(6)} for session in (f"conversation-{k}" for k in range(12))}
    assert all(len(pids) == 1 for pids in places.values())
    assert len(set().union(*places.values())) == 2


def until_chat(url: str, process: subprocess.Popen[str]) -> dict[str, Any]:
    """The first answer of a server that is starting."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        try:
            body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
            if answer.status_code == 200:
                return answer.json()
            assert answer.status_code in (404, 503) and answer.json()["error"]["message"]
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError("no answer")


def serve_run(storage: Path, folder: Path, **env: str) -> tuple[subprocess.Popen[str], str]:
    """`serve run` with the CPU config on another port; the process and the server's address."""
    port = free_port()
    config = folder / "chat_cpu.yaml"
    text = (CONFIGS / "chat_cpu.yaml").read_text()
    assert "port: 8000" in text
    config.write_text(text.replace("port: 8000", f"port: {port}"))
    command = [str(Path(sys.executable).parent / "serve"), "run", str(config)]
    env = environment(storage, RAY_AUTH_MODE="disabled", RAY_ADDRESS="local", RAY_USAGE_STATS_ENABLED="0", **env)
    process = subprocess.Popen(
        command, cwd=folder, env=env, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    return process, f"http://127.0.0.1:{port}"


def test_serve_run_with_a_config_answers_until_ctrl_c(tmp_path):
    make_run(tmp_path)
    process, url = serve_run(tmp_path, tmp_path)
    try:
        answer = until_chat(url, process)
        assert answer["model"] == "d1-test-sft" and answer["usage"]["completion_tokens"] == 5
        page = httpx.get(url)
        assert page.headers["content-type"].startswith("text/html") and "<html" in page.text
        assert httpx.get(f"{url}/no/such/path").json()["error"]
        assert httpx.get(f"{url}/stats", headers={"host": "chat.example.org"}).status_code == 403
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
        assert "Traceback" not in out
        psutil.wait_procs(children, timeout=30)
        assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    finally:
        process.kill()


def test_serve_run_without_a_run_says_which_command_makes_one(tmp_path):
    process, _ = serve_run(tmp_path, tmp_path)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stdout or ()), daemon=True)
    reader.start()
    try:
        until(lambda: any("python jobs/speedrun.py" in line for line in said))
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)

"""The whole road on a running cluster, by `ray job submit`."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.jobs.running import JOBS, end, environment

pytestmark = pytest.mark.slow
SMOKE = ("--preset", "smoke")
SECRET = "0123456789abcdef0123456789abcdef01234567"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def head(tmp_path):
    """A cluster as `ray start --head` makes it, with a dashboard, ended by the ids of its processes."""
    port, dashboard = free_port(), free_port()
    env = environment(tmp_path, RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", WANDB_API_KEY=SECRET)
    ray = Path(sys.executable).parent / "ray"
    short = tempfile.mkdtemp(prefix="ray")  # Ray's sockets lie below it, and their paths may have 107 bytes
    command = [str(ray), "start", "--head", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=4",
               "--dashboard-agent-listen-port=0", f"--temp-dir={short}", "--object-store-memory=300000000", "--block"]  # fmt: skip
    process = subprocess.Popen(command, env=env, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield f"http://127.0.0.1:{dashboard}", env
    end([*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)])
    process.wait()
    shutil.rmtree(short, ignore_errors=True)


def ask(url: str) -> Any:
    """What the dashboard answers, None as long as it has none."""
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return json.load(response)
    except (OSError, ValueError):
        return None


def look(address: str, seen: dict[str, set[str]]) -> None:
    """Collect the names that the dashboard shows now."""
    runs = ask(f"{address}/api/train/v2/runs/v1") or {"train_runs": []}
    assert SECRET not in json.dumps(runs)
    seen["train"] |= {f"{found['name']} {found['status']}" for found in runs["train_runs"]}
    jobs = ask(f"{address}/api/jobs/") or []
    seen["jobs"] |= {job["status"] for job in jobs if (job["submission_id"] or "").startswith("smoke-")}
    for job in jobs:
        data = ask(f"{address}/api/data/datasets/{job['job_id']}") if job["job_id"] else None
        seen["data"] |= {found["dataset"].partition(" rows_")[0] for found in (data or {"datasets": []})["datasets"]}
    actors = ask(f"{address}/api/v0/actors?detail=1")
    if actors is not None:
        found = actors["data"]["result"]["result"]
        seen["actors"] |= {actor["class_name"] for actor in found} | {actor["name"] or "" for actor in found}


def watched(
    command: list[str], env: dict[str, str], folder: Path, address: str, seen: dict[str, set[str]]
) -> tuple[int, str]:
    """Run a command while looking at the dashboard; its exit code and what it said."""
    with open(folder / "out.txt", "w+") as out:
        process = subprocess.Popen(command, env=env, cwd=folder, stdout=out, stderr=subprocess.STDOUT)
        while process.poll() is None:
            look(address, seen)
            time.sleep(0.5)
        look(address, seen)
        out.seek(0)
        return process.returncode, out.read()


def test_submitted_to_a_running_cluster(head, tmp_path):
    """The whole road on a cluster, with names in the dashboard's views that a person can read, and no keys."""
    address, env = head
    ray = Path(sys.executable).parent / "ray"
    command = [str(ray), "job", "submit", "--address", address, "--working-dir", str(JOBS.parent), "--submission-id"]
    main_job = ["--", sys.executable, "jobs/speedrun.py", *SMOKE, "--storage", str(tmp_path / "runs")]
    deadline = time.monotonic() + 180
    while ask(f"{address}/api/version") is None and time.monotonic() < deadline:
        time.sleep(0.5)
    seen: dict[str, set[str]] = {name: set() for name in ("train", "jobs", "data", "actors")}
    while True:
        code, said = watched([*command, f"smoke-{len(seen['jobs'])}", *main_job], env, tmp_path, address, seen)
        if "No available agent" not in said or time.monotonic() > deadline:
            break
        time.sleep(1)  # the dashboard is up before the node can take jobs
    assert code == 0, said[-5000:]
    assert "Ray: joined" in said and "chat with it" in said
    assert (tmp_path / "runs" / "smoke" / "report" / "report.md").exists()
    assert (tmp_path / "runs" / "smoke" / "chat_eval" / "_SUCCESS").exists()
    assert {"smoke-pretrain-1 RUNNING", "smoke-sft-1 FINISHED"} <= seen["train"]
    assert {"RUNNING", "SUCCEEDED"} <= seen["jobs"]
    assert {"smoke pretrain", "smoke sft"} <= seen["data"]
    assert {"RowDealer", "RayTrainWorker", "evaluate smoke pretrain step 60 #0"} <= seen["actors"]

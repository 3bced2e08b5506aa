"""Runs of minutes, on Ray as a person has it: killed and started again, and submitted to a running cluster."""

from __future__ import annotations

import json
import re
import shutil
import signal
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

from nanochat_ray.report.metrics_log import read_metrics
from tests.jobs.running import JOBS, end, environment, run, start

pytestmark = pytest.mark.slow
SMOKE = ("--preset", "smoke")
SECRET = "0123456789abcdef0123456789abcdef01234567"


def wait_for_step(process: subprocess.Popen, step: int, stage: str) -> None:
    """Read what a job prints until a stage has reached a step."""
    inside = False
    for line in process.stdout:
        inside = inside or line.startswith(f"{stage}: ")
        found = re.match(r"step (\d+)", line)
        if inside and found and int(found[1]) >= step:
            return
    raise AssertionError(f"{stage} ended before step {step}")


def test_killed_then_stopped_then_done(tmp_path):
    """The driver is killed while it pretrains, the same command is stopped while it finetunes, the third is done."""
    command = ("speedrun.py", *SMOKE, "--pretrain.save-every", "10")
    process = start(tmp_path, *command)
    wait_for_step(process, 25, "pretrain")
    orphans = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)
    alive = [orphan for orphan in orphans if orphan.is_running()]
    assert alive, "the law is about orphans that still live"
    try:
        process = start(tmp_path, *command)
        wait_for_step(process, 10, "sft")
        process.terminate()
        out = process.stdout.read()
    finally:
        end(orphans)
    assert process.wait() == 130 and "sft: stopped at step" in out, out

    pretrain = tmp_path / "smoke" / "pretrain"
    result = json.loads((pretrain / "result.json").read_text())
    assert result["metrics"]["resumed_at"] >= 10
    records = read_metrics(pretrain / "metrics.jsonl")
    assert [record["step"] for record in records if "train/loss_step" in record] == list(range(60))

    code, out = run(tmp_path, *command)
    assert code == 0, out
    for said in ("tokenizer: done before, skipped", "pretrain: done before, skipped", "sft: goes on"):
        assert said in out
    report = (tmp_path / "smoke" / "report" / "report.md").read_text()
    assert "BASE | SFT" in report and "pretrain_loss.png" in report


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def head(tmp_path):
    """A cluster as `ray start --head` makes it, with a dashboard, ended by the ids of its processes."""
    port, dashboard = free_port(), free_port()
    env = environment(tmp_path, RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")
    ray = Path(sys.executable).parent / "ray"
    short = tempfile.mkdtemp(prefix="ray")  # Ray's sockets lie below it, and their paths may have 107 bytes
    command = [str(ray), "start", "--head", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=4",
               f"--temp-dir={short}", "--object-store-memory=300000000", "--block"]  # fmt: skip
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
    seen["jobs"] |= {job["status"] for job in jobs if job["submission_id"] == "smoke-1"}
    for job in jobs:
        data = ask(f"{address}/api/data/datasets/{job['job_id']}") if job["job_id"] else None
        seen["data"] |= {found["dataset"].rsplit("_", 1)[0] for found in (data or {"datasets": []})["datasets"]}
    actors = ask(f"{address}/api/v0/actors?detail=1")
    if actors is not None:
        found = actors["data"]["result"]["result"]
        seen["actors"] |= {actor["class_name"] for actor in found} | {actor["name"] or "" for actor in found}


def test_submitted_to_a_running_cluster(head, tmp_path):
    """The whole road on a cluster, with names in the dashboard's views that a person can read, and no keys."""
    address, env = head
    ray = Path(sys.executable).parent / "ray"
    command = [str(ray), "job", "submit", "--address", address, "--submission-id", "smoke-1",
               "--runtime-env-json", json.dumps({"env_vars": {"WANDB_API_KEY": SECRET}}),
               "--working-dir", str(JOBS.parent), "--",
               sys.executable, "jobs/speedrun.py", *SMOKE, "--storage", str(tmp_path / "runs")]  # fmt: skip
    deadline = time.monotonic() + 60
    while ask(f"{address}/api/version") is None and time.monotonic() < deadline:
        time.sleep(0.5)
    seen: dict[str, set[str]] = {name: set() for name in ("train", "jobs", "data", "actors")}
    with open(tmp_path / "out.txt", "w+") as out:
        process = subprocess.Popen(command, env=env, cwd=tmp_path, stdout=out, stderr=subprocess.STDOUT)
        while process.poll() is None:
            look(address, seen)
            time.sleep(0.5)
        look(address, seen)
        out.seek(0)
        said = out.read()
    assert process.returncode == 0, said[-5000:]
    assert "Ray: joined" in said and "chat with it" in said
    assert (tmp_path / "runs" / "smoke" / "report" / "report.md").exists()
    assert (tmp_path / "runs" / "smoke" / "chat_eval" / "_SUCCESS").exists()
    assert {"smoke-pretrain-1 RUNNING", "smoke-sft-1 FINISHED"} <= seen["train"]
    assert {"RUNNING", "SUCCEEDED"} <= seen["jobs"]
    assert {"smoke pretrain rows", "smoke sft rows"} <= seen["data"]
    assert {"RowDealer", "RayTrainWorker", "evaluate smoke pretrain step 60 #0"} <= seen["actors"]

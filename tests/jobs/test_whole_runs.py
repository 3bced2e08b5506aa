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
from pathlib import Path

import psutil
import pytest

from nanochat_ray.report.metrics_log import read_metrics
from tests.jobs.running import JOBS, environment, run, start

pytestmark = pytest.mark.slow
SMOKE = ("--preset", "smoke")


def wait_for_step(process: subprocess.Popen, step: int, stage: str) -> None:
    """Read what a job prints until a stage has reached a step."""
    inside = False
    for line in process.stdout:
        inside = inside or line.startswith(f"{stage}: ")
        found = re.match(r"step (\d+)", line)
        if inside and found and int(found[1]) >= step:
            return
    raise AssertionError(f"{stage} ended before step {step}")


def end(processes: list[psutil.Process]) -> None:
    """End processes that this test started, by their ids."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """The smoke preset, undisturbed."""
    storage = tmp_path_factory.mktemp("calm")
    code, out = run(storage, "speedrun.py", *SMOKE)
    assert code == 0, out
    return storage / "smoke"


def test_a_killed_driver_and_the_same_command_a_second_later(calm, tmp_path):
    process = start(tmp_path, "speedrun.py", *SMOKE, "--pretrain.save-every", "10")
    wait_for_step(process, 25, "pretrain")
    orphans = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)
    alive = [orphan for orphan in orphans if orphan.is_running()]
    assert alive, "the law is about orphans that still live"
    try:
        code, out = run(tmp_path, "speedrun.py", *SMOKE, "--pretrain.save-every", "10")
    finally:
        end(orphans)
    assert code == 0, out
    assert "pretrain: goes on" in out and "tokenizer: done before, skipped" in out
    result = json.loads((tmp_path / "smoke" / "pretrain" / "result.json").read_text())
    assert result["metrics"]["resumed_at"] >= 10
    records = read_metrics(tmp_path / "smoke" / "pretrain" / "metrics.jsonl")
    steps = [record["step"] for record in records if "train/loss_step" in record]
    assert steps == list(range(60))
    undisturbed = json.loads((calm / "pretrain" / "result.json").read_text())
    assert result["metrics"]["val/bpb"] == pytest.approx(undisturbed["metrics"]["val/bpb"], rel=2e-2)
    report = (tmp_path / "smoke" / "report" / "report.md").read_text()
    assert "BASE | SFT" in report and "pretrain_loss.png" in report


def test_sigterm_on_ray_saves_and_goes_on(tmp_path):
    process = start(tmp_path, "speedrun.py", *SMOKE)
    wait_for_step(process, 10, "sft")
    process.terminate()
    out = process.stdout.read()
    assert process.wait() == 130 and "sft: stopped at step" in out
    code, out = run(tmp_path, "speedrun.py", *SMOKE)
    assert code == 0 and "sft: goes on" in out and "pretrain: done before, skipped" in out, out


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


def test_submitted_to_a_running_cluster(head, tmp_path):
    address, env = head
    ray = Path(sys.executable).parent / "ray"
    command = [str(ray), "job", "submit", "--address", address, "--working-dir", str(JOBS.parent), "--",
               sys.executable, "jobs/speedrun.py", *SMOKE, "--storage", str(tmp_path / "runs")]  # fmt: skip
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=500)
        if done.returncode == 0 or time.monotonic() > deadline or "onnect" not in done.stdout + done.stderr:
            break
        time.sleep(2)  # the dashboard is not up yet
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Ray: joined" in done.stdout and "chat with it" in done.stdout
    assert (tmp_path / "runs" / "smoke" / "report" / "report.md").exists()
    assert (tmp_path / "runs" / "smoke" / "chat_eval" / "_SUCCESS").exists()

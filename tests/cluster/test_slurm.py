"""cluster/slurm.sh with stand-ins for Slurm's commands: its signal before the time is up leaves a run that goes on."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from nanochat_ray.run_dir import read_json
from tests.cluster.laptop import DEADLINE_S, PROJECT, wait_until
from tests.cluster.test_ray_up import step_of
from tests.jobs.running import end, free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
SCRIPT = PROJECT / "cluster" / "slurm.sh"
# Writes down its CPUs and runs the rest here; says the nodes' names, this host's first, or writes down the request.
STAND_INS = {
    "srun": 'echo "$SRUN_CPUS_PER_TASK" >> "$SRUN_LOG"; while [[ "$1" == --* ]]; do shift; done; exec "$@"',
    "scontrol": f'[ "$1" = show ] && printf "{socket.gethostname()}\\nanother\\n" || echo "$@" >> "$SCONTROL_LOG"',
}


def allocation(folder: Path) -> dict[str, str]:
    """The environment of a batch script of two nodes, and a folder to submit from."""
    (folder / "bin").mkdir()
    for name, line in STAND_INS.items():
        (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (folder / "bin" / name).chmod(0o755)
    (folder / "jobs").symlink_to(PROJECT / "jobs")
    (folder / ".venv").symlink_to(sys.prefix)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "NANOCHAT_"))}
    return kept | {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "SCONTROL_LOG": str(folder / "asked.txt"),
        "SRUN_LOG": str(folder / "cpus.txt"),
        "SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "2", "SLURM_JOB_ID": str(free_port() % 10000), "PYTHONPATH": str(PROJECT),
        "NANOCHAT_BASE_DIR": str(folder / "runs"), "NANOCHAT_RAY_OFFLINE": "1",
    }  # fmt: skip


def test_the_signal_before_the_end_of_the_time(tmp_path):
    env = allocation(tmp_path)
    stage = tmp_path / "runs" / "smoke" / "pretrain"
    with open(tmp_path / "log.txt", "w") as log:
        script = subprocess.Popen(
            ["bash", str(SCRIPT), "--preset", "smoke", "--pretrain.num-iterations", "3000"], env=env, cwd=tmp_path,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        wait_until(lambda: step_of(stage) >= 5 or script.poll() is not None, "the training")
        assert script.poll() is None, said(tmp_path)
        below = psutil.Process(script.pid).children(recursive=True)
        script.send_signal(signal.SIGTERM)
        assert script.wait(DEADLINE_S) == 130, said(tmp_path)
        assert (tmp_path / "cpus.txt").read_text().split() == [env["SLURM_CPUS_PER_TASK"]] * 2
        assert (tmp_path / "asked.txt").read_text().split() == ["requeue", env["SLURM_JOB_ID"]]
        assert "the same command goes on from there" in said(tmp_path) and (stage / "checkpoints").is_dir()
        assert read_json(stage.parent / "lease.json")["released"]
        wait_until(lambda: not any(process.is_running() for process in below), "the end of its Ray")
    finally:
        if script.poll() is None:
            end([*psutil.Process(script.pid).children(recursive=True), psutil.Process(script.pid)])
        shutil.rmtree(f"/tmp/ray-{env['SLURM_JOB_ID']}", ignore_errors=True)


def test_it_wants_a_place_for_runs(tmp_path):
    env = allocation(tmp_path)
    del env["NANOCHAT_BASE_DIR"]
    done = subprocess.run(["bash", str(SCRIPT)], env=env, capture_output=True, text=True)
    assert done.returncode != 0 and "NANOCHAT_BASE_DIR: set it to a folder" in done.stderr


def said(folder: Path) -> str:
    return (folder / "log.txt").read_text()[-5000:]

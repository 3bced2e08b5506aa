"""Jobs as a person runs them: a command in a process of its own, in another folder, without a terminal."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO

import psutil

JOBS = Path(__file__).parent.parent.parent / "jobs"


def environment(storage: Path, **changes: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return env | {"NANOCHAT_BASE_DIR": str(storage), "NANOCHAT_RAY_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | changes


def start(
    storage: Path, job: str, *flags: str, stdout: int | IO[str] = subprocess.PIPE, **env: str
) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(JOBS / job), *flags], cwd=storage, env=environment(storage, **env),
        stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.STDOUT, text=True,
    )


def run(storage: Path, job: str, *flags: str, **env: str) -> tuple[int, str]:
    """Exit code and everything printed."""
    process = start(storage, job, *flags, **env)
    out, _ = process.communicate(timeout=500)
    return process.returncode, out


def end(processes: list[psutil.Process]) -> None:
    """End processes that this test started, by their ids."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]

"""Where a person sits who starts a cluster: a home folder with a token, the project's folder, Ray's commands."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.hosts import Host

PROJECT = Path(__file__).parent.parent.parent
DEADLINE_S = 300.0  # of whatever is waited for; generous, as machines that test are slow and busy


@dataclass(frozen=True)
class Laptop:
    """A home folder of its own; commands run in the project's folder."""

    home: Path
    token: str = field(default_factory=lambda: secrets.token_hex(32))

    def __post_init__(self) -> None:
        (self.home / ".ray").mkdir(parents=True)
        (self.home / "tmp").mkdir()
        (self.home / ".ray" / "auth_token").write_text(self.token)

    @property
    def env(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "NANOCHAT_"))}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        ours = {"HOME": str(self.home), "PATH": path, **dict.fromkeys(("RAY_TMPDIR", "TMPDIR"), str(self.home / "tmp"))}
        return kept | ours | {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "NO_COLOR": "1"}

    def start(self, *command: str, log: Path) -> subprocess.Popen:
        """Start a command whose output goes to a file."""
        with open(log, "w") as out:
            return subprocess.Popen(command, cwd=PROJECT, env=self.env, stdin=subprocess.DEVNULL, stdout=out,
                                    stderr=subprocess.STDOUT)  # fmt: skip

    def run(self, *command: str, **env: str) -> tuple[int, str]:
        """Exit code of a command and what it said."""
        done = subprocess.run(command, cwd=PROJECT, env=self.env | env, stdin=subprocess.DEVNULL, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=DEADLINE_S)  # fmt: skip
        return done.returncode, done.stdout


def for_hosts(config: Path, hosts: list[Host], folder: Path) -> Path:
    """A copy of a cluster's file for these hosts: other addresses, key and environment; the rest is as it is."""
    values = yaml.safe_load(config.read_text())
    values["provider"] |= {"head_ip": hosts[0].address, "worker_ips": [host.address for host in hosts[1:]]}
    values["auth"] = {"ssh_user": "root", "ssh_private_key": str(hosts[0].key)}
    kept = [line for line in values["setup_commands"] if not re.search(r"\buv\b|is_available", line)]
    ours = "export PYTHONPATH=$HOME/nanochat-ray NANOCHAT_RAY_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0"
    values["setup_commands"] = [  # the tests' own environment; the code is what the file's mounts have brought
        *kept, f"ln -sfn {sys.prefix} ~/.nanochat-ray", f"echo '{ours}' >> ~/.bashrc",
    ]
    path = folder / config.name
    path.write_text(yaml.safe_dump(values))
    return path


@dataclass(frozen=True)
class Cluster:
    """A running cluster as its user sees it."""

    laptop: Laptop
    address: str  # of the dashboard
    gcs_address: str  # within the cluster
    project: str  # the folder of the project on its nodes
    on_other_node: Callable[[str], list[str]]  # a command line to the command that runs it on a node without the head
    on_head: Callable[[str], list[str]]

    def ask(self, path: str, token: str | None = None) -> Any:
        """What the dashboard's REST API answers; None as long as it answers nothing."""
        headers = {"Authorization": f"Bearer {token or self.laptop.token}"}
        request = urllib.request.Request(self.address + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as got:
                return json.load(got)
        except urllib.error.HTTPError as error:
            return error.code
        except (OSError, ValueError):
            return None

    def nodes(self) -> set[str]:
        """Addresses of the nodes that are alive."""
        answer = self.ask("/api/v0/nodes?detail=1")
        if not isinstance(answer, dict):
            return set()
        return {node["node_ip"] for node in answer["data"]["result"]["result"] if node["state"] == "ALIVE"}

    def submit(self, name: str, *job: str, folder: Path | None = None) -> tuple[int, str]:
        """`ray job submit` of a job that goes on by itself. Tries again while the cluster cannot take jobs yet."""
        where = ["--working-dir", str(folder)] if folder else []
        command = ["ray", "job", "submit", "--address", self.address, "--no-wait", "--submission-id", name]
        deadline = time.monotonic() + DEADLINE_S
        while True:
            code, said = self.laptop.run(*command, *where, "--", *job)
            if "No available agent" not in said or time.monotonic() > deadline:
                return code, said
            time.sleep(1)

    def job(self, name: str) -> dict[str, Any]:
        """What the dashboard knows of a submitted job."""
        answer = self.ask(f"/api/jobs/{name}")
        return answer if isinstance(answer, dict) else {"status": f"unknown: {answer}", "driver_exit_code": None}

    def logs(self, name: str) -> str:
        answer = self.ask(f"/api/jobs/{name}/logs")
        return answer["logs"] if isinstance(answer, dict) else f"no logs: {answer}"

    def ended(self, name: str) -> dict[str, Any]:
        """The same when the job is over."""
        wait_until(lambda: self.job(name)["status"] in ("SUCCEEDED", "FAILED", "STOPPED"), f"the end of {name}")
        return self.job(name)


def wait_until(true: Callable[[], bool], what: str, every_s: float = 0.3) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline, f"waited {DEADLINE_S:.0f} s for {what}"
        time.sleep(every_s)


@contextlib.contextmanager
def running(process: subprocess.Popen) -> Iterator[None]:
    """Ended at the end."""
    try:
        yield
    finally:
        process.kill()
        process.wait()

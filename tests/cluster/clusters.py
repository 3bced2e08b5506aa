"""Clusters of three nodes with one CPU each: by `ray up` on hosts of their own, else by `ray start` on this one."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.cluster.hosts import SHARED, Host
from tests.cluster.laptop import PROJECT, Cluster, Laptop, for_hosts, running, wait_until
from tests.jobs.running import end, free_port

NODES = 3


@contextlib.contextmanager
def launched(hosts: list[Host], laptop: Laptop, folder: Path) -> Iterator[Cluster]:
    """By `ray up` of cluster/local.yaml, seen through `ray dashboard`; `ray down` at the end."""
    config = str(for_hosts(PROJECT / "cluster" / "local.yaml", hosts, folder))
    code, said = laptop.run("ray", "up", "-y", config)
    assert code == 0, said[-5000:]
    port = free_port()
    dashboard = laptop.start("ray", "dashboard", "--port", str(port), config, log=folder / "dashboard.log")
    with running(dashboard):
        head, other = hosts[0], hosts[-1]
        base = f"export NANOCHAT_BASE_DIR={SHARED}; "
        cluster = Cluster(
            laptop, f"http://127.0.0.1:{port}", f"{head.address}:6379", "~/nanochat-ray",
            lambda line: other.ssh_command(base + line), head.ssh_command,
        )
        wait_until(lambda: cluster.nodes() == {host.address for host in hosts}, "all nodes of the cluster")
        yield cluster
    code, said = laptop.run("ray", "down", "-y", config)
    assert code == 0 and "No nodes remaining" in said, said[-5000:]
    assert "raylet" not in hosts[0].ssh("ps -eo args").stdout


@contextlib.contextmanager
def by_hand(laptop: Laptop, runs: Path) -> Iterator[Cluster]:
    """By `ray start` on this machine's loopback addresses, where there can be no hosts."""
    port, dashboard = free_port(), free_port()
    env = laptop.env | {"NANOCHAT_BASE_DIR": str(runs), "NANOCHAT_RAY_OFFLINE": "1", "TMPDIR": tempfile.gettempdir()}
    common = ["--num-cpus=1", "--object-store-memory=200000000", "--dashboard-agent-listen-port=0", "--block"]
    folders = [tempfile.mkdtemp(prefix="ray") for _ in range(NODES)]  # short: sockets have paths of 107 bytes at most
    first = ["--head", f"--port={port}", f"--dashboard-port={dashboard}"]
    addresses = [f"127.0.0.{k + 1}" for k in range(NODES)]
    processes: list[subprocess.Popen] = []

    def start(k: int, *where: str) -> None:
        command = ["ray", "start", *where, f"--node-ip-address={addresses[k]}", f"--temp-dir={folders[k]}", *common]
        processes.append(subprocess.Popen(command, cwd=PROJECT, env=env, stdin=subprocess.DEVNULL,
                                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))  # fmt: skip

    def here(line: str) -> list[str]:
        return ["env", *(f"{name}={value}" for name, value in env.items()), "bash", "-c", line]

    cluster = Cluster(laptop, f"http://127.0.0.1:{dashboard}", f"{addresses[0]}:{port}", str(PROJECT), here, here)
    try:
        start(0, *first)
        wait_until(lambda: bool(cluster.nodes()), "the head")
        for k in range(1, NODES):
            start(k, f"--address={cluster.gcs_address}")
        wait_until(lambda: len(cluster.nodes()) == NODES, "all nodes of the cluster")
        yield cluster
    finally:
        for process in processes:
            end([*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)])
            process.wait()
        for path in folders:
            shutil.rmtree(path, ignore_errors=True)

"""The hosts that the tests of clusters run on: an address, processes and a home of their own, and no trace left."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.cluster.hosts import hosts, require_hosts

pytestmark = pytest.mark.slow


def links() -> set[str]:
    return set(os.listdir("/sys/class/net"))


def test_hosts_are_apart_and_leave_nothing():
    require_hosts()
    before = links()
    with pytest.raises(RuntimeError, match="half-way"), hosts(2) as (one, two):
        folder = one.folder.parent
        assert one.ssh("hostname; pwd").stdout.split() == [one.name, str(one.home)]
        assert two.ssh(f"ssh-keyscan -t ed25519 {one.address} 2>/dev/null").stdout.startswith(one.address)
        seen = two.ssh("ls /proc | grep -c '^[0-9]'").stdout
        assert int(seen) < 12  # its own shell and sshd, none of ours
        one.ssh("sleep 1000 >/dev/null 2>&1 & touch /dev/shm/mine /tmp/ray/mine ~/mine")
        assert two.ssh("ls /dev/shm /tmp/ray ~ | grep mine").stdout == ""
        assert one.ssh("timeout 2 bash -c '</dev/tcp/192.0.2.1/80' || echo none").stdout.strip() == "none"
        assert (one.home / "mine").exists() and not Path("/dev/shm/mine").exists()
        two.crash()
        assert two.ssh("true", timeout_s=60).returncode != 0
        raise RuntimeError("half-way")
    assert links() - before == set() and not folder.exists()
    assert str(folder) not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    with hosts(1) as (again,):  # at once, under the same names
        assert again.ssh("hostname").stdout.strip() == again.name

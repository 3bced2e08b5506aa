"""Several hosts on one machine: Linux namespaces, each with its own network address, processes, home folder and sshd.

What a cluster launcher needs of real machines is here, so `ray up` and even the `ray stop` of its start commands can be
run: a host sees its own processes only. Hosts reach each other and this process, nothing else. All of a host ends with
its first process, also when the test's own process is killed.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

NEED = "NANOCHAT_RAY_NEED_HOSTS"
COMMANDS = ("ip", "sshd", "ssh", "ssh-keygen", "rsync", "unshare", "setpriv", "mount")
NAMESPACES = ("--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")
BOOT_S = 120.0
SHM = "2g"
SHARED = "/mnt/nanochat"
# The first process of a host: its own folders over the shared ones, its network, then sshd in its place.
BOOT = """
set -eu
mount -t tmpfs -o size={shm} shm /dev/shm
mkdir -p /tmp/ray /run/sshd
mount --bind {folder}/tmp /tmp/ray
mount -t tmpfs cgroup /sys/fs/cgroup
echo {cpus}00000 100000 > /sys/fs/cgroup/cpu.max
mount -t tmpfs mnt /mnt
{mounts}
for name in passwd shadow hosts; do mount --bind {folder}/etc/$name /etc/$name; done
echo {name} > /proc/sys/kernel/hostname
ip link set lo up
while ! ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip address add {address}/24 dev eth0
ip link set eth0 up
ip route add default dev eth0
exec {sshd} -D -e -f {folder}/etc/sshd_config
"""
SSHD = """
Port 22
HostKey {folder}/etc/host_key
AuthorizedKeysFile {folder}/etc/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
UseDNS no
PidFile none
MaxStartups 100
MaxSessions 100
"""


@dataclass(frozen=True)
class Host:
    """One of them."""

    name: str
    address: str  # reachable from this process too
    key: Path  # private key that root's ssh takes
    home: Path  # its home folder, as a folder of this machine
    folder: Path
    process: subprocess.Popen

    def ssh(self, command: str, timeout_s: float = 300.0, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command line in a login shell there."""
        return subprocess.run(
            self.ssh_command(command, **env), capture_output=True, text=True, timeout=timeout_s,
            stdin=subprocess.DEVNULL,
        )

    def ssh_command(self, command: str, **env: str) -> list[str]:
        settings = "".join(f"export {name}={shlex.quote(value)}; " for name, value in env.items())
        quiet = ("-oBatchMode=yes", "-oStrictHostKeyChecking=no", "-oUserKnownHostsFile=/dev/null", "-oLogLevel=ERROR")
        return ["ssh", "-i", str(self.key), *quiet, f"root@{self.address}",
                f"bash -lc {shlex.quote(f'. ~/.bashrc; {settings}{command}')}"]  # fmt: skip

    def crash(self) -> None:
        """All of its processes and its network end at once."""
        self.process.kill()
        self.process.wait()


def why_not() -> str | None:
    """Why there can be no hosts here; None if there can."""
    if "/usr/sbin" not in os.environ["PATH"].split(os.pathsep):  # where ip and sshd lie
        os.environ["PATH"] += os.pathsep + "/usr/sbin"
    if not sys.platform.startswith("linux"):
        return "hosts are Linux namespaces"
    if os.geteuid() != 0:
        return "making hosts needs root"
    if missing := [name for name in COMMANDS if shutil.which(name) is None]:
        return f"not installed: {', '.join(missing)} (Debian: openssh-server, rsync, iproute2)"
    probe = "ip link add probe0 type veth peer name probe1 && ip link add probe2 type bridge && mount -t tmpfs x /mnt"
    made = subprocess.run(["unshare", *NAMESPACES, "sh", "-c", probe], capture_output=True, text=True)
    return f"namespaces are not permitted here: {made.stderr.strip()}" if made.returncode else None


def needed() -> bool:
    """Whether a test that does without hosts is a failure."""
    return bool(os.environ.get(NEED))


def require_hosts() -> None:
    """Skip the test by name without hosts; fail it where the environment says that they are needed."""
    reason = why_not()
    if reason is None:
        return
    if needed():
        pytest.fail(f"{NEED} is set, but {reason}")
    pytest.skip(reason)


@contextlib.contextmanager
def hosts(count: int, shared: Path | None = None, cpus: int = 1) -> Iterator[list[Host]]:
    """So many hosts, ready for ssh, in a network of their own with this process.

    `shared` is a folder of this machine that all of them have as SHARED. Ray finds `cpus` on each, as in a container.
    """
    base = Path(tempfile.mkdtemp(prefix="nrh"))  # short: Ray's sockets lie below it
    subnet = f"10.{200 + os.getpid() // 250 % 50}.{os.getpid() % 250}"
    bridge = f"nrb{os.getpid()}"
    cables = [f"nr{os.getpid()}v{k}" for k in range(count)]
    made: list[Host] = []
    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("address", "add", f"{subnet}.1/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        key = base / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        names = [f"host{k}" for k in range(count)]
        addresses = [f"{subnet}.{10 + k}" for k in range(count)]
        table = "127.0.0.1 localhost\n"
        table += "".join(f"{address} {name}\n" for address, name in zip(addresses, names, strict=True))
        for k in range(count):
            made.append(boot(base / f"h{k}", names[k], addresses[k], key, table, shared, cpus))
            plug_in(made[-1], bridge, cables[k])
        for host in made:
            wait_for_ssh(host)
        yield made
    finally:
        for host in made:
            host.crash()
        for link in (*cables, bridge):  # the kernel keeps cables while a connection lingers
            subprocess.run(["ip", "link", "delete", link], capture_output=True)
        shutil.rmtree(base, ignore_errors=True)


def ip(*command: str) -> None:
    subprocess.run(["ip", *command], check=True)


def boot(folder: Path, name: str, address: str, key: Path, table: str, shared: Path | None, cpus: int) -> Host:
    """Start a host's first process. It waits for its network."""
    etc, home = folder / "etc", folder / "root"
    for path in (etc, home, folder / "tmp"):
        path.mkdir(parents=True)
    (home / ".bashrc").touch()
    (etc / "passwd").write_text(f"root:x:0:0:root:{home}:/bin/bash\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n")
    (etc / "shadow").write_text("root:*:19000:0:99999:7:::\nsshd:*:19000:0:99999:7:::\n")
    (etc / "hosts").write_text(table)
    (etc / "authorized_keys").write_bytes(key.with_suffix(".pub").read_bytes())
    (etc / "sshd_config").write_text(SSHD.format(folder=folder))
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(etc / "host_key")], check=True)
    mounts = f"mkdir {SHARED}; mount --bind {shlex.quote(str(shared))} {SHARED}" if shared else ""
    script = BOOT.format(
        folder=folder, name=name, address=address, shm=SHM, cpus=cpus, mounts=mounts, sshd=shutil.which("sshd")
    )
    with open(folder / "boot.log", "w") as log:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", *NAMESPACES, "sh", "-c", script],
            env={"PATH": os.environ["PATH"], "HOME": str(home)}, cwd=home,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    return Host(name, address, key, home, folder, process)


def plug_in(host: Host, bridge: str, cable: str) -> None:
    """A cable from the bridge into the host's network, which is there as soon as its process has left ours."""
    ours = os.readlink("/proc/self/ns/net")
    deadline = time.monotonic() + BOOT_S
    while os.readlink(f"/proc/{host.process.pid}/ns/net") == ours:
        assert host.process.poll() is None and time.monotonic() < deadline, said(host)
        time.sleep(0.02)
    ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(host.process.pid))
    ip("link", "set", cable, "master", bridge, "up")


def wait_for_ssh(host: Host) -> None:
    deadline = time.monotonic() + BOOT_S
    while host.ssh("true", timeout_s=60).returncode:
        assert host.process.poll() is None and time.monotonic() < deadline, said(host)
        time.sleep(0.2)


def said(host: Host) -> str:
    return f"{host.name} did not come up: {(host.folder / 'boot.log').read_text()}"

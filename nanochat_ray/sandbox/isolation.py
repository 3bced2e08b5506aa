"""The two ways to isolate a program, and which of them works on this machine.

Both give it namespaces of its own: no network, no process but its own, no file but Python's (read-only), an empty /tmp
in memory that goes with it. bubblewrap (`bwrap`) is taken where it is installed, else a launcher of our own.

An ordinary user's program gets a user namespace too. Root's gives up root for a user number that nobody else has, so
that the kernel counts its processes, and stands in a chroot, where no new user namespace can be made.
"""

from __future__ import annotations

import os
import secrets
import shutil
from functools import cache
from pathlib import Path
from typing import Literal

from nanochat_ray.sandbox.python_files import hidden_paths, interpreter, visible_paths
from nanochat_ray.sandbox.result import SandboxUnavailable
from nanochat_ray.sandbox.seccomp import filter_bytes

Isolation = Literal["bwrap", "unshare", "none"]
ISOLATIONS: tuple[Isolation, ...] = ("bwrap", "unshare")

TREE = "/jail"  # where the program's root lies in the isolated mounts
SCRATCH = "/tmp"
SCRATCH_BYTES, SCRATCH_FILES = 32 << 20, 4096
DEVICES = ("/dev/null", "/dev/urandom")
USER_INSIDE = 1000
USERS = range(1 << 30, (1 << 31) - 1), range(50_000, 65_000)  # numbers nobody has; the second in small namespaces
PYTHON_FLAGS = ("-S", "-s", "-P", "-B")  # what -I means, but for PYTHON* variables: we set those
HOW_TO_GET_IT = (
    "install bubblewrap (apt-get install bubblewrap, dnf install bubblewrap), on Linux 5.14 or later. In a container "
    "allow user namespaces (docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined, as an "
    "ordinary user, or with --cap-add SYS_ADMIN as root); on Ubuntu 23.10 and later "
    "sysctl kernel.apparmor_restrict_unprivileged_userns=0. --unsafe-sandbox runs programs without isolation"
)


@cache
def source(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def command(
    isolation: Isolation, control_fd: int, result_fd: int, info_fd: int, filter_fd: int | None, limits: dict[str, int]
) -> tuple[str, ...]:
    """The command line of a process that becomes an isolated Python and asks for a program. It inherits the fds.

    Isolated ones write {"child-pid": N} to the info descriptor, the first process of the program's namespace.
    """
    run = f"run({control_fd}, {result_fd}, {limits!r})"
    if isolation == "none":
        return python(source("inside.py"), run)
    is_root = os.getuid() == 0
    uid = spare_user() if is_root else USER_INSIDE
    if isolation == "bwrap":
        first = "" if filter_fd is not None else "leave_keyring()\n"  # the filter refuses all calls about keys
        first += f"become_nobody({TREE!r}, {uid})\nos.chdir({SCRATCH!r})\n" if is_root else ""
        return *bwrap(info_fd, filter_fd, is_root), *python(source("inside.py"), first + run)
    options = f"mode=1777,size={SCRATCH_BYTES},nr_inodes={SCRATCH_FILES}"
    arguments = (
        info_fd, uid, TREE, [*visible_paths()], [*DEVICES], [*hidden_paths()], SCRATCH, options, filter_bytes(),
    )  # fmt: skip
    enter = f"leave_keyring()\nenter(lambda: {run}, set_limits, {limits!r}, become_nobody, *{arguments!r})"
    return python(source("inside.py"), source("namespaces.py"), enter)


def python(*texts: str) -> tuple[str, ...]:
    return (str(interpreter()), *PYTHON_FLAGS, "-c", "\n".join(texts))


def spare_user() -> int:
    """A user number for one program, that the namespace of this process has."""
    last = 0
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        first, _, length = map(int, line.split())
        last = max(last, first + length - 1)
    numbers = next((numbers for numbers in USERS if numbers[-1] <= last), range(1, last + 1))
    return secrets.choice(numbers)


def bwrap(info_fd: int, filter_fd: int | None, is_root: bool) -> list[str]:
    """bubblewrap's part of the command line.

    As root it takes no user namespace: the interpreter leaves root itself (`become_nobody`), for which it keeps three
    capabilities until then. It is found at its usual path, which symbolic links lead from into TREE.
    """
    found = shutil.which("bwrap")
    if found is None:
        raise SandboxUnavailable("bwrap is not installed")
    options = [found, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try",
               "--hostname", "sandbox", "--die-with-parent", "--info-fd", str(info_fd)]  # fmt: skip
    if is_root:
        root = TREE
        options += ["--cap-drop", "ALL"]
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SYS_CHROOT"):
            options += ["--cap-add", capability]
    else:
        root = ""
        options += ["--unshare-user", "--disable-userns", "--uid", str(USER_INSIDE), "--gid", str(USER_INSIDE)]
    above = {str(parent) for path in (*visible_paths(), *DEVICES) for parent in Path(root + path).parents}
    for folder in sorted(above - {"/"}):  # they would be closed to everybody but their maker
        options += ["--perms", "0755", "--dir", folder]
    for path in visible_paths():
        options += ["--ro-bind", path, root + path]
    for path in hidden_paths():
        options += ["--tmpfs", root + path, "--remount-ro", root + path]
    for path in DEVICES:
        options += ["--dev-bind", path, root + path]
    options += ["--perms", "1777", "--size", str(SCRATCH_BYTES), "--tmpfs", root + SCRATCH]
    for top in sorted({path.split("/")[1] for path in visible_paths()}) if is_root else ():
        options += ["--symlink", f"{root[1:]}/{top}", f"/{top}"]
    options += ["--remount-ro", "/", "--chdir", root + SCRATCH]
    if filter_fd is not None:
        options += ["--seccomp", str(filter_fd)]
    return [*options, "--"]

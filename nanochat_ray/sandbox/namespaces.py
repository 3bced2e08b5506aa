"""Isolation built from the kernel's namespaces with ctypes, where bubblewrap is missing.

A fresh Python gets this file as text, behind inside.py's. It takes namespaces of its own (mounts, processes, network,
IPC, names, and users when it is not root) and forks their first process. That one builds a small file tree, moves into
it, gives up its rights and forks the program.
"""

import ctypes
import os
from _collections_abc import Callable  # `collections` takes longer to import than all else here

# linux/sched.h, linux/mount.h, linux/prctl.h, linux/capability.h, and the system call tables
NEW_NS, NEW_CGROUP, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = (
    0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1, 2, 4, 8, 32, 4096, 16384, 1 << 18,
)  # fmt: skip
MS_OF_STATVFS = {2: MS_NOSUID, 4: MS_NODEV, 8: MS_NOEXEC, 1024: 1024, 2048: 2048, 4096: 1 << 21}
MNT_DETACH = 2
SIGKILL = 9  # the module `signal` takes long to import
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 4, 22, 38, 2
CAPABILITY_VERSION_3 = 0x20080522
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    if result == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    texts = [text.encode() for text in (source, target, kind)]
    check(libc.mount(*texts, ctypes.c_ulong(flags), options.encode()), f"mounting {source} on {target}")


def enter(
    run: Callable[[], None], set_limits: Callable[[dict[str, int]], None], limits: dict[str, int],
    become_nobody: Callable[[str, int], None], info_fd: int, uid: int, tree: str,
    binds: list[str], devices: list[str], empty: list[str], scratch: str, scratch_options: str, filter_bytes: bytes,
) -> None:  # fmt: skip
    """Run `run` isolated; this process waits for it and ends with its status. Does not return."""
    is_root = os.getuid() == 0
    own_uid, own_gid = os.getuid(), os.getgid()
    new = NEW_NS | NEW_CGROUP | NEW_UTS | NEW_IPC | NEW_PID | NEW_NET | (0 if is_root else NEW_USER)
    check(libc.unshare(new), "unshare")
    if not is_root:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {own_uid} 1"), ("gid_map", f"{uid} {own_gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    for name in ("shmmni", "msgmni"):  # no segments of System V in this namespace: no process' limit counts them
        try:
            with open(f"/proc/sys/kernel/{name}", "w") as file:
                file.write("0")
        except OSError:
            continue  # a kernel that lets only root say so
    check(libc.prctl(PR_SET_PDEATHSIG, SIGKILL), "prctl")  # nobody would stop the program any more
    first = os.fork()
    if first:
        os.write(info_fd, b'{"child-pid": %d}' % first)
        os.closerange(0, 1 << 16)  # no pipe is kept open by those who only wait
        os._exit(status_of(os.waitpid(first, 0)[1]))
    check(libc.prctl(PR_SET_PDEATHSIG, SIGKILL), "prctl")
    os.close(info_fd)
    build(tree, binds, devices, empty, scratch, scratch_options)
    if is_root:
        become_nobody(tree, uid)
        check(libc.prctl(PR_SET_PDEATHSIG, SIGKILL), "prctl")  # another user: the kernel has forgotten it
    else:
        os.chroot(tree)
        give_up_capabilities()
    os.chdir(scratch)
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if filter_bytes:
        install_filter(filter_bytes)
    # The program runs as the same user as this process. What it made this one do would be done within no limits, so it
    # may not trace it, and there are limits all the same.
    set_limits(limits)
    check(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl")
    program = os.fork()
    if program == 0:
        check(libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0), "prctl")  # its memory is looked at from outside
        run()
    os.closerange(0, 1 << 16)
    while True:  # the first process of a namespace inherits all orphans
        pid, status = os.wait()
        if pid == program:
            os._exit(status_of(status))


def build(
    tree: str, binds: list[str], devices: list[str], empty: list[str], scratch: str, scratch_options: str
) -> None:
    """Make the file system that the program sees, below `tree` in a root of its own; the old one is gone after it."""
    mount("", "/", "", MS_REC | MS_PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    os.mkdir("/tmp/old")
    os.chdir("/tmp")
    number = PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise OSError(f"pivot_root is not known for {os.uname().machine}; install bubblewrap")
    check(libc.syscall(number, b"/tmp", b"/tmp/old"), "pivot_root")
    os.chdir("/")
    for path in [*binds, *devices]:
        source, target = "/old" + path, tree + path
        if os.path.isdir(source):
            os.makedirs(target, 0o755, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), 0o755, exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o444))
        mount(source, target, "", MS_BIND)
        kept = sum(ours for theirs, ours in MS_OF_STATVFS.items() if os.statvfs(target).f_flag & theirs)
        only = MS_NOSUID if path in devices else MS_NOSUID | MS_NODEV | MS_RDONLY
        mount("", target, "", MS_BIND | MS_REMOUNT | kept | only)
    for path in empty:
        mount("tmpfs", tree + path, "tmpfs", MS_NOSUID | MS_NODEV | MS_RDONLY, "mode=755,size=4k")
    os.makedirs(tree + scratch, exist_ok=True)
    mount("tmpfs", tree + scratch, "tmpfs", MS_NOSUID | MS_NODEV, scratch_options)
    check(libc.umount2(b"/old", MNT_DETACH), "umount")
    os.rmdir("/old")
    mount("", "/", "", MS_BIND | MS_REMOUNT | MS_NOSUID | MS_NODEV | MS_RDONLY)
    check(libc.sethostname(b"sandbox", 7), "sethostname")


def give_up_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    check(libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def install_filter(program: bytes) -> None:
    """Load a compiled seccomp filter, 8 bytes an instruction."""

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]

    filled = Program(len(program) // 8, program)
    check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(filled), 0, 0), "seccomp")


def status_of(status: int) -> int:
    """An exit status for what waitpid gave, signals as a shell has them."""
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


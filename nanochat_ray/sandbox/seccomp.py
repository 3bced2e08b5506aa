"""A filter of system calls, on top of the isolation, where the binding of libseccomp is installed.

It takes away what no program needs and what kernels have had faults in, and the ways to hold memory that no process'
limit counts: System V's shared memory, and files in memory. Of sockets it leaves the usual families, since a few others
(AF_VSOCK, to a virtual machine's host) know no namespaces.
"""

from __future__ import annotations

import errno
import tempfile
from functools import cache

REFUSED = (
    "acct", "add_key", "bpf", "clock_adjtime", "clock_settime", "delete_module", "fanotify_init",
    "finit_module", "fsconfig", "fsmount", "fsopen", "fspick", "init_module", "io_uring_enter", "io_uring_register",
    "io_uring_setup", "ioperm", "iopl", "kcmp", "kexec_file_load", "kexec_load", "keyctl", "lookup_dcookie",
    "memfd_create", "memfd_secret", "migrate_pages", "mount", "mount_setattr", "move_mount", "move_pages", "mq_open",
    "msgget", "name_to_handle_at", "nfsservctl", "open_by_handle_at", "open_tree", "perf_event_open", "personality",
    "pidfd_getfd", "pivot_root", "process_madvise", "process_vm_readv", "process_vm_writev", "ptrace", "quotactl",
    "reboot", "request_key", "semget", "setdomainname", "sethostname", "setns", "settimeofday", "shmget", "swapoff",
    "swapon", "syslog", "umount2", "unshare", "uselib", "userfaultfd", "vhangup", "vmsplice",
)  # fmt: skip
FAMILIES = (1, 2, 10, 16)  # of sockets: AF_UNIX, AF_INET, AF_INET6, AF_NETLINK
LAST_FAMILY = 63  # more than any kernel has; all above it are refused together
NEW_NAMESPACES = 0x7E020000 | 0x80  # the flags of clone that make namespaces


@cache
def filter_bytes() -> bytes:
    """The compiled filter for this machine; empty where neither `seccomp` nor `pyseccomp` can be imported."""
    library = _library()
    if library is None:
        return b""
    rules = library.SyscallFilter(library.ALLOW)
    refuse = library.ERRNO(errno.EPERM)
    for name in REFUSED:
        try:
            rules.add_rule(refuse, name)
        except (OSError, RuntimeError, ValueError):
            continue  # a call that this architecture or library does not know
    for bit in range(32):
        if NEW_NAMESPACES >> bit & 1:
            rules.add_rule(refuse, "clone", library.Arg(0, library.MASKED_EQ, 1 << bit, 1 << bit))
    for name in ("socket", "socketpair"):
        for family in set(range(LAST_FAMILY + 1)) - {*FAMILIES}:
            rules.add_rule(refuse, name, library.Arg(0, library.MASKED_EQ, 0xFFFFFFFF, family))
        rules.add_rule(refuse, name, library.Arg(0, library.GT, LAST_FAMILY))
    rules.add_rule(library.ERRNO(errno.ENOSYS), "clone3")  # its flags lie in memory; libc falls back to clone
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def _library():  # type: ignore[no-untyped-def]  # whichever of the two modules with the same names
    try:
        import seccomp
    except ImportError:
        try:
            import pyseccomp as seccomp
        except (ImportError, OSError, RuntimeError):  # the binding without the library
            return None
    return seccomp

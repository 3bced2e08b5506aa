"""The filter of system calls, where a binding of libseccomp is installed: what it takes away, on each isolation."""

from __future__ import annotations

import errno
import platform
import socket

import pytest

from nanochat_ray import sandbox
from nanochat_ray.sandbox.seccomp import REFUSED, filter_bytes

NUMBERS = {"memfd_create": 319, "shmget": 29, "userfaultfd": 323, "keyctl": 250, "io_uring_setup": 425, "bpf": 321}
pytestmark = [
    pytest.mark.skipif(not filter_bytes(), reason="neither seccomp nor pyseccomp is installed"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers of system calls are x86-64's"),
]


def test_refused_calls(isolation):
    assert NUMBERS.keys() <= set(REFUSED)
    code = "import ctypes; c = ctypes.CDLL(None, use_errno=True)\n"
    code += f"for n in {sorted(NUMBERS.values())}: print(c.syscall(n, 0, 0, 0, 0, 0), ctypes.get_errno())"
    result = sandbox.run_program(code, isolation=isolation)
    assert result.stdout == f"-1 {errno.EPERM}\n" * len(NUMBERS)
    assert result.isolation == f"{isolation}+seccomp"


def test_sockets_of_other_families_are_refused(isolation):
    code = f"""
import ctypes
c = ctypes.CDLL(None, use_errno=True)
made = []
for call in (41, 53):
    for family in (*range(64), 1000, -1, 2**32 + 40):
        for kind in (1, 2, 3, 5):
            ctypes.set_errno(0)
            found = c.syscall(call, ctypes.c_long(family), kind, 0, (ctypes.c_int * 2)())
            if ctypes.get_errno() != {errno.EPERM} and family not in made:
                made.append(family)
print(made)
"""
    families = [socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK]
    assert sandbox.run_program(code, isolation=isolation).stdout == f"{[int(family) for family in families]}\n"


def test_what_programs_use_still_works(isolation):
    code = "import os, threading, tempfile, subprocess, sys, socket\n"
    code += "t = threading.Thread(target=print, args=('x',)); t.start(); t.join()\n"
    code += "subprocess.run([sys.executable, '-S', '-c', 'pass'], check=True)\n"
    code += "tempfile.TemporaryFile().write(b'x'); socket.socketpair(); os.wait() if os.fork() else os._exit(0)"
    assert sandbox.run_program(code, isolation=isolation).error is None

"""What must hold without the filter of system calls: the first process of the namespace, and the caller's keys."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from nanochat_ray import sandbox

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="registers and numbers are x86-64's")

TRACE_FIRST = """
import ctypes, time
c = ctypes.CDLL(None, use_errno=True)
c.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
ATTACH, GET, SET, STEP = 16, 12, 13, 9
if c.ptrace(ATTACH, 1, 0, 0) == -1:
    raise PermissionError("not attached")
time.sleep(0.1)
registers = (ctypes.c_ulonglong * 27)()
c.ptrace(GET, 1, 0, ctypes.addressof(registers))
# mmap(0, 600 MiB, read and write, private and populated, -1, 0), from the system call that it waits in
for place, value in {10: 9, 14: 0, 13: 600 << 20, 12: 3, 7: 0x8022, 9: 2**64 - 1, 8: 0, 15: 2**64 - 1}.items():
    registers[place] = value
registers[16] -= 2
c.ptrace(SET, 1, 0, ctypes.addressof(registers))
c.ptrace(STEP, 1, 0, 0)
time.sleep(0.4)
c.ptrace(GET, 1, 0, ctypes.addressof(registers))
print("mapped", 0 < registers[10] < 2**63)
"""


def test_the_first_process_takes_no_memory_for_a_program(isolation, nonce, without_filter):
    result = sandbox.run_program(TRACE_FIRST, isolation=isolation)
    attached = isolation == "bwrap" and os.getuid() != 0  # bwrap's own process, of the program's user, within limits
    assert result.stdout == ("mapped False\n" if attached else ""), result
    assert result.error == (None if attached else "PermissionError: not attached")


KEYS = """
import ctypes, sys
c = ctypes.CDLL(None)
ADD_KEY, KEYCTL, JOIN, SEARCH, SESSION = 248, 250, 1, 10, -3
if c.syscall(KEYCTL, JOIN, None) == -1 or c.syscall(ADD_KEY, b"user", b"secret", b"hunter2", 7, SESSION) == -1:
    sys.exit(3)
assert c.syscall(KEYCTL, SEARCH, SESSION, b"user", b"secret", 0) > 0
from nanochat_ray.sandbox import isolation, process, program
if FILTER_OFF:
    for module in (isolation, process, program):
        module.filter_bytes = lambda: b""
code = "import ctypes; print(ctypes.CDLL(None).syscall(250, 10, -3, b'user', b'secret', 0))"
print(program.run_program(code, isolation=ISOLATION).stdout)
"""


@pytest.mark.parametrize("filter_off", [True, False])
def test_the_callers_keys_are_not_seen(isolation, filter_off):
    values = f"FILTER_OFF, ISOLATION = {filter_off}, {isolation!r}\n"
    found = subprocess.run([sys.executable, "-c", values + KEYS], capture_output=True, text=True)
    if found.returncode == 3:
        pytest.skip("this machine lets nobody keep keys")
    assert found.stdout.strip() == "-1", found

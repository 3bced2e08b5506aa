"""What a program holds outside of its own memory, and the time that an overloaded machine takes from it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from nanochat_ray import sandbox
from nanochat_ray.sandbox import SandboxFailed

SOCKETS = """
import os, socket, time
def fill():
    pairs = []
    try:
        while True:
            pairs.append(socket.socketpair())
            for end in pairs[-1]:
                end.setblocking(False)
                try:
                    while True:
                        end.send(bytes(4096))
                except BlockingIOError:
                    pass
    except OSError:
        time.sleep(1000)
for _ in range(28):
    if os.fork() == 0:
        fill()
time.sleep(1000)
"""
CONNECTIONS = """
import socket, time
listener = socket.create_server(("127.0.0.1", 0), backlog=1000)
for _ in range(200):  # nobody accepts them, and no descriptor is left
    with socket.create_connection(listener.getsockname()) as connection:
        connection.send(bytes(60_000))
time.sleep(1000)
"""


@pytest.mark.parametrize("code", [SOCKETS, CONNECTIONS], ids=["pairs", "connections"])
def test_memory_in_sockets_counts(isolation, nonce, code):
    if isolation == "unshare" and code == CONNECTIONS:
        pytest.skip("its loopback is down, there are no connections")
    result = sandbox.run_program(code, 20.0, isolation=isolation)
    assert result.memory_exceeded and result.error == "memory: more than 256 MiB in all its processes", result


def test_a_few_sockets_are_no_memory(isolation):
    code = "import asyncio, socket, time\npairs = [socket.socketpair() for _ in range(5)]\n"
    code += "asyncio.run(asyncio.sleep(0.2))"
    assert sandbox.run_program(code, isolation=isolation).error is None


@contextlib.contextmanager
def one_busy_cpu(others: int) -> Iterator[None]:
    """Everything that this thread starts has one CPU, together with so many endless processes."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    busy = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"], start_new_session=True)
            for _ in range(others)]  # fmt: skip
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
        for process in busy:
            process.kill()
            process.wait()


WORK = "import time\nwhile time.process_time() < {}: pass"


def test_waiting_for_a_cpu_is_not_a_programs_time(isolation):
    with one_busy_cpu(1):
        result = sandbox.run_program(WORK.format(0.6), 0.8, isolation=isolation)
    assert result.success, result
    assert sandbox.run_program("import time; time.sleep(1000)", 0.3, isolation=isolation).timeout


@pytest.mark.slow
def test_too_little_cpu_is_the_machines_fault(isolation):
    with one_busy_cpu(12), pytest.raises(SandboxFailed, match="the machine is overloaded"):
        sandbox.run_program("while True: pass", 0.3, isolation=isolation)

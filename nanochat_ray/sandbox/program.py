"""Running a program that a model wrote: `run_program`, and `run_program_async` for rewards."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from nanochat_ray.sandbox.inside import PASSED, RAISED, TOKEN_BYTES
from nanochat_ray.sandbox.isolation import HOW_TO_GET_IT, ISOLATIONS, SCRATCH_FILES, Isolation
from nanochat_ray.sandbox.proc_files import machine_oom_kills
from nanochat_ray.sandbox.process import OUTPUT_BYTES, Ended, run_isolated
from nanochat_ray.sandbox.queueing import QUEUEING, Queueing
from nanochat_ray.sandbox.result import ProgramResult, SandboxFailed, SandboxUnavailable
from nanochat_ray.sandbox.seccomp import filter_bytes

TIMEOUT_S = 5.0
MEMORY_BYTES = 256 << 20
TRIES, WAIT_S = 3, 0.5  # of a program when the machine fails; seconds in between grow

PROBE = """
import os, signal, socket
assert os.getpid() < 100, "it sees the machine's processes"
assert os.getuid() != 0, "it is root"
assert not os.path.exists("/etc") and not os.path.exists("/proc"), "it sees the machine's files"
assert [name for _, name in socket.if_nameindex()] in ([], ["lo"]), "it has a network"
for path in ("/probe", os.__file__):
    try:
        open(path, "a")
    except OSError:
        continue
    raise AssertionError(f"it can write {path}")
open("probe", "w").close()
try:
    for _ in range(200):
        if os.fork() == 0:
            signal.pause()
except BlockingIOError:
    pass
else:
    raise AssertionError("its processes are not counted, which Linux 5.14 and later do")
"""
_probing = threading.Lock()


def run_program(
    code: str,
    timeout_s: float = TIMEOUT_S,
    memory_bytes: int = MEMORY_BYTES,
    *,
    unsafe: bool = False,
    isolation: Isolation | None = None,
) -> ProgramResult:
    """Run a Python program, isolated, and say how it ended. Blocks; safe on any thread and in any actor.

    It succeeds if its last statement returns within `timeout_s` of the clock on the wall, with at most `memory_bytes`
    in each process and in all together, 64 KiB on each of stdout and stderr, 32 processes and threads. It sees Python's
    standard library, an empty folder in memory that is gone afterwards, no network, and nobody else. `__name__` is
    "program", stdin is empty, the environment says nothing of this one.

    Success is proved by a secret that is sent back after the last statement. What this cannot tell: a program that
    reads the secret out of its own interpreter's frames, or whose objects claim to be equal to anything, has not solved
    what the tests in it ask. Only comparing outputs in another process would. A fault of the kernel is a way out; the
    filter of system calls, where `pyseccomp` is installed, makes it narrower. Without the filter System V's shared
    memory is unlimited (but for root with "unshare"), so are files in memory that lie in a socket and are open nowhere,
    sockets of families like AF_VSOCK know no namespaces, and bwrap's first process can be stopped by an ordinary user's
    program. A socket counts as memory with all that it may buffer, 8 MiB at most.

    A program that had to wait for a CPU gets that time back, up to three times `timeout_s`; one that still has not had
    its time then is the machine's fault.

    `isolation` is found out when it is not given. Raises SandboxUnavailable if this machine has none, unless `unsafe`,
    which runs the program with limits only, as this user. Raises SandboxFailed if the machine was at fault.
    """
    chosen: Isolation = isolation or ("none" if unsafe and not usable() else require_isolation())
    if timeout_s <= 0 or memory_bytes < 64 << 20:
        raise ValueError(f"timeout_s {timeout_s} must be above 0, memory_bytes {memory_bytes} at least {64 << 20}")
    if chosen != "none":
        return _run(code, timeout_s, memory_bytes, chosen, "")
    if not unsafe or sys.platform != "linux":
        raise SandboxUnavailable("a program runs without isolation only when told so (unsafe=True), and on Linux")
    folder = tempfile.mkdtemp(prefix="program-")
    try:
        return _run(code, timeout_s, memory_bytes, chosen, folder)
    finally:
        remove(folder)


async def run_program_async(
    code: str, timeout_s: float = TIMEOUT_S, memory_bytes: int = MEMORY_BYTES, *, unsafe: bool = False
) -> ProgramResult:
    """`run_program` for an event loop: as many at a time as there are CPUs, the others wait their turn.

    A caller who limits the time of this puts a Queueing into QUEUEING, and leaves out what it tells.
    """
    queueing = QUEUEING.get() or Queueing()

    def run() -> ProgramResult:
        queueing.leave()
        return run_program(code, timeout_s, memory_bytes, unsafe=unsafe)

    queueing.enter()
    future = _threads().submit(run)
    future.add_done_callback(lambda future: queueing.leave() if future.cancelled() else None)  # it never had its turn
    return await asyncio.wrap_future(future)


def run_programs(codes: Sequence[str], *, unsafe: bool = False) -> list[ProgramResult | SandboxFailed]:
    """`run_program` of each, as many at a time as there are CPUs. What the machine keeps failing at is in its place.

    Raises SandboxUnavailable if this machine has no isolation, unless `unsafe`.
    """
    if not unsafe:
        require_isolation()
    return [*_threads().map(lambda code: try_program(code, unsafe=unsafe), codes)]


def try_program(code: str, *, unsafe: bool = False) -> ProgramResult | SandboxFailed:
    """`run_program`, again if the machine fails, TRIES times in all; then the failure, which is not the program's."""
    for number in range(1, TRIES + 1):
        try:
            return run_program(code, unsafe=unsafe)
        except SandboxFailed as error:
            if number == TRIES:
                return error
            time.sleep(WAIT_S * number)
    raise AssertionError("unreachable")


def remove(folder: str) -> None:
    """Delete what a program has left, folders of any depth and rights too. SandboxFailed if something stays.

    `rm` and `chmod` follow no links, and no depth is too much for them.
    """
    for prepare in ((), ("chmod", "-R", "u+rwX", "--", folder)):
        if prepare:
            subprocess.run(prepare, stdin=subprocess.DEVNULL, capture_output=True)
        found = subprocess.run(("rm", "-rf", "--", folder), stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if found.returncode == 0:
            return
    raise SandboxFailed(f"the folder of a program could not be removed: {found.stderr.strip()[:500]}")


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="sandbox")


def _run(code: str, timeout_s: float, memory_bytes: int, isolation: Isolation, folder: str) -> ProgramResult:
    token = secrets.token_hex(TOKEN_BYTES // 2).encode()
    source = code.encode("utf-8", "replace")
    before = machine_oom_kills()
    ended = run_isolated(isolation, source, token, timeout_s, memory_bytes, folder)
    if ended.status == 128 + signal.SIGKILL and ended.ending == "itself" and machine_oom_kills() > before:
        raise SandboxFailed("the machine ran out of memory, and a program was ended for it")
    success = ended.ending == "itself" and ended.result == PASSED + token
    error, crashed = (None, False) if success else why(ended, timeout_s, memory_bytes)
    return ProgramResult(
        success=success,
        stdout=ended.stdout.decode("utf-8", "replace"),
        stderr=ended.stderr.decode("utf-8", "replace"),
        error=error,
        timeout=ended.ending == "timeout",
        memory_exceeded=ended.ending == "memory" or (not success and (error or "").split(":")[0] == "MemoryError"),
        crashed=crashed,
        truncated=ended.ending == "output",
        isolation=isolation + ("+seccomp" if isolation != "none" and filter_bytes() else ""),
        seconds=ended.seconds,
    )


def why(ended: Ended, timeout_s: float, memory_bytes: int) -> tuple[str, bool]:
    """Why a program did not succeed, and whether it just ended."""
    if ended.ending == "timeout":
        return f"timeout: more than {timeout_s:g} s", False
    if ended.ending == "memory":
        return f"memory: more than {memory_bytes >> 20} MiB in all its processes", False
    if ended.ending == "files":
        return f"files: more than {SCRATCH_FILES}", False
    if ended.ending == "output":
        return f"output: more than {OUTPUT_BYTES >> 10} KiB", False
    if ended.result.startswith(RAISED):
        return ended.result[len(RAISED) :].decode("utf-8", "replace"), False
    if ended.status > 128:
        return f"crashed: signal {ended.status - 128}", True
    return f"crashed: it ended with status {ended.status} before its last statement", True


# --- which isolation this machine has --------------------------------------------------------------------------------


def usable() -> Isolation | None:
    """The isolation that programs get here; None if there is none. The first call tries them."""
    return _probe()[0]


def require_isolation() -> Isolation:
    """The same, or SandboxUnavailable with what is missing."""
    found, reasons = _probe()
    if found is None:
        raise SandboxUnavailable(f"programs cannot be isolated here ({reasons}); {HOW_TO_GET_IT}")
    return found


def _probe() -> tuple[Isolation | None, str]:
    with _probing:
        return _probe_once()


@cache
def _probe_once() -> tuple[Isolation | None, str]:
    if sys.platform != "linux":
        return None, f"{sys.platform} has no namespaces"
    reasons = []
    for isolation in ISOLATIONS:
        reason = what_is_wrong_with(isolation)
        if reason is None:
            return isolation, ""
        reasons.append(f"{isolation}: {reason}")
    return None, "; ".join(reasons)


def what_is_wrong_with(isolation: Isolation) -> str | None:
    """Try an isolation: None if it holds what it must, else what it does not."""
    try:
        result = _run(PROBE, 20.0, MEMORY_BYTES, isolation, "")
    except (SandboxUnavailable, SandboxFailed) as error:
        return str(error)
    return result.error

"""One isolated process from its start to its certain end, watched from outside: time, output, the tree's memory."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import select
import selectors
import signal
import subprocess
import time
from dataclasses import dataclass, field
from io import FileIO
from typing import Literal

from nanochat_ray.sandbox.inside import LENGTH_BYTES, READY
from nanochat_ray.sandbox.isolation import SCRATCH_FILES, Isolation, command
from nanochat_ray.sandbox.proc_files import prefer_as_victims, scratch_files, tree, tree_bytes, used_s
from nanochat_ray.sandbox.result import SandboxFailed
from nanochat_ray.sandbox.seccomp import filter_bytes

OUTPUT_BYTES = 64 << 10  # kept of each of stdout and stderr
FILE_BYTES, OPEN_FILES = 16 << 20, 64
PROCESSES = 32  # and threads, of one program
START_TIMEOUT_S, END_TIMEOUT_S = 30.0, 30.0
LAUNCHER_ENDS_S = 2.0  # after what it has launched
WATCH_EVERY_S = 0.05
LEAST_MISSING = 0.02  # of its limit, for which a program is waited for longer
LONGEST = 3.0  # times its limit, for a program that waits for a CPU
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8", "PYTHONUTF8": "1",
    "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1",
}  # fmt: skip

Ending = Literal["itself", "timeout", "memory", "files", "output"]


@dataclass
class Ended:
    """What is known of a process that is gone."""

    stdout: bytes
    stderr: bytes
    result: bytes  # what came over the pipe that only inside.py knows
    ending: Ending
    status: int  # as a shell has it: 128 + the number of the signal that ended it
    seconds: float  # from the program's start


@dataclass
class Running:
    """A started process and this side's ends of its pipes."""

    process: subprocess.Popen[bytes]
    ended_fd: int  # readable when the process has ended
    control: FileIO  # takes the token and the program
    outputs: dict[str, FileIO]  # stdout, stderr, result, info
    received: dict[str, bytearray] = field(default_factory=dict)
    first_fd: int | None = None  # the first process of the program's namespace: all others end with it
    first_pid: int = 0

    def read(self, name: str) -> bool:
        """Take what is there; False at a stream's end."""
        data = self.outputs[name].read(OUTPUT_BYTES)
        self.received[name] += data or b""
        return data is None or len(data) > 0

    def forget(self) -> None:
        """Close what is neither a pipe nor `ended_fd`."""
        if self.first_fd is not None:
            os.close(self.first_fd)

    def flooded(self) -> bool:
        return any(len(data) > OUTPUT_BYTES for data in self.received.values())

    def end(self) -> None:
        """Kill every process of it, and wait until all of them are gone. SandboxFailed if they do not go."""
        if self.first_fd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.first_fd, signal.SIGKILL)
            wait_readable(self.ended_fd, LAUNCHER_ENDS_S)  # the launcher waits for its child, so no orphan is left
        with contextlib.suppress(ProcessLookupError):
            if self.process.returncode is None:
                os.killpg(self.process.pid, signal.SIGKILL)  # the launcher's; without isolation the program's
        if not all(wait_readable(fd, END_TIMEOUT_S) for fd in (self.first_fd, self.ended_fd) if fd is not None):
            raise SandboxFailed(f"the processes of a program could not be ended in {END_TIMEOUT_S:.0f} s")
        self.process.wait()


def run_isolated(
    isolation: Isolation, source: bytes, token: bytes, timeout_s: float, memory_bytes: int, folder: str
) -> Ended:
    """Run a program's source. `folder` is its working folder where nothing is isolated, else empty.

    Raises SandboxFailed if it could not be started, or not be ended. Nothing is left of it in any case.
    """
    with contextlib.ExitStack() as stack:
        try:
            running = start(stack, isolation, timeout_s, memory_bytes, folder)
        except OSError as error:
            raise SandboxFailed(f"no process could be started: {error}") from error
        stack.callback(running.end)
        wait_until_ready(running, has_info=isolation != "none")
        if isolation == "bwrap":  # whose first process knows no limits; that of "unshare" has set them itself
            limit_first(running.first_pid, limits_of(isolation, timeout_s, memory_bytes))
        prefer_as_victims(running.first_pid)
        begun = time.monotonic()
        length = b"%0*d" % (LENGTH_BYTES, len(source))
        ending = watch(running, token + length + source, timeout_s, memory_bytes)
        seconds = time.monotonic() - begun
        running.end()
        for name, stream in running.outputs.items():
            while not running.flooded() and wait_readable(stream.fileno(), 0) and running.read(name):
                pass
        if ending == "itself" and running.flooded():
            ending = "output"
        code = running.process.returncode
        if ending == "itself" and code < 0 and isolation != "none":  # programs cannot reach it
            raise SandboxFailed(f"the process around a program was ended from outside, by signal {-code}")
        received = {name: bytes(data[:OUTPUT_BYTES]) for name, data in running.received.items()}
        return Ended(received["stdout"], received["stderr"], received["result"], ending,
                     code if code >= 0 else 128 - code, seconds)  # fmt: skip


def limits_of(isolation: Isolation, timeout_s: float, memory_bytes: int) -> dict[str, int]:
    """The kernel's limits for one process of a program."""
    limits = {
        "RLIMIT_CPU": math.ceil(timeout_s) + 1, "RLIMIT_AS": memory_bytes, "RLIMIT_FSIZE": FILE_BYTES,
        "RLIMIT_NOFILE": OPEN_FILES, "RLIMIT_NPROC": PROCESSES, "RLIMIT_CORE": 0, "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_MEMLOCK": 0,
    }  # fmt: skip
    if isolation == "none":
        del limits["RLIMIT_NPROC"]  # outside of a namespace it counts all processes of the user
    return limits


def limit_first(pid: int, limits: dict[str, int]) -> None:
    """Limit a process from outside, where its user may. Where not, it is not the program's user either."""
    for name, value in limits.items():
        with contextlib.suppress(PermissionError, ProcessLookupError):
            resource.prlimit(pid, getattr(resource, name), (value, value))


def start(
    stack: contextlib.ExitStack, isolation: Isolation, timeout_s: float, memory_bytes: int, folder: str
) -> Running:
    limits = limits_of(isolation, timeout_s, memory_bytes)
    with contextlib.ExitStack() as theirs:
        outputs, given = {}, {}
        for name in ("stdout", "stderr", "result", "info"):
            outputs[name], given[name] = pipe(stack, theirs)
            os.set_blocking(outputs[name].fileno(), False)
        given["control"], control = pipe(theirs, stack)
        os.set_blocking(control.fileno(), False)
        if isolation == "bwrap" and filter_bytes():
            given["filter"], filter_end = pipe(theirs, theirs)
            filter_end.write(filter_bytes())
            filter_end.close()
        fds = {name: file.fileno() for name, file in given.items()}
        process = subprocess.Popen(
            command(isolation, fds["control"], fds["result"], fds["info"], fds.get("filter"), limits),
            stdin=subprocess.DEVNULL, stdout=given["stdout"], stderr=given["stderr"],
            pass_fds=[fd for name, fd in fds.items() if name not in ("stdout", "stderr")],
            env=ENVIRONMENT | ({"HOME": folder, "TMPDIR": folder} if folder else {}), cwd=folder or "/",
            start_new_session=True,
        )  # fmt: skip
    try:
        ended_fd = os.pidfd_open(process.pid)
    except OSError:
        process.kill()
        process.wait()
        raise
    stack.callback(os.close, ended_fd)
    running = Running(process, ended_fd, control, outputs, {name: bytearray() for name in outputs})
    stack.callback(running.forget)
    return running


def pipe(reader: contextlib.ExitStack, writer: contextlib.ExitStack) -> tuple[FileIO, FileIO]:
    """A pipe whose ends are closed with these."""
    read_fd, write_fd = os.pipe()
    return reader.enter_context(FileIO(read_fd, "rb")), writer.enter_context(FileIO(write_fd, "wb"))


def wait_readable(fd: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(1000 * timeout_s))


def wait_until_ready(running: Running, has_info: bool) -> None:
    """Wait until the inner side has been set up and asks for the program. SandboxFailed with what it wrote if it fails.

    The first process of the namespace cannot go before it gets a program, so its number is still its own when it is
    turned into a descriptor.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    result, info = running.received["result"], running.received["info"]
    with selectors.DefaultSelector() as selector:
        for name in ("stderr", "result", "info"):
            selector.register(running.outputs[name], selectors.EVENT_READ, name)
        while not result.startswith(READY) or (has_info and running.first_fd is None):
            events = selector.select(deadline - time.monotonic())
            over = [key for key, _ in events if not running.read(key.data)]
            if not events or running.outputs["result"] in [key.fileobj for key in over]:
                raise SandboxFailed(f"an isolated process could not be set up: {last_words(running)}")
            for key in over:
                selector.unregister(key.fileobj)
            if b"}" in info and running.first_fd is None:
                running.first_pid = json.loads(info)["child-pid"]
                try:
                    running.first_fd = os.pidfd_open(running.first_pid)
                except OSError as error:
                    raise SandboxFailed(f"an isolated process ended before it had a program: {error}") from error
    del result[: len(READY)]


def last_words(running: Running) -> str:
    """What a process that failed to be set up says about it."""
    while wait_readable(running.outputs["stderr"].fileno(), 0.2) and running.read("stderr"):
        pass
    return running.received["stderr"].decode("utf-8", "replace").strip().split("\n")[-1] or "no answer"


class Clock:
    """The time on the wall, given back where an overloaded machine let the program wait for a CPU."""

    def __init__(self, running: Running, timeout_s: float) -> None:
        self.pid, self.timeout_s = running.first_pid or running.process.pid, timeout_s
        self.begun_s, self.used_s = time.monotonic(), used_s(self.pid)
        self.deadline_s = self.begun_s + timeout_s

    def is_over(self) -> bool:
        """Whether the program has had its time. SandboxFailed if the machine does not give it that in LONGEST."""
        if time.monotonic() < self.deadline_s:
            return False
        ran_s, waited_s = (now - before for now, before in zip(used_s(self.pid), self.used_s, strict=True))
        missing_s = min(self.begun_s + self.timeout_s + waited_s - time.monotonic(), self.timeout_s - ran_s)
        if missing_s < LEAST_MISSING * self.timeout_s:
            return True
        if time.monotonic() >= self.begun_s + LONGEST * self.timeout_s:
            raise SandboxFailed(f"the machine is overloaded: a program had a CPU for {ran_s:.2g} s only, in "
                                f"{LONGEST:g} times its limit of {self.timeout_s:g} s")  # fmt: skip
        self.deadline_s = min(time.monotonic() + missing_s, self.begun_s + LONGEST * self.timeout_s)
        return False


def watch(running: Running, sent: bytes, timeout_s: float, memory_bytes: int) -> Ending:
    """Send the program and wait for its end, or a reason to end it."""
    rest, clock = memoryview(sent), Clock(running, timeout_s)
    with selectors.DefaultSelector() as selector:
        for name in ("stdout", "stderr", "result"):
            selector.register(running.outputs[name], selectors.EVENT_READ, name)
        selector.register(running.ended_fd, selectors.EVENT_READ, "ended")
        selector.register(running.control, selectors.EVENT_WRITE, "control")
        next_look = time.monotonic() + WATCH_EVERY_S
        while True:
            now = time.monotonic()
            if clock.is_over():
                return "timeout"
            if now >= next_look:
                pids = [pid for pid in tree(running.first_pid) if pid != running.first_pid]
                if tree_bytes(running.first_pid, pids, memory_bytes) > memory_bytes:
                    return "memory"
                if scratch_files(pids) > SCRATCH_FILES:
                    return "files"
                next_look = time.monotonic() + WATCH_EVERY_S
            for key, _ in selector.select(max(0.0, min(clock.deadline_s, next_look) - now)):
                if key.data == "ended":
                    return "itself"
                if key.data == "control":
                    rest = rest[send(running.control, rest) :]
                    if not rest:
                        selector.unregister(running.control)
                        running.control.close()
                elif not running.read(key.data):
                    selector.unregister(key.fileobj)
            if running.flooded():
                return "output"


def send(control: FileIO, rest: memoryview) -> int:
    """Write what the pipe takes; all of it counts as written if nobody reads any more."""
    try:
        return control.write(rest) or 0
    except BrokenPipeError:
        return len(rest)

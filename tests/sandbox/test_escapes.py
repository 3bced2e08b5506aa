"""The escape corpus on every isolation: each attempt is held off, and the machine is as it was before."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from nanochat_ray.sandbox import run_program
from tests.sandbox.escapes import ATTEMPTS, GUARD, LASTING, PRETENCE
from tests.sandbox.isolated import processes_with, zombies


@dataclass
class Outside:
    """What a program must not reach."""

    file: Path
    listeners: list[socket.socket]
    process: subprocess.Popen

    def fill_in(self, code: str) -> str:
        values = {"PATH": str(self.file), "PORT": self.listeners[0].getsockname()[1], "PID": self.process.pid,
                  "NAME": self.listeners[1].getsockname().decode()}  # fmt: skip
        return GUARD + "".join(f"{name} = {value!r}\n" for name, value in values.items()) + code

    def untouched(self) -> bool:
        for listener in self.listeners:
            with pytest.raises(BlockingIOError):
                listener.accept()
        status = psutil.Process(self.process.pid).status()
        return self.file.read_text() == "canary" and status == psutil.STATUS_SLEEPING


@pytest.fixture(scope="module")
def outside(tmp_path_factory) -> Iterator[Outside]:
    file = tmp_path_factory.mktemp("outside") / "canary"
    file.write_text("canary")
    file.chmod(0o666)
    listeners = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)]
    listeners[1].bind(f"\0canary-{os.getpid()}")
    listeners[1].listen()
    for listener in listeners:
        listener.setblocking(False)
    process = subprocess.Popen(["sleep", "1000"])
    yield Outside(file, listeners, process)
    process.kill()
    process.wait()
    for listener in listeners:
        listener.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTEMPTS)
def test_attempt_without_the_filter(name, isolation, nonce, outside, monkeypatch, without_filter):
    test_attempt(name, isolation, nonce, outside, monkeypatch)


@pytest.mark.parametrize("name", ATTEMPTS)
def test_attempt(name, isolation, nonce, outside, monkeypatch):
    monkeypatch.setenv("SECRET", "do not tell")
    hostname, descriptors, files = socket.gethostname(), os.listdir("/proc/self/fd"), set(os.listdir("/tmp"))
    timeout_s = 0.3 if name in LASTING else 10.0
    result = run_program(outside.fill_in(ATTEMPTS[name]), timeout_s, isolation=isolation)
    assert name not in LASTING or not result.success
    assert "not isolated" not in (result.error or "")
    assert "escaped" not in result.stdout and "do not tell" not in result.stdout, result
    assert not (name in PRETENCE and result.success), result
    assert outside.untouched()
    assert processes_with(nonce) == [] and zombies() == []
    assert socket.gethostname() == hostname
    assert os.listdir("/proc/self/fd") == descriptors
    new = set(os.listdir("/tmp")) - files
    assert not {name for name in new if name.startswith(("program-", "file", "new", "disk", "link", "huge"))}


def test_the_corpus_is_large():
    assert len(ATTEMPTS) >= 40

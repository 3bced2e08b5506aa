"""Which isolations this machine has, for tests that need them; and what programs must not leave behind or reach."""

from __future__ import annotations

import contextlib
import os
from functools import cache
from pathlib import Path

import pytest

from nanochat_ray.sandbox.isolation import Isolation
from nanochat_ray.sandbox.program import what_is_wrong_with

NEED = "NANOCHAT_RAY_NEED_SANDBOX"
reason_against = cache(what_is_wrong_with)


def require(isolation: Isolation) -> None:
    """Skip the test where this isolation is missing; fail where the environment says that it must be there."""
    reason = reason_against(isolation)
    if reason is not None:
        text = f"no isolation by {isolation}: {reason}"
        pytest.fail(text) if os.environ.get(NEED) else pytest.skip(text)


def processes_with(text: str) -> list[int]:
    """The processes whose environment holds a text, zombies left out."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if text.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def zombies() -> list[int]:
    """Children of this process that have ended and were not waited for."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state == "Z" and int(parent) == os.getpid():
                found.append(int(folder.name))
    return found

"""What running a program gives, and the ways in which running it can be impossible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["passed", "failed", "timeout", "memory", "output", "crashed"]


class SandboxUnavailable(RuntimeError):
    """This machine cannot isolate programs; the message says what is missing. Nothing was run."""


class SandboxFailed(RuntimeError):
    """The machine could not run a program to its end (no process, no memory, no room): nothing is known about it."""


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended."""

    success: bool  # its last statement returned, within all limits
    stdout: str
    stderr: str
    error: str | None  # why not, the kind in front: "AssertionError: no", "timeout: more than 5 s"
    timeout: bool = False
    memory_exceeded: bool = False
    crashed: bool = False  # it ended without its last statement and without an exception: by a signal, by os._exit
    truncated: bool = False  # it wrote more than is kept, which ended it
    isolation: str = "none"  # "bwrap", "unshare", either with "+seccomp"; "none" is a program without isolation
    seconds: float = 0.0  # from its first statement

    @property
    def outcome(self) -> Outcome:
        """One word for a table."""
        if self.success:
            return "passed"
        if self.timeout:
            return "timeout"
        if self.memory_exceeded:
            return "memory"
        if self.truncated:
            return "output"
        return "crashed" if self.crashed else "failed"

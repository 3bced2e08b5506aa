"""Running programs that a model wrote, isolated from this machine."""

from nanochat_ray.sandbox.program import (
    require_isolation,
    run_program,
    run_program_async,
    run_programs,
    try_program,
    usable,
)
from nanochat_ray.sandbox.queueing import QUEUEING, Queueing
from nanochat_ray.sandbox.result import ProgramResult, SandboxFailed, SandboxUnavailable

__all__ = [
    "QUEUEING",
    "ProgramResult",
    "Queueing",
    "SandboxFailed",
    "SandboxUnavailable",
    "require_isolation",
    "run_program",
    "run_program_async",
    "run_programs",
    "try_program",
    "usable",
]

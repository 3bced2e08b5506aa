"""Where a run ran: code version, machine, software, memory, and what the time cost."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

UNKNOWN = "unknown"
COMMAND_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Environment:
    git_branch: str
    git_commit: str  # short; "unknown" outside a repository, as in a submitted job's working directory
    git_dirty: bool | None
    platform: str
    cpu: str
    cpus_physical: int | None
    cpus_logical: int | None
    ram_bytes: int
    gpus: Mapping[str, int]  # name -> count
    vram_bytes: int  # of all GPUs together
    cuda: str | None  # of the torch build
    python: str
    torch: str
    ray: str


def describe_environment() -> Environment:
    """This machine and this code, as seen by the driver."""
    import psutil

    gpus = _gpus()
    branch, commit, dirty = _git(Path(__file__).resolve())
    return Environment(
        git_branch=branch,
        git_commit=commit,
        git_dirty=dirty,
        platform=platform.platform(),
        cpu=_cpu_name(),
        cpus_physical=psutil.cpu_count(logical=False),
        cpus_logical=psutil.cpu_count(),
        ram_bytes=psutil.virtual_memory().total,
        gpus={name: sum(other == name for other, _ in gpus) for name, _ in gpus},
        vram_bytes=sum(size for _, size in gpus),
        cuda=_cuda_version(),
        python=platform.python_version(),
        torch=_version("torch"),
        ray=_version("ray"),
    )


def peak_memory_bytes(device: str = "cpu") -> int:
    """The most memory that this process has had: allocated on the device for CUDA, else resident."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def cost(price_per_hour: float | None, seconds: float) -> float | None:
    """What `seconds` of the whole machine cost, in the price's currency; None without a price."""
    return None if price_per_hour is None else price_per_hour * seconds / 3600


def _output(*command: str, folder: Path | None = None) -> str | None:
    """What a command prints, None if it is not there or fails."""
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, env=environment
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _git(file: Path) -> tuple[str, str, bool | None]:
    """Branch, short commit and whether there are changes, of the repository that tracks `file`."""
    folder = file.parent
    if _output("git", "ls-files", "--error-unmatch", file.name, folder=folder) is None:
        return UNKNOWN, UNKNOWN, None  # perhaps inside another project's repository, which says nothing
    branch = _output("git", "rev-parse", "--abbrev-ref", "HEAD", folder=folder)
    commit = _output("git", "rev-parse", "--short", "HEAD", folder=folder)
    status = _output("git", "status", "--porcelain", "--untracked-files=no", folder=folder)
    return branch or UNKNOWN, commit or UNKNOWN, None if status is None else bool(status)


def _gpus() -> list[tuple[str, int]]:
    """(name, memory in bytes) of each NVIDIA GPU, asked of the driver so that this process takes no GPU memory."""
    listing = _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
    found = []
    for line in (listing or "").splitlines():
        name, _, size_mib = line.rpartition(",")
        found.append((name.strip(), int(float(size_mib)) * 2**20 if size_mib.strip().isdigit() else 0))
    return found


def _cuda_version() -> str | None:
    import torch

    cuda: Any = torch.version.cuda
    return cuda


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return UNKNOWN

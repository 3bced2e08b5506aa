"""Which device and which number format a run computes with."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Parameters of glibc's mallopt, from its malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
COMPILE_CACHE = "~/.cache/nanochat_ray/torch_compile"
CPU_BF16_FLAGS = ("avx512_bf16", "amx_bf16")  # names in /proc/cpuinfo; without one of them bf16 is emulated, and slow


def pick_device(requested: str | None) -> str:
    """The device type to run on: what was asked for, else the best there is.

    Raises ValueError if the requested device type is unknown or absent.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if requested is None:
        return next(name for name, present in there.items() if present)
    kind = requested.split(":")[0]
    if kind not in there:
        raise ValueError(f"device {requested!r} is unknown; choose from {', '.join(there)}")
    if not there[kind]:
        raise ValueError(f"device {requested!r} was asked for, but torch sees none; leave it out to take what is there")
    return kind


def prepare_device(device: str) -> None:
    """Settings of this process that make training faster; call once before the model is built.

    What torch.compile makes is kept in the user's cache folder, so that a restart compiles nothing again (torch's own
    default is a folder that a reboot empties); TORCHINDUCTOR_CACHE_DIR names another. CUDA: fp32 matrix products in
    TF32. CPU: freed memory stays with the process. Otherwise every large tensor is
    memory that the kernel must first fill with zeros, which takes about a quarter of a training step.
    """
    chosen = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    if not chosen or Path(chosen).name.startswith("torchinductor_"):  # torch sets its default when it is imported
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(COMPILE_CACHE).expanduser())
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")
    elif device == "cpu":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, 2**30)
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def pick_dtype(device: str, requested: str | None) -> tuple[torch.dtype, str]:
    """The compute dtype for a device type, and the reason in one line.

    First that is set: `requested`, the environment variable NANOCHAT_DTYPE, the hardware's rule.
    Raises ValueError for an unknown name.
    """
    for name, source in ((requested, "asked for"), (os.environ.get("NANOCHAT_DTYPE"), "NANOCHAT_DTYPE")):
        if name:
            if name not in DTYPES:
                raise ValueError(f"compute dtype {name!r} ({source}) is unknown; choose from {', '.join(DTYPES)}")
            return DTYPES[name], f"{name}: {source}"
    if device.startswith("cuda"):
        major, minor = torch.cuda.get_device_capability()
        if major >= 8:
            return torch.bfloat16, f"bfloat16: CUDA compute capability {major}.{minor}"
        return torch.float32, f"float32: CUDA compute capability {major}.{minor} has no bfloat16"
    if device == "cpu":
        found = cpu_bf16_flag()
        if found:
            return torch.bfloat16, f"bfloat16: this CPU has {found}"
        return torch.float32, "float32: this CPU has neither AVX512-BF16 nor AMX"
    return torch.float32, f"float32: the rule for {device}"


def cpu_bf16_flag() -> str | None:
    """The CPU feature that makes bf16 matrix products fast, or None. Only Linux says; elsewhere None."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags") and ":" in line), [])
    return next((flag for flag in CPU_BF16_FLAGS if flag in flags), None)

"""What machines have: memory, peak, bandwidths. From data sheets, rounded; what is not listed is not guessed."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nanochat_ray.model.scaling import peak_flops

GIB = 2**30
UNLIMITED_BYTES = 2**60  # a control group without a limit says something like this

# Pattern of the device's name -> memory that torch sees (GiB), its bandwidth (TB/s), one direction of the link to the
# GPUs of the same machine (GB/s; NVLink, or PCIe where there is none). The first match wins. A name that leaves the
# memory open (A100, V100) is taken as the larger kind.
GPUS: Final = (
    (r"gb300|b300", 268.0, 8.0, 900),
    (r"gb200|b200", 178.4, 8.0, 900),
    (r"b100", 178.4, 8.0, 900),
    (r"h200.*(nvl|pcie)", 139.8, 4.8, 450),
    (r"h200", 139.8, 4.8, 450),
    (r"gh200", 94.5, 4.0, 450),
    (r"h100.*nvl", 93.1, 3.9, 300),
    (r"h100.*pcie", 79.1, 2.0, 63),
    (r"h100", 79.1, 3.35, 450),
    (r"h800", 79.1, 3.35, 200),
    (r"h20", 95.1, 4.0, 450),
    (r"a100.*pcie.*40|a100.*40.*pcie", 39.4, 1.55, 32),
    (r"a100.*40", 39.4, 1.55, 300),
    (r"(a100|a800).*pcie", 79.1, 1.94, 32),
    (r"a100|a800", 79.1, 2.0, 300),
    (r"rtx pro 6000", 94.9, 1.79, 63),
    (r"rtx 6000 ada", 47.5, 0.96, 32),
    (r"a6000", 47.5, 0.768, 32),
    (r"a40", 44.4, 0.696, 32),
    (r"a30", 23.6, 0.933, 32),
    (r"a10g?", 22.0, 0.6, 32),
    (r"l40s?", 44.4, 0.864, 32),
    (r"l4", 22.0, 0.3, 32),
    (r"v100.*16", 15.8, 0.9, 150),
    (r"v100", 31.7, 0.9, 150),
    (r"t4", 14.6, 0.32, 16),
    (r"mi325", 255.0, 6.0, 448),
    (r"mi300x", 191.0, 5.3, 448),
    (r"5090", 31.4, 1.79, 63),
    (r"4090", 23.5, 1.01, 32),
    (r"3090", 23.6, 0.936, 32),
)
# Peaks of devices that scaling.PEAK_FLOPS does not have: bf16, or fp32 for those without bf16.
OTHER_PEAKS: Final = (
    (r"gh200", 989e12), (r"gb300", 2.5e15), (r"b300", 2.25e15), (r"h20", 148e12), (r"rtx pro 6000", 503.8e12),
    (r"rtx 6000 ada", 364e12), (r"l40", 181e12), (r"a6000", 154.8e12), (r"a10g?", 125e12), (r"v100", 15.7e12),
    (r"t4", 8.1e12),
)
OTHER_KINDS = r"laptop|mobile|max-q"  # which share a name with a larger device
NO_BF16 = r"v100|\bt4"
# Dollars for one GPU and hour: nanochat's report takes these (commit a825e63, March 2026). A person's price wins.
PRICES: Final = ((r"h100", 3.00), (r"a100", 1.79), (r"v100", 0.55))
PRICE_SOURCE = "a rule of thumb of March 2026; --price-per-hour sets yours"


@dataclass(frozen=True)
class Device:
    """What one rank computes on. None: not known."""

    name: str
    memory_bytes: int | None
    peak_flops: float | None  # dense, in the compute dtype
    bandwidth: float | None  # bytes per second of its memory
    link: float | None  # bytes per second, one direction, to the other ranks of its machine
    bf16: bool = True
    on_cpu: bool = False


@dataclass(frozen=True)
class Machines:
    """What a run is planned for."""

    device: Device
    ranks: int  # of all nodes
    nodes: int = 1
    where: str = "as asked for"

    @property
    def per_node(self) -> int:
        return -(-self.ranks // self.nodes)

    @property
    def name(self) -> str:
        nodes = f" on {self.nodes} nodes" if self.nodes > 1 else ""
        kind = "CPU worker" if self.device.on_cpu else self.device.name
        return f"{self.ranks} x {kind}{nodes}"


def gpu(name: str, memory_bytes: int | None = None) -> Device:
    """A GPU by a name such as CUDA, Ray or a cloud gives it; `memory_bytes` as measured, if it was.

    Of several kinds, joined by commas, each figure is the least, and not known if it is not of one of them.
    """
    if "," in name:
        kinds = [gpu(kind, memory_bytes) for kind in name.split(",")]
        return Device(
            name, _least(kind.memory_bytes for kind in kinds), _least(kind.peak_flops for kind in kinds),
            _least(kind.bandwidth for kind in kinds), _least(kind.link for kind in kinds),
            all(kind.bf16 for kind in kinds),
        )
    found = _match(GPUS, name)
    memory, bandwidth, link = found or (None, None, None)
    peak = math.inf if re.search(rf"gh200|{OTHER_KINDS}", name.lower()) else peak_flops(name)
    if math.isinf(peak):
        other = _match(OTHER_PEAKS, name)
        peak = other[0] if other else math.inf
    return Device(
        name=name,
        memory_bytes=memory_bytes or (int(memory * GIB) if memory else None),
        peak_flops=peak if math.isfinite(peak) else None,
        bandwidth=bandwidth * 1e12 if bandwidth else None,
        link=link * 1e9 if link else None,
        bf16=re.search(NO_BF16, name.lower()) is None,
    )


def cpu(ranks: int, flops: float | None = None, bf16: bool = False) -> Device:
    """A share of this machine; `flops` are all its threads' FLOP/s in matrix products, as measured."""
    return Device("CPU", host_memory_bytes() // max(1, ranks), flops / ranks if flops else None, None, None, bf16, True)


def host_memory_bytes() -> int:
    """Memory of this machine, or of the container that this process is in."""
    import psutil

    found = int(psutil.virtual_memory().total)
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = int(Path(path).read_text())
        except (OSError, ValueError):  # not there, or "max"
            continue
        if limit < UNLIMITED_BYTES:
            found = min(found, limit)
    return found


def price_per_gpu_hour(device: Device) -> float | None:
    found = _match(PRICES, device.name)
    return found[0] if found else None


def free_disk_bytes(folder: Path) -> int | None:
    """Free bytes of the file system that a folder is on, or will be on when it is made; None if it does not say."""
    folder = folder.expanduser().absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def _least(figures: Iterable[float | None]) -> Any:
    known = list(figures)
    return None if None in known else min(figure for figure in known if figure is not None)


def _match(table: tuple[tuple, ...], name: str) -> tuple | None:
    """The rest of the first row whose pattern the name has; a further digit or letter is another device.

    A number of GPUs may stand before the name (8xH100).
    """
    name = re.sub(r"(?<![a-z0-9])\d+x(?=[a-z])", "", name.lower())
    if re.search(OTHER_KINDS, name):
        return None
    for pattern, *rest in table:
        if re.search(rf"(?<![a-z0-9])(?:{pattern})(?!\d)", name):
            return tuple(rest)
    return None

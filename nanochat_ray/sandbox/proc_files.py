"""What a program's processes hold and have used, as /proc shows it from outside."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from nanochat_ray.sandbox.isolation import SCRATCH

FIRST_PROCESS_BYTES = 32 << 20  # far above what the first process of a namespace takes by itself
SOCKET_BYTES = 8 << 20  # at most, of one: on machines tuned for long lines the pair of an event loop would be too much
# tables of /proc/<pid>/net and the settings below /proc/sys/net whose last numbers are the most that a socket buffers
SOCKET_TABLES = {"unix": ("core/wmem_max",) * 2, "udp": ("core/rmem_max",) * 2,
                 "tcp": ("ipv4/tcp_rmem", "ipv4/tcp_wmem")}  # fmt: skip
USUAL_BUFFER_BYTES = {"core/wmem_max": 212_992, "core/rmem_max": 212_992, "ipv4/tcp_rmem": 6 << 20,
                      "ipv4/tcp_wmem": 4 << 20}  # fmt: skip
WITHOUT_BUFFERS = {"06", "0A"}  # states of TCP: after the end, and listening


def tree(pid: int) -> Iterator[int]:
    """A process and its descendants; some may be gone meanwhile. Empty for 0."""
    waiting = [pid] if pid else []
    while waiting:
        parent = waiting.pop()
        yield parent
        with contextlib.suppress(OSError):
            for children in Path(f"/proc/{parent}/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    waiting += map(int, children.read_text().split())


def tree_bytes(first_pid: int, pids: Sequence[int], enough: int) -> int:
    """Memory that a program's processes hold together, shared pages counted once, files in memory, sockets' buffers.

    What a single process has mapped is limited by the kernel already, and not looked at. Of the namespace's first
    process only that counts which it would not have by itself.
    """
    first_bytes = max(0, resident_bytes(first_pid) - FIRST_PROCESS_BYTES)
    total = first_bytes + sum(memory_files(pid) for pid in pids) + socket_bytes(pids)
    for pid in pids if len(pids) > 1 or first_bytes else []:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += 1024 * sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
        if total > enough:
            break
    return total


def resident_bytes(pid: int) -> int:
    """Of a process whose memory need not be readable; 0 for one that is gone."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def memory_files(pid: int) -> int:
    """Bytes of a process' open files that lie in memory only (memfd_create), mapped or not."""
    total = 0
    with contextlib.suppress(OSError):
        for link in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(link.path).startswith("/memfd:"):
                    total += 512 * link.stat().st_blocks
    return total


def socket_bytes(pids: Sequence[int]) -> int:
    """The most that the sockets in the network of these processes can hold, those that nobody has accepted too."""
    for pid in pids:
        with contextlib.suppress(OSError):
            total = 0
            for table, settings in SOCKET_TABLES.items():
                rows = Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
                if table != "unix":
                    with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
                        rows += Path(f"/proc/{pid}/net/{table}6").read_text().splitlines()[1:]
                if table == "tcp":
                    rows = [row for row in rows if row.split()[3] not in WITHOUT_BUFFERS]
                if rows:
                    total += len(rows) * min(SOCKET_BYTES, sum(buffer_bytes(setting) for setting in settings))
            return total
    return 0


def buffer_bytes(setting: str) -> int:
    """The most that a socket's buffer may hold by this setting; the kernel's usual value where it is not shown."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/sys/net", setting).read_text().split()[-1])
    return USUAL_BUFFER_BYTES[setting]


def used_s(pid: int) -> tuple[float, float]:
    """Seconds that a tree of processes has had a CPU, and seconds that it has waited for one; (0, 0) if unknown.

    It has waited as long as the thread that has waited longest, but for what its other threads ran meanwhile: a fork
    bomb stands in its own way.
    """
    threads = []
    for member in tree(pid):
        with contextlib.suppress(OSError):
            for thread in os.scandir(f"/proc/{member}/task"):
                with contextlib.suppress(OSError):
                    numbers = Path(thread.path, "schedstat").read_text().split()
                    threads.append((int(numbers[0]) / 1e9, int(numbers[1]) / 1e9))
    all_ran = sum(ran for ran, _ in threads)
    return all_ran, max((waited - (all_ran - ran) for ran, waited in threads), default=0.0)


def scratch_files(pids: Sequence[int]) -> int:
    """Files in the scratch folder of these processes, whose bytes are limited, but not by every kernel their number."""
    for pid in pids:
        with contextlib.suppress(OSError):
            found = os.statvfs(f"/proc/{pid}/root{SCRATCH}")
            return found.f_files - found.f_ffree
    return 0


def prefer_as_victims(first_pid: int) -> None:
    """Let the kernel, should the machine's memory run out, end this program rather than anything else."""
    for pid in tree(first_pid):
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/oom_score_adj").write_text("1000")


def machine_oom_kills() -> int:
    """How many processes the kernel has ended for want of memory since it started."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0

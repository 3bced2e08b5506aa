"""How long `--help` of every job takes: median of several starts, as a table and one JSON line."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

STARTS = 3


def seconds(job: Path) -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, str(job), "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def main() -> None:
    jobs = sorted((Path(__file__).parent.parent / "jobs").glob("[!_]*.py"))
    found = {job.name: statistics.median(seconds(job) for _ in range(STARTS)) for job in jobs}
    for name, value in found.items():
        print(f"{name:<16} {value:.2f} s")
    print(json.dumps({"bench": "help", "seconds": found, "slowest": max(found.values())}))


if __name__ == "__main__":
    main()

"""Programs per second in the sandbox: HumanEval's reference solutions, beside what starting processes costs here.

    python bench/sandbox.py --task-data DATA [--workers 2] [--rounds 5] [--programs 164]

DATA is a folder with human_eval/. `python` is a bare interpreter (`-I -S -c pass`), started and waited for; `empty` an
empty program in the sandbox, so `empty` against `python` is what the isolation costs; `HumanEval` the reference
solutions with their tests. All three from `workers` threads of a small process, in turns. Medians of the rounds; a
program that does not pass is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nanochat_ray.sandbox import run_program
from nanochat_ray.sandbox.isolation import ISOLATIONS, Isolation
from nanochat_ray.sandbox.program import what_is_wrong_with
from nanochat_ray.sandbox.python_files import interpreter
from nanochat_ray.sandbox.seccomp import filter_bytes
from nanochat_ray.tasks.humaneval import HumanEval
from nanochat_ray.tasks.rows import TaskSources


def bare_python(code: str) -> None:
    command = [str(interpreter()), "-I", "-S", "-c", "pass"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)


def in_sandbox(isolation: Isolation) -> Callable[[str], None]:
    def run(code: str) -> None:
        result = run_program(code, isolation=isolation)
        assert result.success, result

    return run


def per_second(run: Callable[[str], None], codes: Sequence[str], workers: int) -> float:
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, codes[:workers]))  # threads started, files read
        began = time.perf_counter()
        list(pool.map(run, codes))
        return len(codes) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task-data", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--programs", type=int, default=164)
    args = parser.parse_args()
    task = HumanEval(TaskSources(task_data=args.task_data))
    solved = [task.program(example, example["messages"][1]["content"]) for example in task][: args.programs]
    empty = ["pass"] * len(solved)
    arms: dict[str, tuple[Callable[[str], None], list[str]]] = {"python": (bare_python, empty)}
    for isolation in ISOLATIONS:
        reason = what_is_wrong_with(isolation)
        if reason is not None:
            print(f"no {isolation}: {reason}")
            continue
        arms[f"{isolation} empty"] = (in_sandbox(isolation), empty)
        arms[f"{isolation} HumanEval"] = (in_sandbox(isolation), solved)
    found: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(args.rounds):
        for name, (run, codes) in arms.items():
            found[name].append(per_second(run, codes, args.workers))
    print(f"{len(solved)} programs, {args.workers} at a time, {'with' if filter_bytes() else 'without'} seccomp")
    print(f"{'':<18} {'per second':>10} {'from':>7} {'to':>7} {'ms each':>8}")
    for name, rates in found.items():
        median = statistics.median(rates)
        print(f"{name:<18} {median:>10.1f} {min(rates):>7.1f} {max(rates):>7.1f} {1000 * args.workers / median:>8.1f}")
    medians = {name: round(statistics.median(rates), 1) for name, rates in found.items()}
    print(json.dumps({"bench": "sandbox", "workers": args.workers, "seccomp": bool(filter_bytes()), **medians}))


if __name__ == "__main__":
    main()

"""A job for a cluster whose dashboard and metrics are watched: `python tests/ray/watched_run.py FOLDER`.

Runs two programs on sandbox actors and trains two tiny runs at once, pretraining on the shards in FOLDER/data and RL,
until FOLDER/stop is there. Then FOLDER/ended.txt says "well", or what went wrong.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent.parent
PRETRAIN_RUN, RL_RUN = "seen-base", "seen-rl"


def main(folder: Path) -> None:
    from _runtime import connect

    from nanochat_ray.evals.sandbox_pool import run_programs
    from nanochat_ray.run_dir import Lease, request_stop
    from nanochat_ray.train.launch import Patience, Workers, fit
    from tests.stages.rl_tiny import make_rl
    from tests.stages.tiny import PRETRAIN, ROWS_PER_STEP, make_run

    connect()
    stop = folder / "stop"
    settings = PRETRAIN.model_copy(update={"num_iterations": 100_000, "eval_every": 20, "save_every": 50})
    base, rows = make_run(folder / PRETRAIN_RUN, folder / "data", settings)
    rl = make_rl(folder / RL_RUN, num_iterations=100_000, eval_every=10, save_every=50)
    told: list[str] = []

    def train(job: Any, source: Any, rows_per_step: int, workers: Workers) -> None:
        try:
            with Lease.acquire(job.stage_folder.parent) as lease:
                patience = Patience(max_restarts=3, wait_s=120, can_grow=False)
                fit(job, source, rows_per_step, workers, lease, "dummy", patience, 2, stop.exists)
        except BaseException as error:
            told.append(f"{job.stage_folder}: {error!r}")
            stop.touch()

    def begin(*args: Any) -> threading.Thread:
        thread = threading.Thread(target=train, args=args)
        thread.start()
        return thread

    both = [
        begin(base, rows, ROWS_PER_STEP, Workers(threads_each=1)),
        begin(rl, None, 0, Workers(threads_each=1, rollout_workers=1)),
    ]
    run_programs(["print(1)", "1 / 0"], 1, unsafe=True)
    wait_until(stop.exists)
    for job in (base, rl):
        request_stop(job.stage_folder)
    for thread in both:
        thread.join()
    (folder / "ended.txt").write_text("\n".join(told) or "well")


def wait_until(condition: Callable[[], bool]) -> None:
    waiting = threading.Event()
    while not condition():
        waiting.wait(0.5)


if __name__ == "__main__":
    sys.path[:0] = [str(PROJECT), str(PROJECT / "jobs")]
    main(Path(sys.argv[1]))

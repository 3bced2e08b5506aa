"""Downloads as Ray tasks: one for each shard, a few at a time, on whatever nodes have room.

Each task writes its own file, so with several nodes the folder must be one that all of them share.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from nanochat_ray.corpus.fetching import STOP_POLL_S, ShardResult, ShardTask, get_shard
from nanochat_ray.messages import PassedOn

TASK_CPUS = 0.1  # a download waits for the network most of the time
MAX_DEATHS = 3  # of the process or node under one task


def in_ray_tasks(tasks: Sequence[ShardTask], concurrency: int, stop: threading.Event) -> Iterator[ShardResult]:
    """Results as they come; at most `concurrency` tasks are in flight. A task whose process dies is done again.

    What a task left half-way is gone on with by the next one. When `stop` is set or the reader goes, tasks in flight
    are ended.
    """
    remote: Any = ray.remote(num_cpus=TASK_CPUS, max_retries=MAX_DEATHS)(_get_shard)
    passed_on = PassedOn.here()
    waiting = iter(tasks)
    running: dict[ray.ObjectRef, ShardTask] = {}
    try:
        while not stop.is_set():
            while len(running) < concurrency and (task := next(waiting, None)):
                running[remote.options(name=f"download {task.path.name}").remote(task, passed_on)] = task
            if not running:
                return
            done, _ = ray.wait(list(running), num_returns=1, timeout=STOP_POLL_S)
            for ref in done:
                task = running.pop(ref)
                try:
                    result: ShardResult = ray.get(ref)
                except RayError as error:
                    result = ShardResult(task.path.name, None, error=f"its task died: {error}")
                yield result
    finally:
        for ref in running:
            ray.cancel(ref, force=True)


def _get_shard(task: ShardTask, passed_on: PassedOn) -> ShardResult:
    passed_on.take()
    return get_shard(task)

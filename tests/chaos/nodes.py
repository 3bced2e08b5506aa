"""A run on a cluster of two nodes, of which the second comes and goes; test_nodes.py starts it as a process."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from nanochat_ray.data import dealer
from nanochat_ray.messages import PackedRows
from nanochat_ray.model.checkpoint import saved_steps
from nanochat_ray.run_dir import CHECKPOINTS, Lease, read_json
from nanochat_ray.stages.rows import CorpusRows
from nanochat_ray.train import launch, room
from tests.stages.tiny import PRETRAIN, ROWS_PER_STEP, make_run

STEPS = 120
dealer.LOST_S = 45.0  # for the dealer's own process, which imports this module for SlowRows
SETTINGS = PRETRAIN.model_copy(update={"num_iterations": STEPS, "save_every": 4})


@dataclass(frozen=True)
class SlowRows(CorpusRows):
    """Rows that take their time, so that a few hundred small steps last for many seconds."""

    def pack(self, item: int) -> PackedRows:
        time.sleep(0.4)
        return super().pack(item)


def worlds(folder: Path) -> list[int]:
    """The number of workers that saved each checkpoint there is now."""
    found = []
    for step in saved_steps(folder):
        path = folder / f"step_{step:06d}" / "meta.json"
        if path.exists():
            found.append(read_json(path)["world_size"])
    return found


def wait_for_world(folder: Path, size: int, thread: threading.Thread) -> None:
    while worlds(folder)[-1:] != [size]:
        assert thread.is_alive(), f"training ended before {size} workers saved"
        time.sleep(0.1)


def main(root: Path, data: Path, report: Path) -> None:
    launch.GROW_EVERY_S, launch.LOOK_EVERY_S, room.FULL_SIZE_FIRST_S = 10.0, 0.5, 1.0
    job, rows = make_run(root, data, SETTINGS)
    slow = SlowRows(**vars(rows))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    lease, outcome = Lease.acquire(root), {}

    def train() -> None:
        outcome.update(launch.fit(job, slow, ROWS_PER_STEP, room.Workers(1, 2, threads_each=1), lease))

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    wait_for_world(job.stage_folder / CHECKPOINTS, 1, thread)
    node = cluster.add_node(num_cpus=1)
    wait_for_world(job.stage_folder / CHECKPOINTS, 2, thread)
    cluster.remove_node(node, allow_graceful=False)
    thread.join()
    lease.release()
    result = {"status": outcome["status"], "step": outcome["step"], "launches": outcome["metrics"]["launches"]}
    report.write_text(json.dumps(result))
    ray.shutdown()
    cluster.shutdown()


"""What Ray Train costs: the same pretraining through TorchTrainer with one worker and as a plain loop, Ray up in both.

    python bench/ray_overhead.py [--pairs 5] [--steps 40]

Both arms train the same rows from new weights in a process of their own with equal OMP_NUM_THREADS, in turns. Compared
are median seconds after the first ten steps, from each arm's metrics.jsonl: of a step with its batch already there, and
from one step to the next, which has waiting for data in it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from nanochat_ray.config import THREADS_ENV

SKIPPED_STEPS = 10


def one_arm(folder: Path, arm: str, steps: int, threads: int) -> None:
    """Train once, in this process or on one worker of the cluster that this process starts."""
    import ray
    import torch

    from nanochat_ray.config import PretrainSettings
    from nanochat_ray.corpus.reader import iter_documents, scan_data
    from nanochat_ray.corpus.world import write_world
    from nanochat_ray.messages import World
    from nanochat_ray.report.tracker import Tracker
    from nanochat_ray.run_dir import Lease
    from nanochat_ray.stages.hooks import FolderHooks
    from nanochat_ray.stages.pretrain import PretrainJob, pretrain
    from nanochat_ray.stages.rows import CorpusRows, plain_row_blocks
    from nanochat_ray.text.packing import step_batches
    from nanochat_ray.text.tokenizer import Tokenizer
    from nanochat_ray.train.launch import fit
    from nanochat_ray.train.room import Workers

    write_world(folder / "world")
    manifest = scan_data(str(folder / "world"))
    Tokenizer.train(iter_documents(manifest, "train"), 1024).save(folder / "tokenizer")
    settings = PretrainSettings(
        depth=4, head_dim=64, max_seq_len=256, num_iterations=steps, total_batch_size=4096, device_batch_size=16,
        eval_every=None, eval_tokens=256, core_metric_every=None, sample_every=None,
    )
    job = PretrainJob(settings, folder / "pretrain", folder / "tokenizer", manifest)
    rows = CorpusRows(manifest, folder / "tokenizer", settings.max_seq_len, settings.seed)
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with Lease.acquire(folder) as lease:
        if arm == "ray":
            fit(job, rows, 16, Workers(threads_each=threads), lease)
        else:
            torch.set_num_threads(threads)
            with Tracker(job.stage_folder) as tracker:
                hooks = FolderHooks(job.stage_folder, lease.epoch, World(), tracker)
                pretrain(job, World(), lambda c, s: step_batches(plain_row_blocks(rows, c), 16, start_step=s), hooks)
    ray.shutdown()


def measure(arm: str, steps: int, threads: int) -> tuple[float, float]:
    """Median seconds of a step and from step to step."""
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "RAY_AUTH_MODE": "disabled",
                            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", **THREADS_ENV}  # fmt: skip
        command = [sys.executable, __file__, "--arm", arm, "--folder", folder, "--steps", str(steps)]
        subprocess.run([*command, "--threads", str(threads)], env=env, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "pretrain" / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "train/dt" in record][SKIPPED_STEPS:]
    between = [b["time"] - a["time"] for a, b in itertools.pairwise(records)]
    return statistics.median(r["train/dt"] for r in records), statistics.median(between)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--arm", choices=("plain", "ray"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        one_arm(args.folder, args.arm, args.steps, args.threads)
        return
    print(f"{'pair':>4} {'plain ms':>9} {'ray ms':>9} {'ratio':>7} {'ratio, step to step':>20}")
    ratios, whole = [], []
    for pair in range(args.pairs):
        order = ("plain", "ray") if pair % 2 == 0 else ("ray", "plain")
        found = {arm: measure(arm, args.steps, args.threads) for arm in order}
        ratios.append(found["ray"][0] / found["plain"][0])
        whole.append(found["ray"][1] / found["plain"][1])
        plain_ms, ray_ms = 1000 * found["plain"][0], 1000 * found["ray"][0]
        print(f"{pair:>4} {plain_ms:>9.1f} {ray_ms:>9.1f} {ratios[-1]:>7.3f} {whole[-1]:>20.3f}")
    print(json.dumps({
        "bench": "ray_overhead", "pairs": args.pairs, "threads": args.threads,
        "step_ratio_median": statistics.median(ratios), "step_ratio_min": min(ratios), "step_ratio_max": max(ratios),
        "step_to_step_ratio_median": statistics.median(whole), "step_to_step_ratio_min": min(whole),
        "step_to_step_ratio_max": max(whole),
    }))  # fmt: skip


if __name__ == "__main__":
    main()

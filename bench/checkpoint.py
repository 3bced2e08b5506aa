"""What a checkpoint costs training: copying the state, handing it over, and writing it while the steps go on.

    python bench/checkpoint.py [--saves 3] [--quiet-steps 5]

For the cpu preset's model and a larger one, in turns: some steps with nothing else going on, then a save and steps
until it is on the disk. `stall` is what the loop stands still for: copies of weights and optimizer state, and the
handing over. `slower` is what the steps beside the writing took longer than quiet ones, for writing needs processor
time too. Both are set against the default interval between two checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nanochat_ray.config import PretrainSettings
from nanochat_ray.messages import World
from nanochat_ray.model.checkpoint import model_tensors
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.optim import build_optimizer
from nanochat_ray.model.scaling import plan_training
from nanochat_ray.presets import Machine, preset
from nanochat_ray.run_dir import Lease
from nanochat_ray.stages.hooks import SAVE_INTERVAL_S, FolderHooks, TrainingState

SETTINGS: dict[str, tuple[PretrainSettings, int, int]] = {  # settings, vocabulary, rows of a step
    "cpu preset": (preset("cpu", Machine(0)).pretrain, 1024, 4),
    "larger": (PretrainSettings(depth=6, max_seq_len=64, num_iterations=1, total_batch_size=64), 8192, 1),
}


@dataclass(frozen=True)
class Cost:
    """Medians over the saves of one model."""

    state_mb: float
    step_ms: float
    snapshot_ms: float
    stall_ms: float  # snapshot and handing over
    write_ms: float
    slower_ms: float  # all steps beside one write together
    stall_frac: float  # of the interval between two checkpoints
    stall_and_slower_frac: float


def measure(name: str, saves: int, quiet_steps: int, folder: Path) -> Cost:
    settings, vocab_size, rows = SETTINGS[name]
    plan = plan_training(settings, vocab_size)
    model = GPT.build(plan.config, device="cpu", compute_dtype=torch.float32, seed=1)
    optimizer = build_optimizer(
        model, unembedding_lr=0.01, embedding_lr=0.1, matrix_lr=0.02, scalar_lr=0.1, weight_decay=0.0,
        batch_lr_scale=1.0, rank=0, world_size=1,
    )
    tokens = torch.randint(0, vocab_size, (rows, settings.max_seq_len + 1))
    inputs, targets = tokens[:, :-1].contiguous().int(), tokens[:, 1:].contiguous()

    def step() -> float:
        begun = time.perf_counter()
        model(inputs, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - begun

    (folder / "pretrain").mkdir()
    with Lease.acquire(folder) as lease:
        hooks = FolderHooks(folder / "pretrain", lease.epoch, World(), None, keep_last=2, background=True)
        for _ in range(3):
            step()
        found: list[tuple[float, ...]] = []
        for number in range(1, saves + 1):
            quiet = [step() for _ in range(quiet_steps)]
            begun = time.perf_counter()
            state = TrainingState(model_tensors(model), optimizer.state_by_name(), {"val_bpb": None})
            copied = time.perf_counter()
            hooks.save(number, state)
            handed_over = time.perf_counter()
            del state
            busy = [step()]
            while hooks.writing:
                busy.append(step())
            write_s = time.perf_counter() - handed_over
            slower = sum(busy) - len(busy) * statistics.median(quiet)
            found.append((statistics.median(quiet), copied - begun, handed_over - begun, write_s, max(0.0, slower)))
        hooks.flush()
        hooks.close()
    step_s, snapshot_s, stall_s, write_s, slower_s = (statistics.median(values) for values in zip(*found, strict=True))
    last = folder / "pretrain" / "checkpoints" / f"step_{saves:06d}"
    state_mb = sum(path.stat().st_size for path in last.iterdir()) / 1e6
    return Cost(
        state_mb, 1e3 * step_s, 1e3 * snapshot_s, 1e3 * stall_s, 1e3 * write_s, 1e3 * slower_s,
        stall_s / SAVE_INTERVAL_S, (stall_s + slower_s) / SAVE_INTERVAL_S,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--quiet-steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="where to write; unset: the folder of temporary files")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    costs = {}
    print(f"{'model':<11} {'MB':>6} {'step ms':>8} {'snapshot ms':>12} {'stall ms':>9} {'write ms':>9} "
          f"{'slower ms':>10} {'stall %':>8} {'+ slower %':>11}")  # fmt: skip
    for name in SETTINGS:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            cost = costs[name] = measure(name, args.saves, args.quiet_steps, Path(folder))
        print(f"{name:<11} {cost.state_mb:>6.0f} {cost.step_ms:>8.1f} {cost.snapshot_ms:>12.1f} {cost.stall_ms:>9.1f} "
              f"{cost.write_ms:>9.0f} {cost.slower_ms:>10.0f} {100 * cost.stall_frac:>8.3f} "
              f"{100 * cost.stall_and_slower_frac:>11.3f}")  # fmt: skip
    print(json.dumps({
        "bench": "checkpoint", "threads": args.threads, "interval_s": SAVE_INTERVAL_S,
        "models": {name: asdict(cost) for name, cost in costs.items()},
        "worst_stall_frac": max(cost.stall_frac for cost in costs.values()),
    }))  # fmt: skip


if __name__ == "__main__":
    main()

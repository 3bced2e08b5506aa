"""The plan beside what happens: memory and tokens per second of small pretraining runs on this machine.

    python bench/plan.py [--steps 20] [--threads 2] [--device cpu]

Each case trains in a process of its own, as `jobs/pretrain.py --no-ray` does: peak resident memory, which the plan's
reserve is part of (on CUDA torch's peak of allocated memory, without the reserve), and the median step's speed. Prints
a table and, as its last line, one JSON document. `memory_ratio` and `speed_ratio` are the plan over the measurement.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from nanochat_ray.config import PretrainSettings
from nanochat_ray.messages import Cursor, PackedBatch, World
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.optim import Rates
from nanochat_ray.model.precision import pick_device, prepare_device
from nanochat_ray.model.scaling import plan_training
from nanochat_ray.plan.compute import expected_speed, measured_product_flops, optimizer_flops
from nanochat_ray.plan.hardware import Machines, cpu, gpu
from nanochat_ray.plan.whole import DTYPES, Planner
from nanochat_ray.report.environment import peak_memory_bytes
from nanochat_ray.stages.parallel import build_strategy

WARM_UP_STEPS = 3
VOCAB = 4096
# Settings and compute dtype: one micro-step, four of them, a longer context, fp32.
CPU_CASES = {
    "d4": ({"depth": 4, "head_dim": 64, "max_seq_len": 256, "total_batch_size": 8192, "device_batch_size": 32},
           "bfloat16"),
    "d4 in 4": ({"depth": 4, "head_dim": 64, "max_seq_len": 256, "total_batch_size": 8192, "device_batch_size": 8},
                "bfloat16"),
    "d6": ({"depth": 6, "head_dim": 64, "max_seq_len": 512, "total_batch_size": 8192, "device_batch_size": 16},
           "bfloat16"),
    "d6 fp32": ({"depth": 6, "head_dim": 64, "max_seq_len": 512, "total_batch_size": 4096, "device_batch_size": 8},
                "float32"),
}
CUDA_CASES = {
    name: ({"depth": depth, "device_batch_size": rows, "total_batch_size": 4 * rows * 2048}, "bfloat16")
    for name, depth, rows in (("d12", 12, 32), ("d20", 20, 32), ("d24", 24, 16))
}


def cases(device: str) -> dict[str, tuple[dict, str]]:
    return CUDA_CASES if device == "cuda" else CPU_CASES


def train(name: str, device: str, steps: int, compiled: bool) -> dict[str, float]:
    """Some steps of a case in this process."""
    values, dtype = cases(device)[name]
    settings = PretrainSettings(num_iterations=steps, **values)
    plan = plan_training(settings, VOCAB if device == "cpu" else 32768)
    prepare_device(device)
    model = GPT.build(plan.config, device=device, compute_dtype=DTYPES[dtype])
    rates = Rates(0.004, 0.2, 0.02, 0.5, 0.0)
    strategy = build_strategy(
        "sharded", model, World(device=device), rates, dtype=DTYPES[dtype], compiled=compiled
    )
    rng = np.random.default_rng(0)
    times = []
    for step in range(WARM_UP_STEPS + steps):
        shape = plan.rows_per_step, settings.max_seq_len + 1
        batch = PackedBatch(step, rng.integers(0, plan.config.vocab_size, shape, dtype=np.int32), None, Cursor(), 0.0)
        begun = time.perf_counter()
        strategy.set_schedule(1.0, 0.9, 0.0)
        strategy.accumulate(batch, batch.tokens[:, 1:].size, settings.device_batch_size)
        strategy.update()  # reads the norm, so the device is done
        times.append(time.perf_counter() - begun)
    return {
        "memory_bytes": peak_memory_bytes(device),
        "tok_per_s": plan.total_batch_size / median(times[WARM_UP_STEPS:]),
    }


def planned(name: str, device: str, product_flops: float | None) -> dict[str, float]:
    values, dtype = cases(device)[name]
    settings = PretrainSettings(num_iterations=1, **values)
    vocab = VOCAB if device == "cpu" else 32768
    where = cpu(1, product_flops) if device == "cpu" else gpu(torch.cuda.get_device_name())
    planner = Planner(Machines(where, 1), dtype)
    memory = planner.memory(settings, vocab).at("sharded", settings.device_batch_size)
    plan = plan_training(settings, vocab)
    speed = expected_speed(plan.config, where, DTYPES[dtype].itemsize, False)
    flops = plan.total_batch_size * plan.flops_per_token + optimizer_flops(plan.config)
    return {
        "planned_memory_bytes": memory.peak - (0 if device == "cpu" else memory.reserve),
        "planned_tok_per_s": plan.total_batch_size * speed.flops / flops if speed.flops else float("nan"),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=None, help="unset: torch's own choice")
    parser.add_argument("--device", default=None)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="unset: on CUDA only")
    parser.add_argument("--only", default=None, help="one case")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    compiled = device == "cuda" if args.compile is None else args.compile
    if args.child:
        print(json.dumps(train(args.only, device, args.steps, compiled)))
        return
    results = []
    for name in cases(device) if args.only is None else [args.only]:
        command = [sys.executable, str(Path(__file__).resolve()), "--child", "--only", name, "--steps", str(args.steps),
                   "--device", device, "--compile" if compiled else "--no-compile"]
        command += ["--threads", str(args.threads)] if args.threads else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        dtype = DTYPES[cases(device)[name][1]]
        found = json.loads(done.stdout.splitlines()[-1])
        found |= planned(name, device, measured_product_flops(dtype) if device == "cpu" else None)
        found["memory_ratio"] = found["planned_memory_bytes"] / found["memory_bytes"]
        found["speed_ratio"] = found["planned_tok_per_s"] / found["tok_per_s"]
        results.append({"case": name} | found)
        print(
            f"{name:<8} memory {found['memory_bytes'] / 2**20:8.0f} MiB, planned "
            f"{found['planned_memory_bytes'] / 2**20:8.0f} ({found['memory_ratio']:.2f}); tokens/s "
            f"{found['tok_per_s']:9,.0f}, planned {found['planned_tok_per_s']:9,.0f} ({found['speed_ratio']:.2f})",
            flush=True,
        )
    setting = {"device": device, "threads": torch.get_num_threads(), "compile": compiled, "torch": torch.__version__}
    print(json.dumps({"bench": "plan", "settings": setting | {"steps": args.steps}, "results": results}))


if __name__ == "__main__":
    main()

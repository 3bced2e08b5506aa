"""Speed of a whole pretraining step beside this machine's matrix products, measured in the same run.

    python bench/step.py [--depth 4] [--dtype float32,bfloat16] [--threads 2] [--steps 10] ...

Prints a table and, as its last line, one JSON document. Number formats take turns, and so do steps and products, so
that other load on the machine strikes all of them alike.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor

from nanochat_ray.config import PretrainSettings
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.optim import MuonAdamW, build_optimizer
from nanochat_ray.model.precision import DTYPES, pick_device, prepare_device
from nanochat_ray.model.scaling import flops_per_token, model_config_for

PRODUCT_SIZE = 2048  # of the square matrices that peak is measured with
WARM_UP_STEPS = 3


@dataclass
class Arm:
    """One number format: its model, and what was measured."""

    name: str
    model: GPT
    optimizer: MuonAdamW
    factors: tuple[Tensor, Tensor]  # of the matrix product
    forward_s: list[float] = field(default_factory=list)
    backward_s: list[float] = field(default_factory=list)
    optimizer_s: list[float] = field(default_factory=list)
    product_s: list[float] = field(default_factory=list)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--window-pattern", default="SSSL")
    parser.add_argument("--dtype", default="float32,bfloat16", help="number formats, joined by commas")
    parser.add_argument("--threads", type=int, default=None, help="unset: torch's own choice")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default=None)
    return parser.parse_args()


def build_arm(name: str, settings: PretrainSettings, vocab_size: int, device: str) -> Arm:
    dtype = DTYPES[name]
    model = GPT.build(model_config_for(settings, vocab_size), device=device, compute_dtype=dtype)
    optimizer = build_optimizer(
        model,
        unembedding_lr=settings.unembedding_lr,
        embedding_lr=settings.embedding_lr,
        matrix_lr=settings.matrix_lr,
        scalar_lr=settings.scalar_lr,
        weight_decay=settings.weight_decay,
    )
    factors = tuple(torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device=device).to(dtype) for _ in range(2))
    return Arm(name, model, optimizer, (factors[0], factors[1]))


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(arm: Arm, inputs: Tensor, targets: Tensor, device: str, keep: bool) -> None:
    """One training step and one matrix product."""
    times = [now(device)]
    loss = arm.model(inputs, targets)
    times.append(now(device))
    loss.backward()
    times.append(now(device))
    arm.optimizer.step()
    arm.optimizer.zero_grad()
    times.append(now(device))
    torch.mm(*arm.factors)
    times.append(now(device))
    if keep:
        spans = [end - begin for begin, end in pairwise(times)]
        all_series = (arm.forward_s, arm.backward_s, arm.optimizer_s, arm.product_s)
        for series, seconds in zip(all_series, spans, strict=True):
            series.append(seconds)


def summary(arm: Arm, n_tokens: int) -> dict[str, float | str]:
    """Medians of an arm. `share` is the step's FLOP/s over the matrix product's."""
    parts = zip(arm.forward_s, arm.backward_s, arm.optimizer_s, strict=True)
    steps = [sum(part) for part in parts]
    step_s, product_s = median(steps), median(arm.product_s)
    step_gflops = flops_per_token(arm.model.config) * n_tokens / step_s / 1e9
    product_gflops = 2 * PRODUCT_SIZE**3 / product_s / 1e9
    return {
        "dtype": arm.name,
        "matmul_gflop_per_s": product_gflops,
        "forward_ms": 1e3 * median(arm.forward_s),
        "backward_ms": 1e3 * median(arm.backward_s),
        "optimizer_ms": 1e3 * median(arm.optimizer_s),
        "step_ms": 1e3 * step_s,
        "fastest_step_ms": 1e3 * min(steps),
        "slowest_step_ms": 1e3 * max(steps),
        "tok_per_sec": n_tokens / step_s,
        "step_gflop_per_s": step_gflops,
        "share": step_gflops / product_gflops,
    }


def print_table(rows: list[dict[str, float | str]]) -> None:
    names = list(rows[0])
    for name in names:
        cells = [f"{row[name]:>12.3f}" if isinstance(row[name], float) else f"{row[name]:>12}" for row in rows]
        print(f"{name:<20}" + "".join(cells))


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    prepare_device(device)
    settings = PretrainSettings(
        depth=args.depth, head_dim=args.head_dim, max_seq_len=args.seq_len, window_pattern=args.window_pattern
    )
    arms = [build_arm(name, settings, args.vocab, device) for name in args.dtype.split(",")]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, args.vocab, (args.rows, args.seq_len + 1), generator=generator).to(device)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    for step in range(WARM_UP_STEPS + args.steps):
        for arm in arms:
            measure(arm, inputs, targets, device, keep=step >= WARM_UP_STEPS)
    results = [summary(arm, inputs.numel()) for arm in arms]
    print_table(results)
    setting = {**vars(args), "device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps({"bench": "step", "settings": setting, "results": results}))


if __name__ == "__main__":
    main()

"""Speed of a whole pretraining step beside this machine's matrix products, measured in the same run.

    python bench/step.py [--depth 4] [--dtype float32,bfloat16] [--threads 2] [--steps 10] ...
    python bench/step.py --device cuda --preset d12,d20,d24 --fp8 tensorwise,rowwise

Prints a table per model size and, as its last line, one JSON document. On a CPU number formats take turns, and so do
steps and products, so that other load on the machine strikes all of them alike. On CUDA each format runs alone, since
its peak memory is measured too, compiled as in training; `mfu_percent` is of the device's bf16 peak in fp8 as well.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import get_args

import torch
from torch import Tensor

from nanochat_ray.config import PretrainSettings
from nanochat_ray.model.fp8 import Recipe, check_fp8, enable_fp8
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.optim import MuonAdamW, build_optimizer
from nanochat_ray.model.precision import DTYPES, pick_device, prepare_device
from nanochat_ray.model.scaling import flops_per_token, model_config_for, peak_flops
from nanochat_ray.presets import Machine, preset

PRODUCT_SIZE_CPU, PRODUCT_SIZE_GPU = 2048, 8192  # of the square matrices that the products' speed is measured with
WARM_UP_STEPS = 3
Row = dict[str, float | str]


@dataclass(frozen=True)
class Case:
    """One model size and its batch."""

    name: str
    settings: PretrainSettings
    vocab_size: int
    rows: int


@dataclass
class Arm:
    """One number format: its model, and what was measured."""

    name: str
    model: GPT
    run: Callable[..., Tensor]  # the model, compiled or as it is
    optimizer: MuonAdamW
    factors: tuple[Tensor, Tensor]  # of the matrix product
    forward_s: list[float] = field(default_factory=list)
    backward_s: list[float] = field(default_factory=list)
    optimizer_s: list[float] = field(default_factory=list)
    product_s: list[float] = field(default_factory=list)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default=None, help="sizes of presets, joined by commas; they win over the next six")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rows", type=int, default=None, help="per micro-step; unset: 8, or the preset's")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--window-pattern", default="SSSL")
    parser.add_argument("--micro-steps", type=int, default=None, help="per step; unset: 1, or 8 with --preset")
    parser.add_argument("--dtype", default=None, help="joined by commas; unset: float32,bfloat16, on CUDA bfloat16")
    parser.add_argument("--fp8", default=None, help="recipes to add, joined by commas: tensorwise, rowwise")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="unset: on CUDA only")
    parser.add_argument("--threads", type=int, default=None, help="unset: torch's own choice")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default=None)
    return parser.parse_args()


def cases(args: argparse.Namespace) -> list[Case]:
    if args.preset is None:
        settings = PretrainSettings(
            depth=args.depth, head_dim=args.head_dim, max_seq_len=args.seq_len, window_pattern=args.window_pattern
        )
        return [Case(f"d{args.depth}", settings, args.vocab, args.rows or 8)]
    found = []
    for name in args.preset.split(","):
        settings = preset(name, Machine(gpus=1))
        rows = args.rows or settings.pretrain.device_batch_size
        found.append(Case(name, settings.pretrain, settings.tokenizer.vocab_size, rows))
    return found


def formats(args: argparse.Namespace, device: str) -> list[tuple[str, Recipe | None]]:
    """Names of number formats, each with its fp8 recipe; fp8 computes the rest in bfloat16."""
    dtypes = args.dtype or ("bfloat16" if device == "cuda" else "float32,bfloat16")
    recipes = [recipe for recipe in get_args(Recipe) if recipe in (args.fp8 or "").split(",")]
    if args.fp8 and len(recipes) < len(args.fp8.split(",")):
        raise SystemExit(f"--fp8 {args.fp8}: choose from {', '.join(get_args(Recipe))}")
    return [(name, None) for name in dtypes.split(",")] + [("bfloat16", recipe) for recipe in recipes]


def build_arm(case: Case, name: str, recipe: Recipe | None, device: str, compiled: bool) -> Arm:
    dtype, settings = DTYPES[name], case.settings
    if recipe is not None and device == "cuda":
        check_fp8(device, dtype, settings.max_seq_len, recipe)
    model = GPT.build(model_config_for(settings, case.vocab_size), device=device, compute_dtype=dtype)
    optimizer = build_optimizer(
        model,
        unembedding_lr=settings.unembedding_lr,
        embedding_lr=settings.embedding_lr,
        matrix_lr=settings.matrix_lr,
        scalar_lr=settings.scalar_lr,
        weight_decay=settings.weight_decay,
    )
    if recipe is not None:
        n_converted, _ = enable_fp8(model, recipe)
        name = f"fp8 {recipe}"
        print(f"{case.name} {name}: {n_converted} matrices")
    size = product_size(device)
    factors = tuple(torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    run = torch.compile(model, dynamic=False) if compiled else model
    return Arm(name, model, run, optimizer, (factors[0], factors[1]))


def product_size(device: str) -> int:
    return PRODUCT_SIZE_GPU if device == "cuda" else PRODUCT_SIZE_CPU


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(arm: Arm, inputs: Tensor, targets: Tensor, device: str, micro_steps: int, keep: bool) -> None:
    """One training step and one matrix product."""
    spans = [0.0, 0.0]  # forward and backward
    for _ in range(micro_steps):
        times = [now(device)]
        loss = arm.run(inputs, targets)
        times.append(now(device))
        loss.backward()
        times.append(now(device))
        spans = [so_far + end - begin for so_far, (begin, end) in zip(spans, pairwise(times), strict=True)]
    times = [now(device)]
    arm.optimizer.step()
    arm.optimizer.zero_grad()
    times.append(now(device))
    torch.mm(*arm.factors)
    times.append(now(device))
    if keep:
        spans += [end - begin for begin, end in pairwise(times)]
        all_series = (arm.forward_s, arm.backward_s, arm.optimizer_s, arm.product_s)
        for series, seconds in zip(all_series, spans, strict=True):
            series.append(seconds)


def summary(case: Case, arm: Arm, n_tokens: int, device: str) -> Row:
    """Medians of an arm. `share` is the step's FLOP/s over the matrix product's."""
    parts = zip(arm.forward_s, arm.backward_s, arm.optimizer_s, strict=True)
    steps = [sum(part) for part in parts]
    step_s, product_s = median(steps), median(arm.product_s)
    step_gflops = flops_per_token(arm.model.config) * n_tokens / step_s / 1e9
    product_gflops = 2 * product_size(device) ** 3 / product_s / 1e9
    row: Row = {
        "model": case.name,
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
    if device == "cuda":
        peak = peak_flops(torch.cuda.get_device_name())
        if math.isfinite(peak):
            row["mfu_percent"] = 100 * step_gflops * 1e9 / peak
        row["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def run_together(
    case: Case, chosen: list[tuple[str, Recipe | None]], args: argparse.Namespace, device: str
) -> list[Row]:
    """Measure some formats of a size in turns."""
    compiled = device == "cuda" if args.compile is None else args.compile
    micro_steps = args.micro_steps or (1 if args.preset is None else 8)
    arms = [build_arm(case, name, recipe, device, compiled) for name, recipe in chosen]
    generator = torch.Generator().manual_seed(0)
    shape = case.rows, case.settings.max_seq_len + 1
    ids = torch.randint(0, case.vocab_size, shape, generator=generator).to(device)
    inputs, targets = ids[:, :-1].int().contiguous(), ids[:, 1:].contiguous()
    for step in range(WARM_UP_STEPS + args.steps):
        for arm in arms:
            measure(arm, inputs, targets, device, micro_steps, keep=step >= WARM_UP_STEPS)
    return [summary(case, arm, micro_steps * inputs.numel(), device) for arm in arms]


def run_alone(case: Case, name: str, recipe: Recipe | None, args: argparse.Namespace) -> Row:
    """Measure one format of a size on the GPU, with the device's memory to itself."""
    torch.cuda.reset_peak_memory_stats()
    try:
        (row,) = run_together(case, [(name, recipe)], args, "cuda")
    except torch.OutOfMemoryError:
        row = {"model": case.name, "dtype": name if recipe is None else f"fp8 {recipe}", "failed": "out of memory"}
    torch.compiler.reset()  # lets go of the model
    gc.collect()
    torch.cuda.empty_cache()
    return row


def print_table(rows: list[Row]) -> None:
    for name in dict.fromkeys(name for row in rows for name in row):
        cells = [row.get(name, "-") for row in rows]
        print(f"{name:<20}" + "".join(f"{cell:>16.3f}" if isinstance(cell, float) else f"{cell:>16}" for cell in cells))
    print(flush=True)


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    prepare_device(device)
    chosen = formats(args, device)
    results: list[Row] = []
    for case in cases(args):
        if device == "cuda":
            rows = [run_alone(case, name, recipe, args) for name, recipe in chosen]
        else:
            rows = run_together(case, chosen, args, device)
        print_table(rows)
        results += rows
    setting = {**vars(args), "device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if device == "cuda":
        setting["gpu"] = torch.cuda.get_device_name()
    print(json.dumps({"bench": "step", "settings": setting, "results": results}))


if __name__ == "__main__":
    main()

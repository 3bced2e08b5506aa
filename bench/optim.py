"""How long one optimizer step takes, by part, against what the machine's matrix product and memory allow.

python bench/optim.py [--depth 4 --head-dim 64 --sequence-len 512 --rows 8 --vocab 4096 32768 --dtype float32 bfloat16]

Prints a table and one JSON line. Every time is the fastest of `--repeats`. Muon's GFLOP are those of the plain rounds,
whichever way it takes. The share is of a training step that runs at the speed of the matrix product, by the FLOPs
formula of model/scaling.py.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

from nanochat_ray.config import ModelConfig, PretrainSettings
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.optim import MuonAdamW, build_optimizer
from nanochat_ray.model.optim_shards import MuonShard, OptimShard
from nanochat_ray.model.scaling import flops_per_token, model_config_for

MATMUL_SIZE = 2048
FIELDS = (
    "dtype",
    "vocab",
    "step_ms",
    "adamw_ms",
    "adamw_gb_per_s",
    "muon_ms",
    "muon_gflop_per_s",
    "matmul_gflop_per_s",
    "share",
)


def fastest_ms(run: Callable[[], object], repeats: int, device: str) -> float:
    """Milliseconds of the fastest of `repeats` runs, after one to warm up."""
    best = float("inf")
    for repeat in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if repeat:
            best = min(best, 1000 * (time.perf_counter() - start))
    return best


def matmul_gflop_per_s(dtype: torch.dtype, repeats: int, device: str) -> float:
    a, b = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE, device=device).to(dtype)
    return 2 * MATMUL_SIZE**3 / fastest_ms(lambda: a @ b, repeats, device) / 1e6


@torch.no_grad()
def run_shards(shards: list[OptimShard]) -> None:
    for shard in shards:
        shard.reduce()
    for shard in shards:
        shard.update()
    for shard in shards:
        shard.finish()


def adamw_bytes(optimizer: MuonAdamW) -> int:
    """Bytes of one AdamW step: parameter, gradient and two moments read, all but the gradient written."""
    params = [p for group in optimizer.groups if group.kind == "adamw" for p in group.params]
    return sum(7 * p.numel() * p.element_size() for p in params)


def muon_flops(optimizer: MuonAdamW) -> int:
    """Operations of the products of one Muon step, done the plain way."""
    total = 0
    for group in optimizer.groups:
        if group.kind == "muon":
            short, long = sorted(group.params[0].shape)
            total += len(group.params) * group.ns_steps * (4 * short**2 * long + 2 * short**3)
    return total


def measure(config: ModelConfig, dtype: torch.dtype, rows: int, repeats: int, device: str) -> dict[str, float | str]:
    model = GPT.build(config, device=device, compute_dtype=dtype)
    optimizer = build_optimizer(
        model, unembedding_lr=0.008, embedding_lr=0.3, matrix_lr=0.02, scalar_lr=0.5, weight_decay=0.28
    )
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    muon: list[OptimShard] = [shard for shard in optimizer.shards if isinstance(shard, MuonShard)]
    adamw = [shard for shard in optimizer.shards if shard not in muon]
    step_ms = fastest_ms(optimizer.step, repeats, device)
    adamw_ms = fastest_ms(lambda: run_shards(adamw), repeats, device)
    muon_ms = fastest_ms(lambda: run_shards(muon), repeats, device)
    peak = matmul_gflop_per_s(dtype, repeats, device)
    training_ms = flops_per_token(config) * rows * config.sequence_len / peak / 1e6
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "vocab": config.vocab_size,
        "step_ms": step_ms,
        "adamw_ms": adamw_ms,
        "adamw_gb_per_s": adamw_bytes(optimizer) / adamw_ms / 1e6,
        "muon_ms": muon_ms,
        "muon_gflop_per_s": muon_flops(optimizer) / muon_ms / 1e6,
        "matmul_gflop_per_s": peak,
        "share": step_ms / training_ms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--sequence-len", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8, help="rows of one training step")
    parser.add_argument("--vocab", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()

    results = []
    print("  ".join(f"{field:>10}" for field in FIELDS))
    for dtype in args.dtype:
        for vocab in args.vocab:
            settings = PretrainSettings(depth=args.depth, head_dim=args.head_dim, max_seq_len=args.sequence_len)
            config = model_config_for(settings, vocab)
            result = measure(config, getattr(torch, dtype), args.rows, args.repeats, args.device)
            results.append(result)
            cells = [f"{v:.3g}" if isinstance(v := result[field], float) else str(v) for field in FIELDS]
            print("  ".join(f"{cell:>{max(10, len(field))}}" for cell, field in zip(cells, FIELDS, strict=True)))
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "device": args.device}
    print(json.dumps({"bench": "optim", **machine, "depth": args.depth, "rows": args.rows, "results": results}))


if __name__ == "__main__":
    main()

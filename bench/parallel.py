"""How long one optimizer step takes on several ranks (gloo on this machine), arithmetic and communication apart.

python bench/parallel.py [--ranks 2 --depth 4 --head-dim 64 --sequence-len 512 --vocab 4096 --dtype float32 bfloat16]

Prints a table and one JSON line; every time is the fastest of `--repeats` on rank 0, in ms.

- `step`: all that follows the last backward pass; for ddp its reduction, which in training overlaps with that pass,
  comes first.
- `compute`: the same without communication. `communication`: the same collectives alone, one after another.
- `hidden`: share of the communication that the step hides behind arithmetic.
- `state`: bytes of optimizer state on a rank.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from nanochat_ray.config import PretrainSettings
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.optim import MuonAdamW, Rates, parameter_groups
from nanochat_ray.model.optim_shards import Pending, Ranks, all_gather, reduce_scatter
from nanochat_ray.model.scaling import model_config_for

RATES = Rates(unembedding_lr=0.008, embedding_lr=0.3, matrix_lr=0.02, scalar_lr=0.5, weight_decay=0.28)
DDP_BUCKET_BYTES = 25 * 2**20  # torch's default
FIELDS = ("strategy", "dtype", "step", "compute", "communication", "hidden", "sent_mb", "state_mb")


@dataclass(frozen=True)
class Silent(Ranks):
    """Ranks that do not communicate: every result has the right shape, and takes no time."""

    def mean(self, x: Tensor) -> Pending:
        return Pending(x)

    def mean_slice(self, x: Tensor) -> Pending:
        return Pending(x[: len(x) // self.world_size])

    def gather(self, part: Tensor, out: Tensor) -> Pending:
        return Pending(out)

    def sum(self, x: Tensor) -> Pending:
        return Pending(x)


def fastest_ms(runs: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Milliseconds of the fastest of `repeats` of each, after one to warm up; they take turns, all ranks together."""
    best = [float("inf")] * len(runs)
    for repeat in range(repeats + 1):
        for i, run in enumerate(runs):
            dist.barrier()
            start = time.perf_counter()
            run()
            if repeat:
                best[i] = min(best[i], 1000 * (time.perf_counter() - start))
    return best


def optimizer_of(model: GPT, ranks: Ranks) -> MuonAdamW:
    optimizer = MuonAdamW(parameter_groups(model, RATES), rank=ranks.rank, world_size=ranks.world_size)
    optimizer.ranks = ranks
    for shard in optimizer.shards:
        if hasattr(shard, "all_ranks"):
            shard.all_ranks = ranks
        if shard.ranks.world_size > 1:
            shard.ranks = ranks
    return optimizer


def sharded_collectives(model: GPT, optimizer: MuonAdamW) -> tuple[Callable[[], None], int]:
    """The reductions of all gradients and the gathering of all parameters, and the bytes that they are about."""
    W = optimizer.ranks.world_size
    small = [torch.empty_like(p) for p in model.parameters() if p.numel() < 1024]
    wholes, parts = [], []
    for shard in optimizer.shards:
        if shard.ranks.world_size == 1:
            continue
        shape = shard.param.shape[1:] if hasattr(shard, "param") else shard.group.params[0].shape
        dtype = shard.group.params[0].dtype
        wholes.append(torch.zeros(W * shard.slice_rows, *shape, dtype=dtype))
        parts.append(torch.zeros(shard.slice_rows, *shape, dtype=dtype))

    def run() -> None:
        works = [dist.all_reduce(x, async_op=True) for x in small]
        works += [reduce_scatter(part, whole, async_op=True) for part, whole in zip(parts, wholes, strict=True)]
        for work in works:
            work.wait()
        works = [all_gather(whole, part, async_op=True) for part, whole in zip(parts, wholes, strict=True)]
        for work in works:
            work.wait()

    return run, 2 * sum(x.numel() * x.element_size() for x in wholes)


def ddp_collectives(model: GPT) -> tuple[Callable[[], None], int]:
    """The all-reduce of all gradients in buckets, and the bytes that they are about."""
    buckets: list[Tensor] = []
    for dtype in {p.dtype for p in model.parameters()}:
        n = sum(p.numel() for p in model.parameters() if p.dtype == dtype)
        flat = torch.zeros(n, dtype=dtype)
        buckets += flat.split(DDP_BUCKET_BYTES // flat.element_size())

    def run() -> None:
        for work in [dist.all_reduce(bucket, async_op=True) for bucket in buckets]:
            work.wait()

    return run, 2 * sum(x.numel() * x.element_size() for x in buckets)


def state_bytes(optimizer: MuonAdamW) -> int:
    tensors = [t for shard in optimizer.shards for t in vars(shard).values() if isinstance(t, Tensor)]
    params = {id(p) for group in optimizer.groups for p in group.params}
    return sum(t.numel() * t.element_size() for t in tensors if id(t) not in params)


def measure(name: str, args: argparse.Namespace, dtype: torch.dtype, rank: int) -> dict[str, float | str]:
    settings = PretrainSettings(depth=args.depth, head_dim=args.head_dim, max_seq_len=args.sequence_len)
    model = GPT.build(model_config_for(settings, args.vocab), compute_dtype=dtype)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    if name == "sharded":
        optimizer = optimizer_of(model, Ranks(rank, args.ranks))
        communicate, sent_bytes = sharded_collectives(model, optimizer)
        runs = [optimizer.step, optimizer_of(model, Silent(rank, args.ranks)).step, communicate]
    else:
        optimizer = optimizer_of(model, Ranks())
        communicate, sent_bytes = ddp_collectives(model)
        runs = [lambda: (communicate(), optimizer.step()), optimizer.step, communicate]
    step_ms, compute_ms, communication_ms = fastest_ms(runs, args.repeats)
    return {
        "strategy": name,
        "dtype": str(dtype).removeprefix("torch."),
        "step": step_ms,
        "compute": compute_ms,
        "communication": communication_ms,
        "hidden": 1 - (step_ms - compute_ms) / communication_ms,
        "sent_mb": sent_bytes * (args.ranks - 1) / args.ranks / 1e6,
        "state_mb": state_bytes(optimizer) / 1e6,
    }


def worker(rank: int, args: argparse.Namespace, file: str) -> None:
    torch.set_num_threads(args.threads)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=args.ranks)
    results = []
    if rank == 0:
        print("  ".join(f"{field:>13}" for field in FIELDS))
    for dtype in args.dtype:
        for name in ("sharded", "ddp"):
            result = measure(name, args, getattr(torch, dtype), rank)
            results.append(result)
            cells = [f"{v:.3g}" if isinstance(v := result[field], float) else str(v) for field in FIELDS]
            if rank == 0:
                print("  ".join(f"{cell:>13}" for cell in cells), flush=True)
    if rank == 0:
        shape = {key: value for key, value in vars(args).items() if key not in ("dtype", "repeats")}
        print(json.dumps({"bench": "parallel", "torch": torch.__version__, **shape, "results": results}))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--sequence-len", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (args, f"{folder}/rendezvous"), nprocs=args.ranks)


if __name__ == "__main__":
    main()

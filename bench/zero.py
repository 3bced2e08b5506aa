"""The same short pretraining run by several strategies: what DeepSpeed's Muon makes of a recipe tuned for the other.

python bench/zero.py [--strategies sharded zero2 --steps 300 --ranks 2 --depth 4 --rows 16 --muon-lr-factors 1]

Prints the validation loss (bits per byte) as training goes on and one JSON line. Text, tokenizer and rows come from the
embedded corpus and are the same for all. `--muon-lr-factors` repeats the DeepSpeed runs with other matrix rates.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nanochat_ray.config import PretrainSettings
from nanochat_ray.corpus.world.documents import build_documents
from nanochat_ray.messages import Cursor, PackedBatch, PackedRows, World
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.optim import Rates
from nanochat_ray.model.scaling import Plan, plan_training
from nanochat_ray.model.schedule import lr_multiplier, muon_momentum, muon_weight_decay
from nanochat_ray.presets import Machine, preset
from nanochat_ray.stages.parallel import build_strategy, check_strategy
from nanochat_ray.stages.step import validation_bpb
from nanochat_ray.text.packing import pack_documents, rank_part
from nanochat_ray.text.tokenizer import Tokenizer

VAL_ROWS = 64
EVALUATIONS = 6


def settings_of(args: argparse.Namespace) -> PretrainSettings:
    """The `cpu` preset's recipe."""
    recipe = preset("cpu", Machine(gpus=0)).pretrain
    sizes = {"depth": args.depth, "head_dim": args.head_dim, "max_seq_len": args.sequence_len}
    batch = {"num_iterations": args.steps, "total_batch_size": args.rows * args.sequence_len}
    return PretrainSettings.model_validate(recipe.model_dump() | sizes | batch)


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Tokenizer and rows in a folder, for all ranks of all runs."""
    documents = build_documents()
    tokenizer = Tokenizer.train(iter(documents), args.vocab)
    tokenizer.save(folder / "tokenizer")
    rows = pack_documents(tokenizer.encode_to_arrays(documents), args.sequence_len + 1)
    np.save(folder / "rows.npy", rows.tokens)


def train(name: str, factor: float, rank: int, args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """One run; returns its numbers on every rank."""
    settings, world = settings_of(args), World(rank, rank, args.ranks)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    rows = np.load(folder / "rows.npy")
    plan = plan_training(settings, tokenizer.vocab_size)
    model = GPT.build(plan.config, seed=settings.seed)
    strategy = build_strategy(name, model, world, rates_of(settings, plan, factor))
    validation, training = PackedRows(rows[:VAL_ROWS]), rows[VAL_ROWS:]
    token_bytes = torch.from_numpy(tokenizer.token_bytes())
    curve: dict[int, float] = {}
    seconds = 0.0
    for step in range(args.steps + 1):
        if step % max(1, args.steps // EVALUATIONS) == 0 or step == args.steps:
            with strategy.full_weights() as network:
                bpb = validation_bpb(network, validation, token_bytes, args.device_batch_size, world)
            assert bpb is not None
            curve[step] = round(bpb, 4)
            if rank == 0:
                print(f"{name:>8} x{factor:<5g} step {step:4d}  {bpb:.4f} bits per byte", flush=True)
        if step == args.steps:
            break
        start = time.perf_counter()
        strategy.set_schedule(
            lr_multiplier(step, args.steps, settings.warmup_steps, settings.warmdown_ratio, settings.final_lr_frac),
            muon_momentum(step, args.steps, settings.warmdown_ratio),
            muon_weight_decay(step, args.steps, plan.weight_decay),
        )
        batch = np.arange(step * args.rows, (step + 1) * args.rows) % len(training)
        own = training[batch[rank_part(args.rows, rank, args.ranks)]]
        packed = PackedBatch(step, own, None, Cursor(), 0.0)
        strategy.accumulate(packed, args.rows * args.sequence_len, args.device_batch_size)
        strategy.update()
        seconds += time.perf_counter() - start
    strategy.close()
    return {"strategy": name, "matrix_lr_factor": factor, "bpb": curve, "step_ms": 1000 * seconds / args.steps}


def rates_of(settings: PretrainSettings, plan: Plan, factor: float) -> Rates:
    rates = Rates(
        unembedding_lr=settings.unembedding_lr, embedding_lr=settings.embedding_lr, matrix_lr=settings.matrix_lr,
        scalar_lr=settings.scalar_lr, weight_decay=plan.weight_decay, batch_lr_scale=plan.batch_lr_scale,
    )
    return replace(rates, matrix_lr=factor * rates.matrix_lr)


def worker(rank: int, args: argparse.Namespace, folder: Path) -> None:
    torch.set_num_threads(args.threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=args.ranks)
    results = []
    for name in args.strategies:
        for factor in args.muon_lr_factors if name.startswith("zero") else [1.0]:
            results.append(train(name, factor, rank, args, folder))
    if rank == 0:
        print(json.dumps({"bench": "zero", "torch": torch.__version__, **vars(args), "results": results}))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=["sharded", "zero2"])
    parser.add_argument("--muon-lr-factors", nargs="+", type=float, default=[1.0], help="of zero's matrix rate")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--sequence-len", type=int, default=256)
    parser.add_argument("--rows", type=int, default=16, help="of one optimizer step")
    parser.add_argument("--device-batch-size", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=1024)
    args = parser.parse_args()
    for name in args.strategies:
        check_strategy(name, torch.float32)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as name:
        prepare(args, Path(name))
        mp.spawn(worker, (args, Path(name)), nprocs=args.ranks)


if __name__ == "__main__":
    main()

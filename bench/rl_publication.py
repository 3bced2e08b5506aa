"""What publishing weights to rollout actors costs: flattening and putting them, then fetching and copying on each one.

    python bench/rl_publication.py [--mb 256] [--actors 2] [--rounds 6]

All on one node, in bf16; the first round also pays for memory that is touched for the first time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from nanochat_ray.config import ModelConfig
from nanochat_ray.messages import PassedOn, RolloutPrompt, RolloutUnit, SamplingParams
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.precision import prepare_device
from nanochat_ray.stages.rollouts import RolloutSpec
from nanochat_ray.tasks.rl_task import RLTaskSpec
from nanochat_ray.text.tokenizer import Tokenizer

WIDTH = 1024
LAYER_BYTES = 2 * 12 * WIDTH**2  # of a layer's matrices in bf16


def publication(mb: float = 256, actors: int = 2, rounds: int = 6) -> list[dict[str, float]]:
    """Seconds of each publication: put, fetch (the slowest actor's) and both. On a cluster that is up."""
    from nanochat_ray.rollout.pool import RolloutPool

    config = ModelConfig(
        sequence_len=256, vocab_size=265, n_layer=max(1, round(mb * 2**20 / LAYER_BYTES)), n_head=8, n_kv_head=8,
        n_embd=WIDTH, window_pattern="L",
    )  # fmt: skip
    prepare_device("cpu")  # as training does
    model = GPT.build(config, compute_dtype=torch.bfloat16)
    task = RLTaskSpec("world")
    ids = [prompt["id"] for prompt in task.open().prompts("train")[:actors]]
    with tempfile.TemporaryDirectory() as folder:
        Tokenizer.from_tokens([bytes([byte]) for byte in range(256)]).save(Path(folder))
        spec = RolloutSpec("publication", task, Path(folder), config, "cpu", "bfloat16", max_rows=2, max_len=64)
        pool, params = RolloutPool(spec, actors, passed_on=PassedOn({})), SamplingParams(max_tokens=1, logprobs=0)
        found: list[dict[str, float]] = []
        while pool.stats().actors < actors:
            time.sleep(0.1)
        while len(found) < rounds:
            version = len(found)
            pool.publish(version, model)
            units = [
                RolloutUnit("train", version, k, version, (RolloutPrompt(name, k, (65, 66), 0),), params)
                for k, name in enumerate(ids)
            ]
            pool.submit(units)
            list(pool.finished(units))
            stats = pool.stats()
            put_s, fetch_s = stats.publish_s, stats.fetch_s
            found.append({"put_s": put_s, "fetch_s": fetch_s, "both_s": put_s + fetch_s})
        pool.close()
    return found


def main() -> None:
    import ray

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=256)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    ray.init(
        address="local", num_cpus=args.actors + 1, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        object_store_memory=int(max(5 * args.mb, 200)) << 20,
    )  # fmt: skip
    rounds = publication(args.mb, args.actors, args.rounds)
    for number, row in enumerate(rounds):
        print(f"{number}: " + ", ".join(f"{name} {value:.3f}" for name, value in row.items()))
    middle = {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}
    print(json.dumps({"bench": "rl_publication", "mb": args.mb, "actors": args.actors, **middle}))


if __name__ == "__main__":
    main()

"""What rollouts cost: sampling with many prompts in a batch beside one prompt at a time, publication, a step's parts.

    python bench/rl.py [--only sample,publish,step,sandbox] [--shape d4] [--dtype bfloat16] [--pairs 5] [--run FOLDER]
                       [--task-data DATA]

sample:  16 prompts x 8 samples x 64 tokens. One engine prompt by prompt, as nanochat's loop does it; one engine with
         all 128 rows; a pool of actors with one thread each, as jobs/rl.py runs it; 128 samples of a single prompt.
publish: 256 MB of weights to 2 actors of this machine (bench/rl_publication.py).
step:    which share of a step sampling, scoring, learning and publication have, from the metrics of a run's stage rl.
sandbox: programs per second (bench/sandbox.py).

Networks have random weights. In `sample` all arms take turns. Prints tables and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nanochat_ray.config import THREADS_ENV, ModelConfig

SHAPES = {
    "cpu": ModelConfig(sequence_len=256, vocab_size=1024, n_layer=4, n_head=3, n_kv_head=3, n_embd=192),
    "d4": ModelConfig(sequence_len=2048, vocab_size=32768, n_layer=4, n_head=2, n_kv_head=2, n_embd=256),
    "d12": ModelConfig(sequence_len=2048, vocab_size=32768, n_layer=12, n_head=6, n_kv_head=6, n_embd=768),
}
PROMPTS, SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 16, 8, 64, 64
STEP_PARTS = ("rollout/wait_s", "train/update_s", "train/publish_s")


def spec_of(shape: str, dtype: str, device: str, folder: Path, rows: int, threads: int) -> Any:
    """What an actor needs to sample with a network of this shape."""
    from nanochat_ray.stages.rollouts import RolloutSpec
    from nanochat_ray.tasks.rl_task import RLTaskSpec
    from nanochat_ray.text.tokenizer import SPECIAL_TOKENS, Tokenizer

    config = SHAPES[shape]
    n_pairs = config.vocab_size - 256 - len(SPECIAL_TOKENS)
    tokens = [bytes([k]) for k in range(256)] + [bytes(divmod(k, 256)) for k in range(n_pairs)]
    Tokenizer.from_tokens(tokens).save(folder)
    max_len = PROMPT_TOKENS + NEW_TOKENS
    return RolloutSpec("bench", RLTaskSpec("world"), folder, config, device, dtype, rows, max_len, threads)


def prompts_of(n: int) -> list[Any]:
    """Prompts of random bytes, under the names that the world's task gives its own."""
    import random

    from nanochat_ray.messages import RolloutPrompt
    from nanochat_ray.tasks.rl_task import RLTaskSpec

    draw, names = random.Random(1), RLTaskSpec("world").open().prompts("train")
    return [
        RolloutPrompt(names[k]["id"], k, tuple(draw.randrange(256) for _ in range(PROMPT_TOKENS)), k) for k in range(n)
    ]


def unit_of(number: int, prompts: Sequence[Any], samples: int) -> Any:
    from nanochat_ray.messages import RolloutUnit, SamplingParams

    params = SamplingParams(1.0, max_tokens=NEW_TOKENS, num_samples=samples, logprobs=0)
    return RolloutUnit("train", number, number, 0, tuple(prompts), params)


def measure_sampling(shape: str, dtype: str, device: str, pairs: int, threads: int) -> dict[str, float]:
    """Sampled tokens per second of each arm, the median."""
    import torch

    from nanochat_ray.messages import PassedOn
    from nanochat_ray.model.flat_weights import flatten
    from nanochat_ray.model.gpt import GPT
    from nanochat_ray.stages.rollouts import UnitSampler

    torch.set_num_threads(threads)
    actors = threads if device == "cpu" else 1
    per_actor = PROMPTS // actors
    prompts = prompts_of(PROMPTS)
    with tempfile.TemporaryDirectory() as folder:
        spec = spec_of(shape, dtype, device, Path(folder), PROMPTS * SAMPLES, threads)
        model = GPT.build(spec.model_config, compute_dtype=getattr(torch, dtype))
        sampler = UnitSampler(spec)
        sampler.load(flatten(model, 0))

        def here(units: Sequence[Any]) -> int:
            return sum(len(r.token_ids) for unit in units for group in sampler.sample(unit) for r in group)

        arms: dict[str, Callable[[], int]] = {
            "prompt by prompt": lambda: here([unit_of(k, prompts[k : k + 1], SAMPLES) for k in range(PROMPTS)]),
            "all prompts, one engine": lambda: here([unit_of(0, prompts, SAMPLES)]),
            "128 samples of one prompt": lambda: here([unit_of(0, prompts[:1], PROMPTS * SAMPLES)]),
        }
        pool = None
        if device == "cpu":
            pool = start_pool(spec_of(shape, dtype, device, Path(folder), per_actor * SAMPLES, 1), actors, PassedOn({}))
            pool.publish(0, model)
            cut = [prompts[k : k + per_actor] for k in range(0, PROMPTS, per_actor)]
            numbers = iter(range(10**6))

            def pooled() -> int:
                units = [unit_of(next(numbers), part, SAMPLES) for part in cut]
                pool.submit(units)
                done = list(pool.finished(units))
                return sum(len(r.token_ids) for unit in done for group in unit.groups for r in group.rollouts)

            arms[f"pool of {actors} actors, scored"] = pooled
        rates: dict[str, list[float]] = {name: [] for name in arms}
        for turn in range(pairs + 1):
            for name, arm in arms.items():
                begun = time.perf_counter()
                tokens = arm()
                if turn:  # the first one warms up
                    rates[name].append(tokens / (time.perf_counter() - begun))
        if pool is not None:
            pool.close()
    return {name: statistics.median(found) for name, found in rates.items()}


def start_pool(spec: Any, actors: int, passed_on: Any) -> Any:
    from nanochat_ray.rollout.pool import RolloutPool

    pool = RolloutPool(spec, actors, passed_on=passed_on)
    while pool.stats().actors < actors:
        time.sleep(0.1)
    return pool


def step_shares(run: Path) -> dict[str, float]:
    """Median seconds of a step and the shares of its parts; `rollout/wait_s` is sampling and scoring as waited for."""
    lines = (run / "rl" / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if "train/dt" in record]
    if not steps:
        raise ValueError(f"{run} has no step of RL yet")
    found = {"steps": float(len(steps)), "seconds": statistics.median(step["train/dt"] for step in steps)}
    whole = sum(step["train/dt"] for step in steps)
    for name in STEP_PARTS:
        found[name] = sum(step[name] for step in steps) / whole
    waited = sum(step["rollout/generate_s"] + step["rollout/score_s"] for step in steps)
    found["score of generate and score"] = sum(step["rollout/score_s"] for step in steps) / waited
    return found


def show(title: str, values: dict[str, float]) -> None:
    print(f"\n{title}")
    for name, value in values.items():
        print(f"  {name:32} {value:12,.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="sample,publish,step,sandbox")
    parser.add_argument("--shape", choices=SHAPES, default="d4")
    parser.add_argument("--dtype", default=None, help="unset: by hardware")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--task-data", type=Path, help="folder with human_eval/, for `sandbox`")
    parser.add_argument("--run", type=Path, help="folder of a run with a stage rl, for `step`")
    args = parser.parse_args()
    os.environ.update(THREADS_ENV)
    os.environ["RAY_AUTH_MODE"] = "disabled"
    from nanochat_ray.model.precision import pick_dtype

    dtype = str(pick_dtype(args.device, args.dtype)[0]).removeprefix("torch.")
    only, out = args.only.split(","), {}
    if args.device == "cpu" and {"sample", "publish"} & set(only):
        import ray

        ray.init(address="local", num_cpus=2 * args.threads, include_dashboard=False, log_to_driver=False,
                 object_store_memory=2 * 2**30)
    if "sample" in only:
        out["sample"] = rates = measure_sampling(args.shape, dtype, args.device, args.pairs, args.threads)
        show(f"sampled tokens per second, {args.shape}, {dtype}, {args.threads} threads", rates)
        base = rates["prompt by prompt"]
        show("times prompt by prompt", {name: rate / base for name, rate in rates.items()})
    if "publish" in only:
        from rl_publication import publication

        rounds = publication()
        out["publish"] = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
        show("publication of 256 MB to 2 actors, seconds, median", out["publish"])
    if "step" in only and args.run:
        out["step"] = step_shares(args.run)
        show("a step: seconds, then shares", out["step"])
    if "sandbox" in only and args.task_data:
        script = Path(__file__).with_name("sandbox.py")
        subprocess.run([sys.executable, str(script), "--task-data", str(args.task_data)], check=True)
    print(json.dumps({"dtype": dtype, "shape": args.shape, **out}))


if __name__ == "__main__":
    main()

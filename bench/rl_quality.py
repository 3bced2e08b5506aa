"""What RL does to each family of held-out questions: pass@1 before and after, over several seeds.

Takes a finished run on the embedded corpus (its stages up to sft), runs jobs/rl.py on copies of it with the settings of
the preset cpu and one seed each, and asks questions that no training prompt has. Sampled at temperature 1, and greedy.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean

STAGES = ("tokenizer", "pretrain", "sft")
POOL_SEED = 1000  # of the questions; the chat evaluation's are of another
MAX_TOKENS = 96
ROWS = 128


def scores(job: tuple[Path, Path, str, int]) -> tuple[str, float, float]:
    """Family, share right when sampled, and when greedy. Runs in a process of its own."""
    checkpoints, tokenizer_folder, family, n = job
    import torch

    from nanochat_ray.corpus.world.questions import is_right, question_pool
    from nanochat_ray.engine.engine import Engine
    from nanochat_ray.messages import SamplingParams
    from nanochat_ray.metrics.chat_eval import problem_seed
    from nanochat_ray.model.checkpoint import resolve_checkpoint
    from nanochat_ray.model.precision import pick_dtype
    from nanochat_ray.text.conversation import render_prompt
    from nanochat_ray.text.tokenizer import Tokenizer

    torch.set_num_threads(1)
    tokenizer = Tokenizer.load(tokenizer_folder)
    model = resolve_checkpoint(checkpoints, None).build_model("cpu", pick_dtype("cpu", None)[0])
    engine = Engine(model, tokenizer, ROWS)
    questions = question_pool(family, n, POOL_SEED)
    prompts = [render_prompt(tokenizer, q.messages[:-1], model.config.sequence_len - MAX_TOKENS).ids for q in questions]
    shares = []
    for temperature in (1.0, 0.0):
        params = [
            SamplingParams(temperature, max_tokens=MAX_TOKENS, seed=problem_seed(POOL_SEED, k))
            for k in range(len(prompts))
        ]
        found = engine.rollouts(prompts, params)
        right = [
            is_right(q.messages, tokenizer.decode(rollouts[0].token_ids))
            for q, rollouts in zip(questions, found, strict=True)
        ]
        shares.append(fmean(right))
    return family, shares[0], shares[1]


def all_scores(run: Path, stage: str, families: list[str], n: int) -> dict[str, tuple[float, float]]:
    jobs = [(run / stage / "checkpoints", run / "tokenizer", family, n) for family in families]
    workers = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return {family: (sampled, greedy) for family, sampled, greedy in pool.map(scores, jobs)}


def train(run: Path, folder: Path, seed: int, flags: list[str]) -> float:
    """RL on a copy of the run; returns its seconds."""
    copy = folder / f"seed{seed}"
    for stage in STAGES:
        shutil.copytree(run / stage, copy / stage)
    shutil.copy(run / "data.json", copy / "data.json")
    (copy / "lease.json").write_text((run / "lease.json").read_text())
    script = Path(__file__).resolve().parent.parent / "jobs" / "rl.py"
    command = [sys.executable, str(script), "--storage", str(folder), "--model-tag", copy.name, "--seed", str(seed)]
    begun = time.monotonic()
    subprocess.run([*command, *cpu_flags(), *flags], check=True)
    return time.monotonic() - begun


def cpu_flags() -> list[str]:
    """The cpu preset's settings of the stage as flags."""
    from nanochat_ray.config import RLSettings
    from nanochat_ray.presets import Machine, preset

    chosen, usual = preset("cpu", Machine(0)).rl, RLSettings()
    flags: list[str] = []
    for name in RLSettings.model_fields:
        value = getattr(chosen, name)
        if value != getattr(usual, name):
            flags += [f"--{name.replace('_', '-')}", "-1" if value is None else str(value)]
    return flags


def main() -> None:
    from nanochat_ray.corpus.world.questions import HELDOUT_COUNTS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path, help="folder of a run with its stages up to sft")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--questions", type=int, default=500, help="per family")
    parser.add_argument("--families", nargs="+", default=list(HELDOUT_COUNTS))
    args, rest = parser.parse_known_args()
    before = all_scores(args.run, "sft", args.families, args.questions)
    after, seconds = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            seconds[seed] = train(args.run, Path(folder), seed, rest)
            after[seed] = all_scores(Path(folder) / f"seed{seed}", "rl", args.families, args.questions)
    seeds = " ".join(f"{f'RL {seed}':>7}" for seed in args.seeds)
    print(f"{'family':20} {'SFT':>6} {seeds} change  greedy change")
    for family, (sampled, greedy) in before.items():
        each = [after[seed][family] for seed in args.seeds]
        change, changed = fmean(one[0] for one in each) - sampled, fmean(one[1] for one in each) - greedy
        shown = " ".join(f"{100 * one[0]:7.1f}" for one in each)
        line = f"{family:20} {100 * sampled:6.1f} {shown} {100 * change:+6.1f}"
        print(f"{line} {100 * greedy:7.1f} {100 * changed:+6.1f}")
    print("seconds of jobs/rl.py:", " ".join(f"{value:.0f}" for value in seconds.values()))
    print(json.dumps({"before": before, "after": after, "seconds": seconds}))


if __name__ == "__main__":
    main()

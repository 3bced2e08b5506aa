"""Our engine and vLLM side by side: same machine, weights, precision and threads.

    python bench/engines.py [--shape d6] [--dtype float32] [--streams 1,16,64] [--new-tokens 128] [--temperature 0]

Wants an environment with vLLM (tests/vllm/environment.sh makes one for CPUs). Both engines live in this process and run
in turns; a run is so many streams that begin together, from their submission to the last token. The network has random
weights and its answers do not end. Prompts are new ones in each run, so nothing is found in a prefix cache.

On a GPU our engine records CUDA graphs and vLLM does not (`enforce_eager`, as everywhere in this project), which costs
vLLM the more the smaller the network is. On a CPU neither has any.

Prints a table and one JSON line: median tokens per second of all streams together, the ratio of vLLM to ours in pairs
of runs with its range, and at temperature 0 the share of tokens before the first that differs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nanochat_ray.config import THREADS_ENV

ENVIRONMENT = {**THREADS_ENV, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
PROMPT_TOKENS = 64
Tokens = list[list[int]]
Run = Callable[[Sequence[Sequence[int]]], Tokens]


def our_run(model: Any, streams: int, new_tokens: int, temperature: float, kv_bytes: int) -> Run:
    from serve import tokenizer_of

    from nanochat_ray.engine.engine import Engine
    from nanochat_ray.messages import SamplingParams

    engine = Engine(model, tokenizer_of(model.config.vocab_size), streams, kv_bytes=kv_bytes)
    params = SamplingParams(temperature, max_tokens=new_tokens, use_tools=False)

    def run(prompts: Sequence[Sequence[int]]) -> Tokens:
        engine.forget()
        tokens: Tokens = [[] for _ in prompts]
        for event in engine.generate(prompts, params):
            tokens[event.prompt].append(event.token)
        return tokens

    return run


def vllm_run(
    model: Any, streams: int, new_tokens: int, temperature: float, kv_bytes: int, folder: Path, more: dict[str, Any]
) -> Run:
    from vllm import LLM
    from vllm import SamplingParams as Asked

    from nanochat_ray.interchange.vllm_plugin import engine_args, export_for_vllm

    arguments = engine_args(
        export_for_vllm(model, folder), dtype=model.compute_dtype, max_num_seqs=streams, kv_bytes=kv_bytes
    )
    llm = LLM(**arguments | more)
    asked = Asked(temperature=temperature, max_tokens=new_tokens, ignore_eos=True, detokenize=False)

    def run(prompts: Sequence[Sequence[int]]) -> Tokens:
        outputs = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], asked, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return run


def agreement(ours: Tokens, theirs: Tokens) -> float:
    """Share of the tokens that come before the first one of their stream that differs."""
    same = total = 0
    for own, other in zip(ours, theirs, strict=True):
        pairs = [a == b for a, b in zip(own, other, strict=True)]
        same += pairs.index(False) if False in pairs else len(pairs)
        total += len(pairs)
    return same / total


def measure(runs: dict[str, Run], streams: int, repeats: int) -> dict[str, Any]:
    from serve import prompts

    speeds: dict[str, list[float]] = {name: [] for name in runs}
    shares = []
    for repeat in range(repeats + 1):  # the first warms up
        tokens = {}
        for name, run in runs.items():
            asked = prompts(streams, PROMPT_TOKENS, 1000 * streams + repeat)
            begun = time.perf_counter()
            tokens[name] = run(asked)
            speeds[name].append(sum(map(len, tokens[name])) / (time.perf_counter() - begun))
        shares.append(agreement(tokens["ours"], tokens["vllm"]))
    ratios = sorted(b / a for a, b in zip(speeds["ours"][1:], speeds["vllm"][1:], strict=True))
    found = {f"{name}_tok_per_s": statistics.median(of_one[1:]) for name, of_one in speeds.items()}
    return {**found, "ratios": ratios, "ratio": statistics.median(ratios), "agreement": statistics.fmean(shares)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="d6", help="tiny, d6, d12 or d24")
    parser.add_argument("--dtype", default="float32", help="compute precision: float32 or bfloat16")
    parser.add_argument("--device", default="cpu", help="cuda: both engines on a GPU")
    parser.add_argument("--streams", default="1,16,64")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=1, help="of both engines")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs that count")
    parser.add_argument("--kv-mb", type=int, default=1024, help="memory of each engine's cache in MiB")
    parser.add_argument("--vllm-args", type=json.loads, default={}, help="more arguments of vllm.LLM, as JSON")
    args = parser.parse_args()
    wanted = {**ENVIRONMENT, "OMP_NUM_THREADS": str(args.threads)}
    if any(os.environ.get(name) != value for name, value in wanted.items()):  # some count from the start on
        os.environ.update(wanted)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.execv(sys.executable, [sys.executable, *sys.argv])

    import torch
    from serve import random_model

    from nanochat_ray.interchange.vllm_plugin import check_vllm
    from nanochat_ray.model.precision import prepare_device

    check_vllm()
    import vllm

    prepare_device(args.device)
    torch.set_num_threads(args.threads)
    model = random_model(args.shape, args.dtype, args.device)
    each = [int(n) for n in args.streams.split(",")]
    sizes = args.new_tokens, args.temperature, args.kv_mb << 20
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            "ours": our_run(model, max(each), *sizes),
            "vllm": vllm_run(model, max(each), *sizes, Path(folder), args.vllm_args),
        }
        found: dict[str, Any] = {**vars(args), "torch": torch.__version__, "vllm": vllm.__version__, "speeds": {}}
        print("streams      ours      vLLM   tokens per second; vLLM to ours in pairs of runs")
        for n in each:
            one = found["speeds"][n] = measure(runs, n, args.repeats)
            print(
                f"{n:7d} {one['ours_tok_per_s']:9.0f} {one['vllm_tok_per_s']:9.0f}   {one['ratio']:.2f} "
                f"({one['ratios'][0]:.2f} to {one['ratios'][-1]:.2f})"
                + (f", {one['agreement']:.1%} the same tokens" if args.temperature == 0 else "")
            )
    print(json.dumps(found))


if __name__ == "__main__":
    main()

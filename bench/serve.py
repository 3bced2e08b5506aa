"""What serving costs: the bare engine against its limits, and the same engine behind HTTP and Ray Serve.

    python bench/serve.py [--only engine,prefix,http,first,cold] [--pairs 5] [--threads 1] [--dtype bfloat16]

engine: tokens per second of 1 and 16 streams on a tiny and a d6 network, beside the time that reading takes.
prefix: time to the first token of a conversation's first and second turn.
http:   16 streams in the bare engine and through HTTP in turns, same machine, Serve up in both arms, client's CPU.
first:  time to the first token through HTTP, beside an endpoint on Serve that streams without doing anything.
cold:   from `serve run` to the first token.

All networks have random weights. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanochat_ray.config import THREADS_ENV, ModelConfig

SHAPES = {
    "tiny": ModelConfig(sequence_len=2048, vocab_size=1024, n_layer=4, n_head=4, n_kv_head=4, n_embd=256),
    "d6": ModelConfig(sequence_len=2048, vocab_size=32768, n_layer=6, n_head=3, n_kv_head=3, n_embd=384),
    "d12": ModelConfig(sequence_len=2048, vocab_size=32768, n_layer=12, n_head=6, n_kv_head=6, n_embd=768),
    "d24": ModelConfig(sequence_len=2048, vocab_size=32768, n_layer=24, n_head=12, n_kv_head=12, n_embd=1536),
}
STREAMS, PROMPT_TOKENS, NEW_TOKENS = 16, 64, 256
PORT = 8765
REPEATS = 5
FIRST_TOKENS = 40  # requests of each kind in `first`


# --- the bare engine -------------------------------------------------------------------------------------------------


def prompts(n: int, length: int, seed: int) -> list[list[int]]:
    import random

    draw = random.Random(seed)
    return [[draw.randrange(256) for _ in range(length)] for _ in range(n)]


def build_engine(shape: str, dtype: str, device: str = "cpu", max_rows: int = STREAMS) -> Any:
    from nanochat_ray.engine.engine import Engine

    return Engine(random_model(shape, dtype, device), tokenizer_of(SHAPES[shape].vocab_size), max_rows)


def random_model(shape: str, dtype: str = "float32", device: str = "cpu") -> Any:
    """Its answers do not end: special tokens have a logit of 0, which is far from the 50 largest."""
    import torch

    from nanochat_ray.model.gpt import GPT
    from nanochat_ray.text.tokenizer import SPECIAL_TOKENS

    config = SHAPES[shape]
    model = GPT.build(config, device=device, compute_dtype=getattr(torch, dtype))
    with torch.no_grad():
        model.lm_head.weight[config.vocab_size - len(SPECIAL_TOKENS) :] = 0
    return model


def tokenizer_of(vocab_size: int) -> Any:
    """Single bytes and pairs of bytes, as many as are needed."""
    from nanochat_ray.text.tokenizer import SPECIAL_TOKENS, Tokenizer

    n_pairs = vocab_size - 256 - len(SPECIAL_TOKENS)
    return Tokenizer.from_tokens([bytes([k]) for k in range(256)] + [bytes(divmod(k, 256)) for k in range(n_pairs)])


def tokens_per_s(engine: Any, n: int, seed: int) -> float:
    """Of n streams that begin together, from their submission to the last token."""
    from nanochat_ray.messages import SamplingParams

    params = SamplingParams(temperature=0.8, top_k=50, max_tokens=NEW_TOKENS, use_tools=False, seed=seed)
    begun = time.perf_counter()
    for prompt in prompts(n, PROMPT_TOKENS, seed):
        engine.submit(prompt, params)
    count = 0
    while engine.busy:
        count += len(engine.step())
    return count / (time.perf_counter() - begun)


def read_bytes_per_s(device: str) -> float:
    """What this process can read from the device's memory: sums over 512 MiB."""
    import torch

    data = torch.zeros(2**27, device=device)
    times = []
    for _ in range(6):
        begun = time.perf_counter()
        data.sum().item()
        times.append(time.perf_counter() - begun)
    return data.nbytes / min(times)


def bytes_read(engine: Any, n: int) -> tuple[int, int]:
    """Bytes of weights, and of keys and values on average, that a step of n streams must read at least."""
    model = engine.model
    tables = {id(table.weight) for table in model.tables}
    size = model.compute_dtype.itemsize
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2 and id(p) not in tables) * size
    position, c = PROMPT_TOKENS + NEW_TOKENS // 2, model.config
    return weights, n * sum(2 * c.n_kv_head * c.head_dim * size * min(position, left + 1) for left in model.windows())


def bench_engine(dtype: str, device: str) -> dict[str, Any]:
    bandwidth = read_bytes_per_s(device)
    print(f"memory is read at {bandwidth / 1e9:.1f} GB/s")
    found: dict[str, Any] = {"read_gb_per_s": bandwidth / 1e9}
    shapes, batches = (("tiny", "d6"), (1, STREAMS)) if device == "cpu" else (("d12", "d24"), (1, 8, 32, 128))
    for shape in shapes:
        engine = build_engine(shape, dtype, device, batches[-1])
        speeds: dict[int, list[float]] = {n: [] for n in batches}
        for repeat in range(REPEATS + 1):  # the first warms up
            for n, of_n in speeds.items():
                of_n.append(tokens_per_s(engine, n, repeat))
                engine.forget()
        found[shape] = {}
        for n, (_, *measured) in speeds.items():
            ratios = sorted(many / one for one, many in zip(speeds[1][1:], measured, strict=True))
            weights, stored = bytes_read(engine, n)
            step_s = n / statistics.median(measured)
            used = (weights + stored) / step_s / bandwidth
            found[shape][n] = {
                "tok_per_s": n / step_s, "step_ms": 1e3 * step_s, "ratios": ratios, "weight_bytes": weights,
                "kv_bytes": stored, "mbu": used,
            }  # fmt: skip
            print(
                f"{shape:5s} {n:4d} streams: {n / step_s:8.0f} tok/s, {statistics.median(ratios):5.1f} times one "
                f"({ratios[0]:.1f} to {ratios[-1]:.1f}), {1e3 * step_s:6.2f} ms a step, of which reading "
                f"{(weights + stored) / 1e6:.0f} MB takes {1e3 * used * step_s:.2f} ms ({used:.0%})"
            )
    return found


def first_token_s(engine: Any, prompt: list[int]) -> float:
    from nanochat_ray.messages import SamplingParams

    begun = time.perf_counter()
    number = engine.submit(prompt, SamplingParams(temperature=0.0, max_tokens=1))
    while not engine.step():
        pass
    elapsed = time.perf_counter() - begun
    engine.cancel(number)
    return elapsed


def bench_prefix(dtype: str) -> dict[str, Any]:
    engine = build_engine("d6", dtype)
    first_token_s(engine, prompts(1, 1000, 99)[0])
    firsts, seconds = [], []
    for seed in range(REPEATS):
        history = prompts(1, 1000, seed)[0]
        firsts.append(first_token_s(engine, history))
        seconds.append(first_token_s(engine, history + prompts(1, 40, 1000 + seed)[0]))
    share = sorted(b / a for a, b in zip(firsts, seconds, strict=True))
    found = {"first_ms": 1e3 * statistics.median(firsts), "second_ms": 1e3 * statistics.median(seconds), "share": share}
    print(f"d6, 1,000 tokens: first token of turn one after {found['first_ms']:.1f} ms, of turn two (40 tokens more) "
          f"after {found['second_ms']:.1f} ms: {statistics.median(share):.1%} (at most {share[-1]:.1%})")  # fmt: skip
    return found


# --- through HTTP ----------------------------------------------------------------------------------------------------


def make_run(storage: Path, shape: str) -> None:
    """A run folder as training leaves it, with random weights."""
    from nanochat_ray.model.checkpoint import model_tensors, save_checkpoint
    from nanochat_ray.run_dir import CONFIG_FILE, RunDir, write_json

    config = SHAPES[shape]
    run = RunDir(storage / shape)
    with run.open():
        run.stage("tokenizer").mkdir(parents=True)
        tokenizer_of(config.vocab_size).save(run.stage("tokenizer"))
        run.finish_stage("tokenizer")
        run.stage("pretrain").mkdir()
        write_json(run.stage("pretrain") / CONFIG_FILE, {"settings": {}})
        meta = {"model_config": config.model_dump(mode="json"), "val_bpb": 1.0}
        save_checkpoint(run.checkpoints("pretrain"), 1, model_tensors(random_model(shape)), None, meta)
        run.finish_stage("pretrain")


def body_of(prompt: list[int], max_tokens: int) -> dict[str, Any]:
    return {"model": "d6-base", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0.8, "top_k": 50,
            "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip


async def stream(session: Any, url: str, body: dict[str, Any]) -> tuple[float, int]:
    """Seconds to the first data, and completion tokens at the end."""
    begun, first, tokens = time.perf_counter(), 0.0, 0
    async with session.post(url, json=body) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data:"):
                first = first or time.perf_counter() - begun
                if b'"completion_tokens"' in line:
                    tokens = json.loads(line[5:])["usage"]["completion_tokens"]
    return first, tokens


async def client(kind: str, seed: int) -> dict[str, Any]:
    """What the client process does: all streams at once, or one short one after another."""
    import aiohttp

    completions, noop = f"http://127.0.0.1:{PORT}/v1/completions", f"http://127.0.0.1:{PORT}/noop/"
    async with aiohttp.ClientSession() as session:
        if kind == "many":
            await stream(session, completions, body_of(prompts(1, 8, 0)[0], 2))
            begun = time.perf_counter()
            bodies = [body_of(prompt, NEW_TOKENS) for prompt in prompts(STREAMS, PROMPT_TOKENS, seed)]
            results = await asyncio.gather(*(stream(session, completions, body) for body in bodies))
            return {
                "tokens": sum(tokens for _, tokens in results),
                "seconds": time.perf_counter() - begun,
                "first_s": statistics.median(first for first, _ in results),
                "client_cpu_s": time.process_time(),
            }
        firsts: dict[str, list[float]] = {"noop": [], "token": []}
        for number in range(FIRST_TOKENS + 5):
            [prompt] = prompts(1, PROMPT_TOKENS, 10_000 + number)
            for name, url in (("noop", noop), ("token", completions)):
                firsts[name].append((await stream(session, url, body_of(prompt, 1)))[0])
        return {name: values[5:] for name, values in firsts.items()}


def run_client(kind: str, seed: int = 0) -> dict[str, Any]:
    command = [sys.executable, __file__, "--client", kind, "--seed", str(seed)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@contextmanager
def served(storage: Path, threads: int, dtype: str) -> Iterator[None]:
    """The chat application with the d6 network, and an endpoint beside it that does nothing."""
    import ray
    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse
    from ray import serve

    from nanochat_ray.serve.app import ServeSettings, build

    noop_app = FastAPI()

    async def nothing(request: Any) -> StreamingResponse:
        async def events() -> Any:
            yield "data: {}\n\n"

        await request.json()
        return StreamingResponse(events(), media_type="text/event-stream")

    noop_app.add_route("/", nothing, methods=["POST"])
    noop: Any = serve.deployment(serve.ingress(noop_app)(type("Noop", (), {})))
    ray.init(address="local", num_cpus=threads + 2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        settings = ServeSettings(
            storage=str(storage), source="base", model_tag="d6", max_rows=STREAMS, cpus=threads, dtype=dtype
        )
        serve.run(build(settings), name="chat", route_prefix="/")
        serve.run(noop.options(ray_actor_options={"num_cpus": 0}).bind(), name="noop", route_prefix="/noop")
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


def bench_http(pairs: int, dtype: str, which: Sequence[str], threads: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_run(Path(folder), "d6")
        engine = build_engine("d6", dtype)
        with served(Path(folder), threads, dtype):
            run_client("many")
            tokens_per_s(engine, STREAMS, 0)
            if "http" in which:
                arms = []
                for pair in range(pairs):
                    bare = tokens_per_s(engine, STREAMS, pair)
                    engine.forget()
                    got = run_client("many", pair)
                    arms.append({"bare": bare, "http": got["tokens"] / got["seconds"], **got})
                ratios = sorted(arm["http"] / arm["bare"] for arm in arms)
                cpu = statistics.median(arm["client_cpu_s"] for arm in arms)
                found["http"] = {"arms": arms, "ratio": statistics.median(ratios), "ratios": ratios}
                bare, http = (statistics.median(arm[name] for arm in arms) for name in ("bare", "http"))
                print(
                    f"d6, {STREAMS} streams: bare {bare:.0f} tok/s, through HTTP {http:.0f}: "
                    f"{statistics.median(ratios):.1%} ({ratios[0]:.1%} to {ratios[-1]:.1%}); "
                    f"the client took {cpu:.2f} s of CPU"
                )
            if "first" in which:
                firsts = {name: [1e3 * value for value in values] for name, values in run_client("first").items()}
                firsts["bare"] = []
                for number in range(FIRST_TOKENS):
                    firsts["bare"].append(1e3 * first_token_s(engine, prompts(1, PROMPT_TOKENS, 20_000 + number)[0]))
                found["first"] = {name: statistics.median(values) for name, values in firsts.items()}
                f = found["first"]
                print(f"first token, d6, {PROMPT_TOKENS} tokens of prompt: {f['token']:.1f} ms through HTTP, no-op "
                      f"endpoint {f['noop']:.1f}, bare engine {f['bare']:.1f}: {f['token'] - f['noop']:.1f} above the "
                      f"no-op, {f['token'] - f['noop'] - f['bare']:.1f} of them not the engine's")  # fmt: skip
    return found


def bench_cold(dtype: str) -> dict[str, Any]:
    """From `serve run` to the first token, on a machine whose files are in memory."""
    import urllib.error
    import urllib.request

    config = Path(__file__).parent.parent / "serve_configs" / "chat.yaml"
    with tempfile.TemporaryDirectory() as folder:
        make_run(Path(folder), "d6")
        text = config.read_text().replace("source: sft", f"source: base\n      dtype: {dtype}")
        mine = Path(folder) / "chat.yaml"
        mine.write_text(text.replace("port: 8000", f"port: {PORT}"))
        env = {**os.environ, "RAY_AUTH_MODE": "disabled", "NANOCHAT_BASE_DIR": folder}
        begun = time.perf_counter()
        with open(Path(folder) / "log", "w") as log:
            serve = Path(sys.executable).with_name("serve")
            server = subprocess.Popen([serve, "run", mine], env=env, stdout=log, stderr=log)
        request = urllib.request.Request(
            f"http://127.0.0.1:{PORT}/v1/completions",
            json.dumps({"prompt": "a", "max_tokens": 1}).encode(), {"Content-Type": "application/json"},
        )  # fmt: skip
        try:
            while True:
                assert server.poll() is None, (Path(folder) / "log").read_text()
                try:
                    urllib.request.urlopen(request, timeout=60).read()
                    break
                except (urllib.error.URLError, ConnectionError):
                    time.sleep(0.1)
            seconds = time.perf_counter() - begun
        finally:
            server.send_signal(2)
            server.wait(60)
    print(f"cold start: first token {seconds:.1f} s after `serve run`")
    return {"seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="engine,prefix,http,first,cold")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the engine, in both arms")
    parser.add_argument("--dtype", default="bfloat16", help="compute precision; float32 on CPUs without bf16")
    parser.add_argument("--device", default="cpu", help="cuda: `engine` on a GPU, for d12 and d24")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        print(json.dumps(asyncio.run(client(args.client, args.seed))))
        return
    if any(os.environ.get(name) != value for name, value in THREADS_ENV.items()):  # they count from the start on
        os.environ.update(THREADS_ENV)
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.execv(sys.executable, [sys.executable, *sys.argv])

    import torch

    from nanochat_ray.model.precision import prepare_device

    prepare_device(args.device)
    torch.set_num_threads(args.threads)
    which = args.only.split(",")
    found: dict[str, Any] = {"threads": args.threads, "dtype": args.dtype, "torch": torch.__version__}
    if "engine" in which:
        found["engine"] = bench_engine(args.dtype, args.device)
    if "prefix" in which:
        found["prefix"] = bench_prefix(args.dtype)
    if {"http", "first"} & set(which):
        found.update(bench_http(args.pairs, args.dtype, which, args.threads))
    if "cold" in which:
        found["cold"] = bench_cold(args.dtype)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

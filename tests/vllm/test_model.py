"""Our network in vLLM against our engine and against full forward passes, with all that could part them switched on:
chunks, shared beginnings, more requests than rows, too little memory, windows that are shorter than the sequences."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat_ray.config import ModelConfig
from nanochat_ray.engine.engine import Engine
from nanochat_ray.interchange.vllm_plugin import engine_args, export_for_vllm, load_weights
from nanochat_ray.messages import SamplingParams
from nanochat_ray.model.flat_weights import flatten
from nanochat_ray.model.gpt import GPT
from tests.engine.tiny import byte_tokenizer, random_prompt

pytestmark = pytest.mark.vllm

TOKENIZER = byte_tokenizer()
CONTEXT = 300  # more than twice the short window of 128
NEW_TOKENS = 64
CHUNK_TOKENS = 80  # shorter than most prompts
BLOCK_SIZE = 32  # the smallest that vLLM's kernels for CPUs take
PLENTY = 64 << 20  # bytes of cache
NEAR = 1e-3  # two logits so near to each other may change places by rounding
# heads, key heads, channels, layers, windows. A head of 24 channels is none that vLLM has kernels for.
SHAPES = {
    "groups": (4, 2, 128, 5, "SSL"),
    "narrow heads": (2, 1, 48, 3, "S"),
    "two layers": (2, 2, 64, 2, "L"),
}


def random_model(shape: str, *, seed: int = 0, context: int = CONTEXT, dtype: torch.dtype = torch.float32) -> GPT:
    """Every tensor is random, so that smear, gates, scalars and the zero projections all count. Its answers do not
    end, and the best logits are far enough from each other to be compared."""
    heads, kv_heads, channels, layers, windows = SHAPES[shape]
    config = ModelConfig(
        sequence_len=context, vocab_size=TOKENIZER.vocab_size, n_layer=layers, n_head=heads, n_kv_head=kv_heads,
        n_embd=channels, window_pattern=windows,
    )  # fmt: skip
    model = GPT.build(config, compute_dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.size(1) ** -0.5)
            else:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
        model.lm_head.weight.mul_(8)
        model.lm_head.weight[256:] = 0
    return model


def arguments(model: GPT, folder: Path, kv_bytes: int = PLENTY, **more: Any) -> dict[str, Any]:
    own = engine_args(
        export_for_vllm(model, folder), dtype=model.compute_dtype, max_model_len=model.config.sequence_len + 1,
        max_num_seqs=16, kv_bytes=kv_bytes,
    )  # fmt: skip
    return own | {"block_size": BLOCK_SIZE, "max_num_batched_tokens": CHUNK_TOKENS, "disable_log_stats": False} | more


def fifty_prompts() -> list[list[int]]:
    """Of all lengths up to what leaves room for the answer; every third begins like the others of its kind."""
    longest = CONTEXT - NEW_TOKENS
    alone = [random_prompt(1 + k * (longest - 1) // 49, seed=k) for k in range(50)]
    begin = random_prompt(150, seed=100)
    return [[*begin, *own[150:], k] if k % 3 == 0 and len(own) > 150 else own for k, own in enumerate(alone)]


def answers(llm: Any, prompts: Sequence[Sequence[int]], n: int = NEW_TOKENS) -> tuple[list[list[int]], list[Tensor]]:
    """Tokens of greedy answers and their log-probabilities."""
    from vllm import SamplingParams as Asked

    asked = Asked(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False, logprobs=0)
    found = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], asked, use_tqdm=False)
    outputs = [one.outputs[0] for one in found]
    logprobs = [
        torch.tensor([at[token].logprob for at, token in zip(o.logprobs, o.token_ids, strict=True)]) for o in outputs
    ]
    return [list(o.token_ids) for o in outputs], logprobs


@torch.no_grad()
def logits_behind(model: GPT, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """What a full forward pass says about each of the tokens (n, V)."""
    return model(torch.tensor([[*prompt, *tokens]]))[0, len(prompt) - 1 : -1].float()


def comparable(logits: Tensor) -> int:
    """How many tokens come before the first that rounding may decide."""
    best = logits.topk(2, dim=-1).values
    near = (best[:, 0] - best[:, 1] < NEAR).nonzero()
    return int(near[0]) if len(near) else len(logits)


def follow(model: GPT, prompts: Sequence[Sequence[int]], streams: Sequence[Sequence[int]]) -> int:
    """How many tokens of the streams can be compared with full forward passes; -1 if one of those is another."""
    compared = 0
    for prompt, tokens in zip(prompts, streams, strict=True):
        logits = logits_behind(model, prompt, tokens)
        n = comparable(logits)
        if list(tokens[:n]) != logits[:n].argmax(-1).tolist():
            return -1
        compared += n
    return compared


def metric(llm: Any, name: str) -> float:
    return sum(one.value for one in llm.get_metrics() if one.name == f"vllm:{name}")


@pytest.mark.parametrize("shape", list(SHAPES))
def test_answers_are_those_of_our_engine(start_llm: Callable[..., Any], tmp_path: Path, shape: str) -> None:
    model, prompts = random_model(shape), fifty_prompts()
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, use_tools=False)
    ours = [list(group[0].token_ids) for group in Engine(model, TOKENIZER, 16).rollouts(prompts, params)]
    llm = start_llm(**arguments(model, tmp_path))
    theirs, logprobs = answers(llm, prompts)
    compared, worst = 0, 0.0
    for prompt, own, other, likely in zip(prompts, ours, theirs, logprobs, strict=True):
        logits = logits_behind(model, prompt, own)
        n = comparable(logits)
        assert own[:n] == other[:n]
        want = logits[:n].log_softmax(-1).gather(1, torch.tensor(own)[:n, None])[:, 0]
        worst = max(worst, float((likely[:n] - want).abs().max())) if n else worst
        compared += n
    assert compared >= 0.9 * 50 * NEW_TOKENS
    assert worst < 1e-4
    assert metric(llm, "prefix_cache_hits") > 0
    again, _ = answers(llm, prompts)  # now nearly all of each prompt is found in the cache
    assert follow(model, prompts, again) == compared


def test_streams_that_lose_their_memory_go_on_as_if_they_had_not(start_llm: Callable[..., Any], tmp_path: Path) -> None:
    model, prompts = random_model("groups"), fifty_prompts()[20:40]
    llm = start_llm(**arguments(model, tmp_path, kv_bytes=1 << 20))
    theirs, _ = answers(llm, prompts)
    assert follow(model, prompts, theirs) > 0.8 * len(prompts) * NEW_TOKENS
    assert metric(llm, "num_preemptions") > 0


def test_windows_end_where_ours_do_beyond_the_context(start_llm: Callable[..., Any], tmp_path: Path) -> None:
    model = random_model("groups", context=128)  # no layer looks back further than 128 tokens
    llm = start_llm(**arguments(model, tmp_path, max_model_len=512))
    prompts = [random_prompt(length, seed=length) for length in (127, 128, 129, 130, 257, 400)]
    theirs, _ = answers(llm, prompts)
    assert follow(model, prompts, theirs) > 0.6 * len(prompts) * NEW_TOKENS


def test_bf16_is_as_near_as_bf16_can_be(start_llm: Callable[..., Any], tmp_path: Path) -> None:
    model, prompts = random_model("groups", dtype=torch.bfloat16), fifty_prompts()[::7]
    exact = random_model("groups")
    with torch.no_grad():
        for parameter, rounded in zip(exact.parameters(), model.parameters(), strict=True):
            parameter.copy_(rounded)
    theirs, logprobs = answers(start_llm(**arguments(model, tmp_path)), prompts, 16)
    ours, others = [], []
    for prompt, tokens, likely in zip(prompts, theirs, logprobs, strict=True):
        at = torch.tensor(tokens)[:, None]
        own, true = (logits_behind(m, prompt, tokens).log_softmax(-1).gather(1, at)[:, 0] for m in (model, exact))
        ours.append((own - true).abs())
        others.append((likely - true).abs())
    assert torch.cat(others).mean() < 1.5 * torch.cat(ours).mean()


def test_the_next_request_sees_new_weights(start_llm: Callable[..., Any], tmp_path: Path) -> None:
    old, new = random_model("groups"), random_model("groups", seed=1)
    prompts = [random_prompt(length, seed=length) for length in (5, 90, 200)]
    llm = start_llm(**arguments(old, tmp_path))

    def follows(model: GPT) -> bool:
        return follow(model, prompts, answers(llm, prompts, 8)[0]) > 12

    assert follows(old) and not follows(new)
    assert load_weights(llm, flatten(new, 7)) == 7
    assert follows(new) and not follows(old)  # what it had computed of these prompts is gone
    with pytest.raises(ValueError, match="wanted"):
        load_weights(llm, flatten(GPT.build(old.config.model_copy(update={"vocab_size": 400})), 8))
    assert follows(new)


def test_weights_do_not_change_below_a_request(start_llm: Callable[..., Any], tmp_path: Path) -> None:
    from vllm import SamplingParams as Asked

    old, new = random_model("groups"), random_model("groups", seed=1)
    engine = start_llm(**arguments(old, tmp_path)).llm_engine
    prompt = random_prompt(20, seed=1)
    asked = Asked(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    engine.add_request("one", {"type": "token", "prompt_token_ids": prompt}, asked)
    with pytest.raises(RuntimeError, match="in flight"):
        load_weights(engine, flatten(new, 1))  # it only waits yet, and holds no memory
    engine.step()
    with pytest.raises(RuntimeError, match="in flight"):
        load_weights(engine, flatten(new, 1))
    while engine.has_unfinished_requests():
        outputs = engine.step()
    tokens = list(outputs[0].outputs[0].token_ids)
    assert follow(old, [prompt], [tokens]) > 0 > follow(new, [prompt], [tokens])
    assert load_weights(engine, flatten(new, 1)) == 1


IN_PROCESSES = """
import json, sys

def main():
    from vllm import LLM, SamplingParams
    from nanochat_ray.interchange.vllm_plugin import engine_args, load_weights
    from pathlib import Path
    llm = LLM(**engine_args(Path(sys.argv[1]), kv_bytes=16 << 20))
    asked = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False)
    tokens = list(llm.generate([{"prompt_token_ids": [1, 2, 3]}], asked, use_tqdm=False)[0].outputs[0].token_ids)
    try:
        load_weights(llm, None)
    except RuntimeError as error:
        Path(sys.argv[2]).write_text(json.dumps([tokens, str(error)]))

if __name__ == "__main__":
    main()
"""


def test_vllm_in_processes_of_its_own(tmp_path: Path) -> None:
    """Which is what it does unless it is told otherwise; there weights cannot be handed over, and that is said."""
    model, out = random_model("groups"), tmp_path / "out.json"
    script = tmp_path / "script.py"
    script.write_text(IN_PROCESSES)
    env = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    command = [sys.executable, script, export_for_vllm(model, tmp_path / "folder"), out]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert out.exists(), done.stderr[-3000:]
    tokens, refusal = json.loads(out.read_text())
    assert follow(model, [[1, 2, 3]], [tokens]) > 0
    assert "VLLM_ENABLE_V1_MULTIPROCESSING=0" in refusal

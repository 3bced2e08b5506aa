"""Laws of generation, on a random network in double precision."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_ray.engine.calculator import calculate
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.kv_cache import Step
from nanochat_ray.engine.naive import naive_generate
from nanochat_ray.messages import SamplingParams
from nanochat_ray.model.gpt import GPT
from tests.engine.tiny import CONTEXT, byte_tokenizer, random_prompt, tiny_model

TOKENIZER = byte_tokenizer()
MODELS = {"SL": tiny_model("SL"), "L": tiny_model("L", n_layer=1), "SSL": tiny_model("SSL", n_kv_head=2)}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
HOT = SamplingParams(temperature=1.0, max_tokens=10, num_samples=3)


def naive_until_end(engine: Engine, prompt: list[int], max_tokens: int) -> list[int]:
    """The reference's greedy tokens up to and with the first that ends a reply."""
    tokens = []
    for token in naive_generate(engine.model, prompt, max_tokens, temperature=0.0):
        tokens.append(token)
        if token in engine.terminals:
            break
    return tokens


def streams(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> dict[tuple[int, int], list[int]]:
    out: dict[tuple[int, int], list[int]] = {}
    for event in engine.generate(prompts, params):
        out.setdefault((event.prompt, event.sample), []).append(event.token)
    return out


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.one_of(st.integers(1, 6), st.integers(120, 150)), min_size=1, max_size=5),
    max_rows=st.sampled_from([1, 2, 4, 64]),
    window=st.sampled_from(sorted(MODELS)),
    seed=st.integers(0, 1000),
)
def test_greedy_equals_naive(lengths: list[int], max_rows: int, window: str, seed: int) -> None:
    engine = Engine(MODELS[window], TOKENIZER, max_rows)
    prompts = [random_prompt(length, seed + k) for k, length in enumerate(lengths)]
    params = dataclasses.replace(GREEDY, use_tools=False)
    found = streams(engine, prompts, params)
    assert found == {(k, 0): naive_until_end(engine, prompt, 12) for k, prompt in enumerate(prompts)}


def test_greedy_equals_naive_when_rows_leave_early() -> None:
    engine = Engine(MODELS["SL"], TOKENIZER, max_rows=3)
    engine.terminals = frozenset(range(0, 265, 9))  # so that rows end at different times
    prompts = [random_prompt(length, length) for length in (4, 130, 9, 1, 77, 128, 2, 127, 30, 3)]
    found = streams(engine, prompts, dataclasses.replace(GREEDY, max_tokens=40, use_tools=False))
    wanted = {(k, 0): naive_until_end(engine, prompt, 40) for k, prompt in enumerate(prompts)}
    assert found == wanted
    assert len({len(tokens) for tokens in wanted.values()}) > 4, "the test needs streams of many lengths"


class Counted:
    """A network that records the number of tokens of each forward."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.sizes: list[int] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.model, name)

    def __call__(self, idx: torch.Tensor, cache: Step, at: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        self.sizes.append(idx.numel())
        return self.model(idx, cache=cache, at=at)


def test_no_forward_that_nobody_needs() -> None:
    counted = Counted(MODELS["SL"])
    engine = Engine(counted, TOKENIZER)  # type: ignore[arg-type]
    engine.terminals = frozenset(range(0, 265, 12))
    prompts = [random_prompt(5, 1), random_prompt(8, 2)]
    found = streams(engine, prompts, SamplingParams(temperature=1.0, max_tokens=30, num_samples=6, use_tools=False))
    lengths = [len(tokens) for tokens in found.values()]
    decoded = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert counted.sizes == [6 * (5 + 8), *decoded]
    assert len(set(decoded)) > 3, "the test needs rows that leave one after the other"


@pytest.mark.parametrize("top_k", [None, 7])
def test_a_sample_is_the_same_alone_and_in_company(top_k: int | None) -> None:
    prompts = [random_prompt(length, length) for length in (3, 130, 20, 7)]
    params = dataclasses.replace(HOT, top_k=top_k)
    together = streams(Engine(MODELS["SL"], TOKENIZER), prompts, params)
    assert streams(Engine(MODELS["SL"], TOKENIZER, max_rows=2), prompts, params) == together
    alone = Engine(MODELS["SL"], TOKENIZER)
    for k, prompt in enumerate(prompts):
        for number in (1, 2):
            few = streams(alone, [prompt], dataclasses.replace(params, num_samples=number))
            assert few == {(0, sample): together[k, sample] for sample in range(number)}


def test_seeds() -> None:
    engine, prompt = Engine(MODELS["SL"], TOKENIZER), [random_prompt(5, 5)]
    first = streams(engine, prompt, HOT)
    assert streams(engine, prompt, HOT) == first
    assert streams(engine, prompt, dataclasses.replace(HOT, seed=43)) != first
    assert len({tuple(tokens) for tokens in first.values()}) == HOT.num_samples
    greedy = dataclasses.replace(GREEDY, num_samples=2)
    cold = streams(engine, prompt, greedy)
    assert cold == streams(engine, prompt, dataclasses.replace(greedy, seed=1)) and cold[0, 0] == cold[0, 1]


def test_first_tokens_differ_between_rows() -> None:
    model = tiny_model()
    torch.nn.init.zeros_(model.lm_head.weight)  # all tokens equally likely
    params = SamplingParams(max_tokens=1, num_samples=200)
    firsts = [event.token for event in Engine(model, TOKENIZER).generate([[1, 2]], params)]
    assert len(firsts) == 200 and len(set(firsts)) > 100


@pytest.mark.parametrize(("max_tokens", "num_samples", "max_rows"), [(1, 1, 1), (1, 5, 2), (7, 4, 3), (3, 9, 64)])
def test_limits_are_kept(max_tokens: int, num_samples: int, max_rows: int) -> None:
    engine = Engine(MODELS["L"], TOKENIZER, max_rows)
    engine.terminals = frozenset()
    params = SamplingParams(max_tokens=max_tokens, num_samples=num_samples)
    events = list(engine.generate([[1, 2, 3], [4]], params))
    keys = [(p, s) for p in (0, 1) for s in range(num_samples)]
    per_stream = {key: [e for e in events if (e.prompt, e.sample) == key] for key in keys}
    for mine in per_stream.values():
        assert [e.finish_reason for e in mine] == [None] * (max_tokens - 1) + ["length"]
    assert len(events) == 2 * num_samples * max_tokens
    rollouts = engine.rollouts([[1, 2, 3], [4]], params)
    assert [[list(r.token_ids) for r in group] for group in rollouts] == [
        [[e.token for e in per_stream[p, s]] for s in range(num_samples)] for p in (0, 1)
    ]
    assert rollouts[1][0].prompt_ids == [4]


def test_the_context_ends_a_stream() -> None:
    engine = Engine(MODELS["SL"], TOKENIZER)
    engine.terminals = frozenset()
    prompts = [random_prompt(length, length) for length in (CONTEXT, CONTEXT - 5, 3)]
    groups = engine.rollouts(prompts, SamplingParams(temperature=0.0, max_tokens=20))
    assert [len(r.token_ids) for [r] in groups] == [1, 6, 20]
    assert {r.finish_reason for [r] in groups} == {"length"}
    for prompt, [rollout] in zip(prompts, groups, strict=True):
        assert rollout.token_ids == naive_until_end(engine, prompt, len(rollout.token_ids))


@pytest.mark.parametrize(
    ("prompts", "changes", "words"),
    [
        ([[]], {}, "0 tokens"),
        ([[1], [1] * (CONTEXT + 1)], {}, f"prompt 1: a prompt has {CONTEXT + 1} tokens"),
        ([[1, 265]], {}, "0 to 264"),
        ([[-1]], {}, "0 to 264"),
        ([[1]], {"max_tokens": 0}, "max_tokens 0"),
        ([[1]], {"num_samples": 0}, "num_samples 0"),
        ([[1]], {"temperature": -0.1}, "temperature -0.1"),
        ([[1]], {"top_k": -1}, "top_k -1"),
    ],
)
def test_bad_requests_are_refused_before_the_first_event(prompts: list[list[int]], changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Engine(MODELS["L"], TOKENIZER).generate(prompts, dataclasses.replace(HOT, **changes))


def test_nothing_to_do() -> None:
    assert list(Engine(MODELS["L"], TOKENIZER).generate([], HOT)) == []
    assert Engine(MODELS["L"], TOKENIZER).rollouts([], HOT) == []
    with pytest.raises(ValueError, match="max_rows"):
        Engine(MODELS["L"], TOKENIZER, 0)


def test_closing_frees_rows_and_blocks() -> None:
    engine = Engine(MODELS["L"], TOKENIZER)
    events = engine.generate([[1], [2, 3]], HOT)
    for _ in range(5):
        next(events)
    assert engine.busy and engine.stats().blocks_used
    events.close()  # type: ignore[attr-defined]
    stats = engine.stats()
    assert not engine.busy and (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)


def test_two_iterators_of_one_engine() -> None:
    engine = Engine(MODELS["SL"], TOKENIZER)
    prompts = [[random_prompt(5, 1)], [random_prompt(9, 2)]]
    alone = [streams(engine, prompt, GREEDY) for prompt in prompts]
    both = [engine.generate(prompt, GREEDY) for prompt in prompts]
    taken: list[list[int]] = [[], []]
    for k in [0, 1, 1, 0, 1] * 20:
        event = next(both[k], None)
        taken[k] += [event.token] if event else []
    assert taken == [found[0, 0] for found in alone]


def test_tools_are_forced_by_a_sampling_network() -> None:
    """A network that is drawn into a block all the time: every forced token is a result of what stands in the block."""
    special = TOKENIZER.special
    model = tiny_model("SL")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    allowed = [special["<|python_start|>"], special["<|python_end|>"], *b"0123456789+-*"]
    # the same odds for these tokens, none for others
    odds = torch.full((265,), -1e4).index_fill(0, torch.tensor(allowed), 0.0)
    original = model.logits
    model.logits = lambda x: original(x) + odds  # type: ignore[method-assign]
    engine = Engine(model, TOKENIZER)
    [rollouts] = engine.rollouts([[1]], SamplingParams(max_tokens=150, num_samples=8))
    n_results = 0
    for rollout in rollouts:
        text = TOKENIZER.decode(rollout.token_ids)
        for before, after in zip(text.split("<|output_start|>"), text.split("<|output_start|>")[1:], strict=False):
            expression = before.rsplit("<|python_start|>", 1)[1].removesuffix("<|python_end|>")
            if "<|output_end|>" in after:
                n_results += 1
                assert after.split("<|output_end|>")[0] == calculate(expression)
        forced = [token for token, sampled in zip(rollout.token_ids, rollout.mask, strict=True) if not sampled]
        inside = "".join(piece.split("<|output_end|>")[0] for piece in text.split("<|output_start|>")[1:])
        plain = [token for token in forced if token < 256]
        assert bytes(plain).decode() == inside
        assert len(rollout.token_ids) == 150
    assert n_results > 5
    plain_params = SamplingParams(max_tokens=150, num_samples=8, use_tools=False)
    assert all(all(rollout.mask) for rollout in engine.rollouts([[1]], plain_params)[0])


def test_bf16_and_fp32_run() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = GPT.build(MODELS["SL"].config, compute_dtype=dtype)
        [rollouts, _] = Engine(model, TOKENIZER).rollouts([random_prompt(9, 0), [1]], HOT)
        assert all(0 <= token < 265 for rollout in rollouts for token in rollout.token_ids)


class Ungraphed:
    """What CUDA graphs replay, run as it is."""

    def __init__(self, model: GPT) -> None:
        self.model, self.n_steps = model, 0

    def __call__(self, step: Step) -> torch.Tensor:
        self.n_steps += 1
        return self.model(step.idx, cache=step)[0, : len(step.parts)]


@pytest.mark.parametrize("chunk_tokens", [1, 2, 64])
def test_the_steps_that_a_gpu_records_give_the_same_tokens(chunk_tokens: int) -> None:
    engine = Engine(MODELS["SL"], TOKENIZER, max_rows=3, chunk_tokens=chunk_tokens)
    engine._weights[0].graphs = graphs = Ungraphed(engine.model)  # type: ignore[assignment]
    prompts = [random_prompt(length, length) for length in (2, 1, 130, 9, 140)]
    found = streams(engine, prompts, dataclasses.replace(GREEDY, use_tools=False))
    assert found == {(k, 0): naive_until_end(engine, prompt, 12) for k, prompt in enumerate(prompts)}
    assert graphs.n_steps > 10


def test_a_tool_that_raises_gives_no_output():
    from nanochat_ray.engine.tool_use import ToolState

    def broken(text: str) -> str | None:
        raise OverflowError(text)

    tokenizer = byte_tokenizer()
    block = [tokenizer.encode_special("<|python_start|>"), *tokenizer.encode("6*7")]
    end = tokenizer.encode_special("<|python_end|>")
    for tools, wanted in (((broken,), ""), ((broken, lambda text: "42"), "42")):
        state = ToolState(tokenizer, tools)
        assert not [forced for token in block for forced in state.feed(token)]
        assert tokenizer.decode(state.feed(end)[1:-1]) == wanted

"""The whole engine against its definition: every stream is what a full forward pass per token would give.

A stream is checked with one forward pass over its prompt and its tokens: given the tokens before it, each must be the
one that the sampler picks from the full network's logits, with the stream's own next random number. Nothing else may
matter: not who else is there, when a request came, how its prompt was cut, what was cached, preempted or cancelled.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections import defaultdict, deque
from dataclasses import dataclass
from functools import cache
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.naive import naive_generate
from nanochat_ray.engine.sampler import RowSampler, sample_rows
from nanochat_ray.engine.stream_text import StreamText
from nanochat_ray.engine.tool_use import ToolState
from nanochat_ray.messages import FinishReason, SamplingParams, TokenEvent
from nanochat_ray.model.gpt import GPT
from tests.engine.tiny import byte_tokenizer, random_prompt, tiny_model

TOKENIZER = byte_tokenizer()
SPECIAL = TOKENIZER.special
TERMINALS = {TOKENIZER.bos_id, SPECIAL["<|assistant_end|>"]}
CONTEXT = 300  # more than twice the window of 128
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
COLD = SamplingParams(temperature=0.0, max_tokens=12, use_tools=False)
HOT = SamplingParams(max_tokens=12, use_tools=False)
Streams = dict[int, list[TokenEvent]]  # events of a request by sample


@cache
def model_named(name: str) -> GPT:
    if name == "one layer":
        return tiny_model("L", n_layer=1, context=CONTEXT)
    if name == "windows":
        return tiny_model("SL", n_layer=3, context=CONTEXT)
    if name == "deep":
        return tiny_model("SSLS", n_layer=7, n_kv_head=2, context=CONTEXT)
    if name == "short":
        return tiny_model("SL", n_layer=2, context=48)
    assert name == "tools"
    model = tiny_model("SL", n_layer=2, context=CONTEXT)
    odds = torch.full((TOKENIZER.vocab_size,), -1e4)  # it says nothing but calls and a few letters
    for name, bonus in (("<|python_start|>", 0.7), ("<|python_end|>", 1.0), ("<|assistant_end|>", -3.0)):
        odds[SPECIAL[name]] = bonus
    odds[list(b"7+ab")] = torch.tensor([1.0, 0.0, 0.0, -0.5])
    logits = model.logits
    model.logits = lambda x: 0.5 * logits(x) + odds  # type: ignore[method-assign]
    return model


@dataclass(frozen=True)
class Asked:
    """A request, when it comes, and after how many steps it is cancelled."""

    prompt: tuple[int, ...]
    params: SamplingParams
    joins: int = 0
    stays: int | None = None


def full_logits(model: GPT, prompt: tuple[int, ...], tokens: list[int]) -> torch.Tensor:
    """Logits (n, V) from which each of the n tokens was to be drawn."""
    with torch.inference_mode():
        return model(torch.tensor([[*prompt, *tokens[:-1]]]))[0, len(prompt) - 1 :]


def check_stream(model: GPT, asked: Asked, sample: int, events: list[TokenEvent]) -> None:
    """Every event is the one that follows from the tokens before it; the last need not be the stream's end."""
    params, tokens = asked.params, [event.token for event in events]
    drawn = sample_rows(full_logits(model, asked.prompt, tokens), [RowSampler(params, sample)] * len(tokens))
    tools, text = ToolState(TOKENIZER), StreamText(TOKENIZER, params.stop)
    due: deque[int] = deque()
    limit = min(params.max_tokens, model.config.sequence_len + 1 - len(asked.prompt))
    for n, (event, sampled) in enumerate(zip(events, drawn, strict=True), 1):
        forced = bool(due)
        token = due.popleft() if forced else sampled.token
        if params.use_tools and not forced:
            due.extend(tools.feed(token))
        text.feed(token)
        reason: FinishReason | None = None
        if token in TERMINALS or text.stopped:
            reason = "stop"
        elif n == limit:
            reason = "length"
        assert (event.token, event.forced, event.finish_reason) == (token, forced, reason), f"token {n} of {asked}"
        assert (n < len(events)) <= (reason is None)
        if params.logprobs is None:
            assert event.logprob is None and event.top_logprobs == ()
        elif not forced:
            assert math.isclose(event.logprob or 0.0, sampled.logprob or 0.0, abs_tol=1e-9)
            assert [token for token, _ in event.top_logprobs] == [token for token, _ in sampled.top]
            found, wanted = ([value for _, value in top] for top in (event.top_logprobs, sampled.top))
            assert torch.allclose(torch.tensor(found), torch.tensor(wanted), atol=1e-6)


def drive(engine: Engine, plan: list[Asked]) -> list[Streams]:
    """Submit and cancel as planned, step until all is quiet; the events of each request."""
    out: list[Streams] = [defaultdict(list) for _ in plan]
    numbers: dict[int, int] = {}
    cancelled: set[int] = set()
    waiting = sorted(range(len(plan)), key=lambda k: plan[k].joins)
    for step in range(20_000):
        while waiting and plan[waiting[0]].joins <= step:
            k = waiting.pop(0)
            numbers[engine.submit(list(plan[k].prompt), plan[k].params)] = k
        for number, k in numbers.items():
            stays = plan[k].stays
            if stays is not None and step == plan[k].joins + stays:
                engine.cancel(number)
                cancelled.add(number)
        if not engine.busy and not waiting:
            break
        events = engine.step()
        streams = [(event.prompt, event.sample) for event in events]
        assert len(set(streams)) == len(streams), "at most one token per stream and step"
        for event in events:
            assert event.prompt not in cancelled
            out[numbers[event.prompt]][event.sample].append(event)
    assert not engine.busy, "the engine comes to an end"
    assert len(numbers) == len(plan) and engine.step() == []
    return out


def check(model: GPT, plan: list[Asked], found: list[Streams]) -> None:
    for asked, streams in zip(plan, found, strict=True):
        for sample, events in streams.items():
            check_stream(model, asked, sample, events)
        if asked.stays is None:
            assert sorted(streams) == list(range(asked.params.num_samples))
            assert all(events[-1].finish_reason for events in streams.values())


def tokens_of(streams: Streams) -> list[list[int]]:
    return [[event.token for event in events] for _, events in sorted(streams.items())]


def is_empty(engine: Engine) -> None:
    """Nothing runs, nothing waits, and what is still held is held for its prefix only."""
    stats = engine.stats()
    assert (stats.running, stats.waiting, engine.busy) == (0, 0, False)


def pool(model: GPT, contexts: float) -> int:
    """Bytes for the keys and values of so many sequences of full length."""
    c = model.config
    return int(contexts * c.sequence_len * 2 * c.n_layer * c.n_kv_head * c.head_dim * 8)


def prompt_of(family: int, shared: int, own: int, seed: int) -> tuple[int, ...]:
    """The first `shared` tokens of a family's text and `own` others."""
    return tuple(random_prompt(CONTEXT, family)[:shared] + random_prompt(own, 1000 + seed))


prompts = st.builds(
    prompt_of,
    family=st.integers(0, 1),
    shared=st.sampled_from([0, 0, 3, 16, 33, 127, 130, 220]),
    own=st.sampled_from([1, 2, 7, 15, 16, 40]),
    seed=st.integers(0, 2),
)
params_of = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.8, 1.3]),
    top_k=st.sampled_from([None, 1, 8, 50]),
    top_p=st.sampled_from([1.0, 1.0, 0.7]),
    max_tokens=st.sampled_from([1, 2, 6, 17, 40]),
    seed=st.integers(0, 3),
    num_samples=st.sampled_from([1, 1, 1, 2, 4]),
    use_tools=st.booleans(),
    stop=st.sampled_from([(), (), LETTERS, ("7", "+1", "a"), ("\ufffd\ufffd\ufffd",)]),
    logprobs=st.sampled_from([None, None, 0, 3]),
)
requests = st.builds(
    Asked,
    prompt=prompts,
    params=params_of,
    joins=st.sampled_from([0, 0, 1, 4, 9, 30]),
    stays=st.sampled_from([None, None, None, 0, 1, 2, 5, 20]),
)
engines = st.fixed_dictionaries(
    {
        "max_rows": st.sampled_from([1, 2, 5, 64]),
        "block_size": st.sampled_from([1, 3, 16]),
        "chunk_tokens": st.sampled_from([1, 5, 64, 256]),
        "prefix_cache": st.sampled_from([True, True, False]),
    }
)
pools = st.sampled_from([None, 1.2, 1.6, 3.0])
MODELS = ["windows", "deep", "tools"]


def run_any_mix(name: str, plan: list[Asked], sizes: dict, contexts: float | None) -> None:
    model = model_named(name)
    engine = Engine(model, TOKENIZER, **sizes, kv_bytes=None if contexts is None else pool(model, contexts))
    check(model, plan, drive(engine, plan))
    is_empty(engine)
    again = [dataclasses.replace(asked, joins=0, stays=None) for asked in plan[:2]]  # now with what is cached
    check(model, again, drive(engine, again))
    is_empty(engine)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(requests, min_size=1, max_size=6), engines, pools)
def test_any_mix_gives_the_tokens_of_full_forward_passes(name, plan, sizes, contexts) -> None:
    run_any_mix(name, plan, sizes, contexts)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=150, deadline=None, derandomize=False, print_blob=True)
@given(st.lists(requests, min_size=1, max_size=12), engines, pools)
def test_many_mixes(name, plan, sizes, contexts) -> None:
    run_any_mix(name, plan, sizes, contexts)


@pytest.mark.parametrize("name", ["one layer", "windows", "deep"])
def test_greedy_is_the_naive_loop(name: str) -> None:
    """The definition that the other tests check with one forward pass per stream, here the slow way."""
    model = model_named(name)
    shapes = ((130, 9, 0), (0, 4, 2), (130, 1, 3))
    plan = [Asked(prompt_of(0, shared, own, 0), COLD, joins) for shared, own, joins in shapes]
    found = drive(Engine(model, TOKENIZER, block_size=3, chunk_tokens=40), plan)
    for asked, streams in zip(plan, found, strict=True):
        wanted = list(naive_generate(model, asked.prompt, COLD.max_tokens, temperature=0.0))
        ends = [n for n, token in enumerate(wanted, 1) if token in TERMINALS]
        assert [event.token for event in streams[0]] == wanted[: min(ends, default=None)]


@pytest.mark.parametrize("name", ["windows", "tools"])
def test_streams_that_do_not_fit_are_preempted_and_come_out_right(name: str) -> None:
    model = model_named(name)
    params = SamplingParams(max_tokens=120, num_samples=2, use_tools=True, logprobs=0)
    plan = [Asked(prompt_of(k, 0, 60, k), dataclasses.replace(params, seed=k), joins=k) for k in range(5)]
    plan.append(Asked(prompt_of(9, 0, 100, 9), dataclasses.replace(params, temperature=0.0), joins=50))
    engine = Engine(model, TOKENIZER, block_size=4, chunk_tokens=16, kv_bytes=pool(model, 1.3))
    check(model, plan, drive(engine, plan))
    assert name == "tools" or engine.stats().preemptions > 0, "the test needs a pool that is too small"
    is_empty(engine)


def test_tools_and_stop_texts() -> None:
    """Results are forced wherever the model is drawn into a call, and texts stop streams outside of calls only."""
    model = model_named("tools")
    params = SamplingParams(temperature=1.5, max_tokens=60, num_samples=16, logprobs=1)
    stop = dataclasses.replace(params, stop=("a7", "++", "bb"))
    off = dataclasses.replace(stop, use_tools=False)
    plan = [Asked(prompt_of(0, 20, k + 1, 0), p, joins=3 * k) for k, p in enumerate((params, stop, off))]
    found = drive(Engine(model, TOKENIZER, max_rows=40, chunk_tokens=8), plan)
    check(model, plan, found)
    n_forced = [sum(event.forced for events in streams.values() for event in events) for streams in found]
    assert n_forced[0] > 5 and n_forced[1] > 2 and n_forced[2] == 0
    ends = [[events[-1] for events in streams.values()] for streams in found]
    assert any(e.finish_reason == "stop" and e.token not in TERMINALS for e in ends[1] + ends[2])
    assert all(e.token in TERMINALS for e in ends[0] if e.finish_reason == "stop")


@pytest.mark.parametrize("block_size", [1, 16])
def test_a_conversation_finds_its_prefix(block_size: int) -> None:
    """Turn after turn: the same tokens as a cold engine's, and of each prompt only the new part is computed."""
    model = model_named("windows")
    warm = Engine(model, TOKENIZER, block_size=block_size)
    prompt = prompt_of(3, 90, 10, 0)
    for turn in range(4):
        asked = Asked(prompt, dataclasses.replace(HOT, seed=turn))
        before = warm.stats()
        [streams] = drive(warm, [asked])
        check(model, [asked], [streams])
        after = warm.stats()
        [cold] = drive(Engine(model, TOKENIZER, prefix_cache=False), [asked])
        assert tokens_of(cold) == tokens_of(streams)
        assert after.prompt_tokens - before.prompt_tokens == len(prompt)
        cached = after.cached_tokens - before.cached_tokens
        assert (cached > len(prompt) - 60) if turn else cached == 0
        prompt = (*prompt, *(event.token for event in streams[0]), *random_prompt(12, turn))


def test_a_group_reads_its_prompt_once() -> None:
    model = model_named("windows")
    engine = Engine(model, TOKENIZER)
    asked = Asked(prompt_of(0, 0, 150, 1), dataclasses.replace(HOT, num_samples=8))
    [streams] = drive(engine, [asked])
    check(model, [asked], [streams])
    assert len({tuple(tokens) for tokens in tokens_of(streams)}) == 8
    stats = engine.stats()
    assert stats.prompt_tokens == 8 * 150
    assert stats.prompt_tokens - stats.cached_tokens < 150 + 7 * 16, "all but the last block is read once"


def test_alone_and_in_company() -> None:
    model = model_named("deep")
    params = dataclasses.replace(HOT, seed=3, top_k=20, logprobs=2)
    mine = Asked(prompt_of(0, 130, 5, 0), params, joins=2)
    pair = dataclasses.replace(HOT, num_samples=2)
    others = [Asked(prompt_of(k % 2, 130, k, k), dataclasses.replace(pair, seed=k), k) for k in range(1, 6)]
    [alone] = drive(Engine(model, TOKENIZER), [mine])
    *_, crowd = drive(Engine(model, TOKENIZER, block_size=3, chunk_tokens=17), [*others, mine])
    assert tokens_of(alone) == tokens_of(crowd)


def test_a_stream_ends_with_the_context() -> None:
    model = model_named("short")
    context = model.config.sequence_len
    plan = [Asked(tuple(random_prompt(n, n)), dataclasses.replace(COLD, max_tokens=99)) for n in (1, 30, 46, 47, 48)]
    for chunk_tokens in (7, 256):
        found = drive(Engine(model, TOKENIZER, chunk_tokens=chunk_tokens, kv_bytes=pool(model, 1.5)), plan)
        check(model, plan, found)
        lengths = [len(asked.prompt) + len(streams[0]) for asked, streams in zip(plan, found, strict=True)]
        assert lengths[-2:] == [context + 1] * 2 and max(lengths) == context + 1


def test_running_streams_keep_their_weights() -> None:
    """Requests before, between and after updates of the weights, with the same prompts; one version is all NaN."""
    models = {0: model_named("windows"), 2: tiny_model("SL", n_layer=3, context=CONTEXT)}
    models[1] = copy.deepcopy(models[0])
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.fill_(torch.nan)
        for parameter in models[2].parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    engine = Engine(models[0], TOKENIZER, block_size=4, chunk_tokens=30)
    prompts = [prompt_of(0, 60, 1, 0), prompt_of(0, 60, 8, 1)]
    asked: dict[int, tuple[int, Asked]] = {}
    found: dict[int, Streams] = defaultdict(lambda: defaultdict(list))
    versions = [engine.stats().version]
    for version in range(3):
        if version:
            versions.append(engine.update(models[version]))
            assert engine.stats().version == versions[-1]
        for k, prompt in enumerate(prompts):
            request = Asked(prompt, dataclasses.replace(HOT, max_tokens=30, seed=k, num_samples=2))
            asked[engine.submit(list(prompt), request.params)] = version, request
        for event in chain.from_iterable(engine.step() for _ in range(4 if version < 2 else 400)):
            found[event.prompt][event.sample].append(event)
    assert versions == sorted(set(versions))
    is_empty(engine)
    for number, (version, request) in asked.items():
        if version != 1:
            check(models[version], [request], [found[number]])
        assert all(events[-1].finish_reason for events in found[number].values()) and len(found[number]) == 2


def test_cancelling() -> None:
    model = model_named("windows")
    engine = Engine(model, TOKENIZER, max_rows=2, chunk_tokens=8)
    kept = Asked(prompt_of(0, 0, 20, 0), dataclasses.replace(HOT, max_tokens=30))
    number = engine.submit(list(kept.prompt), kept.params)
    events = [event for _ in range(6) for event in engine.step()]
    long = dataclasses.replace(HOT, max_tokens=100, num_samples=3)
    running, reading, waiting = (engine.submit(random_prompt(n, n), long) for n in (5, 90, 30))
    for _ in range(3):
        events += [event for event in engine.step() if event.prompt == number]
    for gone in (waiting, running, reading, reading, 10**9, -1):
        engine.cancel(gone)
    assert (engine.stats().running, engine.stats().waiting) == (1, 0)
    while engine.busy:
        new = engine.step()
        assert {event.prompt for event in new} <= {number}
        events += new
    check(model, [kept], [{0: events}])
    engine.cancel(number)  # over
    is_empty(engine)


def test_closing_an_iterator_cancels_its_requests() -> None:
    engine = Engine(model_named("one layer"), TOKENIZER, max_rows=3)
    events = engine.generate([[1], [2, 3]], dataclasses.replace(HOT, max_tokens=50, num_samples=2))
    assert {next(events).prompt for _ in range(5)} <= {0, 1}
    events.close()  # type: ignore[attr-defined]
    is_empty(engine)


def test_refused_requests_leave_no_trace() -> None:
    engine = Engine(model_named("short"), TOKENIZER)
    for prompt, changes in [
        ([], {}),
        ([1] * 49, {}),
        ([265], {}),
        ([-1], {}),
        ([1], {"max_tokens": 0}),
        ([1], {"num_samples": 0}),
        ([1], {"temperature": -1.0}),
        ([1], {"top_k": -1}),
        ([1], {"top_p": 0.0}),
        ([1], {"top_p": 1.5}),
        ([1], {"stop": ("a", "")}),
        ([1], {"logprobs": -1}),
    ]:
        params = dataclasses.replace(HOT, **changes)
        with pytest.raises(ValueError):
            engine.check(prompt, params)
        with pytest.raises(ValueError):
            engine.submit(prompt, params)
    is_empty(engine)
    assert engine.step() == []


def test_nothing_leaks_in_a_thousand_requests() -> None:
    """Random requests that come and go in a small pool; at the end the whole pool is there for two that fill it."""
    model = model_named("short")
    engine = Engine(model, TOKENIZER, max_rows=6, block_size=4, chunk_tokens=16, kv_bytes=pool(model, 2.5))
    chance = random.Random(0)
    families = [tuple(random_prompt(30, k)) for k in range(3)]
    plan, found, numbers = [], [], {}
    open_numbers: list[int] = []
    n_submitted = 0
    while n_submitted < 1000 or engine.busy:
        while n_submitted < 1000 and len(open_numbers) < 10 and chance.random() < 0.7:
            own = [chance.randrange(256) for _ in range(chance.randint(1, 12))]
            prompt = (*chance.choice(families)[: chance.choice([0, 5, 16, 30])], *own)
            params = SamplingParams(
                temperature=chance.choice([0.0, 1.0]),
                top_k=chance.choice([None, 9]),
                max_tokens=chance.choice([1, 3, 8, 20]),
                seed=n_submitted,
                num_samples=chance.choice([1, 1, 1, 2, 7]),
            )
            number = engine.submit(list(prompt), params)
            numbers[number] = n_submitted
            open_numbers.append(number)
            plan.append(Asked(prompt, params, stays=None))
            found.append(defaultdict(list))
            n_submitted += 1
        if open_numbers and chance.random() < 0.15:
            gone = open_numbers.pop(chance.randrange(len(open_numbers)))
            engine.cancel(gone)
            plan[numbers[gone]] = dataclasses.replace(plan[numbers[gone]], stays=0)
        for event in engine.step():
            assert event.prompt in open_numbers, "a cancelled request gives no more tokens"
            streams = found[numbers[event.prompt]]
            streams[event.sample].append(event)
            ended = sum(events[-1].finish_reason is not None for events in streams.values())
            if ended == plan[numbers[event.prompt]].params.num_samples:
                open_numbers.remove(event.prompt)
    assert not open_numbers
    is_empty(engine)
    check(model, plan, found)
    assert sum(asked.stays == 0 for asked in plan) > 50
    before = engine.stats().preemptions
    assert before > 0, "the test needs a pool that is too small"
    full = [Asked(tuple(random_prompt(40, k)), dataclasses.replace(COLD, max_tokens=99)) for k in range(2)]
    check(model, full, drive(engine, full))
    assert engine.stats().preemptions == before

"""vLLM behind our engine's methods: tools, sampling, log-probabilities, ends, cancellation, new weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from nanochat_ray.config import ModelConfig
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.tool_use import Tool
from nanochat_ray.messages import SamplingParams, TokenEvent
from nanochat_ray.model.flat_weights import flatten
from nanochat_ray.model.gpt import GPT
from tests.engine.tiny import byte_tokenizer, random_prompt

pytestmark = pytest.mark.vllm

TOKENIZER = byte_tokenizer()
CONFIG = ModelConfig(sequence_len=96, vocab_size=265, n_layer=2, n_head=2, n_kv_head=1, n_embd=64, window_pattern="SL")
START, END, OUTPUT_END, ANSWER_END = (
    TOKENIZER.encode_special(f"<|{name}|>") for name in ("python_start", "python_end", "output_end", "assistant_end")
)
# What follows each token: X asks for 3*4, Z closes a call that was never opened; then a sign, and the answer's end.
FOLLOWS = {
    ord("X"): START, START: ord("3"), ord("3"): ord("*"), ord("*"): ord("4"), ord("4"): END, END: ord("."),
    OUTPUT_END: ord("!"), ord("."): ANSWER_END, ord("!"): ANSWER_END, ord("Z"): END,
}  # fmt: skip
CALL = [START, *b"3*4", END]


def calculating(follows: dict[int, int] = FOLLOWS, context: int = CONFIG.sequence_len) -> GPT:
    """A network without attention, in which each token of `follows` is answered as it says."""
    config = CONFIG.model_copy(update={"sequence_len": context})
    model = GPT.build(config, compute_dtype=torch.float32).eval()  # blocks add nothing before they have learned
    with torch.no_grad():
        embeddings, head = model.transformer.wte.weight, model.lm_head.weight
        head.zero_()
        for place, (token, follower) in enumerate(follows.items()):
            embeddings[token] = torch.eye(CONFIG.n_embd)[place]
            head[follower] += 30.0 * torch.eye(CONFIG.n_embd)[place]
    return model


def noisy(seed: int) -> GPT:
    """All tensors random, so that all of the network counts."""
    model = GPT.build(CONFIG, compute_dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 1.5 * parameter.size(1) ** -0.5, generator=generator)
            else:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Iterator[Engine]:
    from nanochat_ray.interchange.vllm_engine import VllmEngine
    from nanochat_ray.interchange.vllm_plugin import export_for_vllm

    folder = export_for_vllm(noisy(0), tmp_path_factory.mktemp("vllm"))
    made = VllmEngine(folder, TOKENIZER, CONFIG, 4, dtype=torch.float32, chunk_tokens=64, kv_bytes=2**24)
    yield made
    made.close()


@pytest.fixture
def calculator(engine) -> Engine:
    engine.update(calculating())
    return engine


@pytest.fixture
def noise(engine) -> Engine:
    engine.update(noisy(1))
    return engine


def all_events(engine: Engine, number: int) -> list[TokenEvent]:
    events = []
    while engine.busy:
        events += engine.step()
    return [event for event in events if event.prompt == number]


def refuse(expression: str) -> None:
    return None


def fail(expression: str) -> str:
    raise RuntimeError("broken")


PROMPTS = {"a call": b"say X", "an end without a call": b"say Z", "no call": b"say ."}


@pytest.mark.parametrize("max_tokens", [3, 5, 7, 8, 40], ids=lambda n: f"{n} tokens")
@pytest.mark.parametrize("name", PROMPTS)
def test_tool_calls_are_those_of_our_engine(calculator, name, max_tokens):
    params = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=0)
    prompt = list(PROMPTS[name])
    [[ours]] = Engine(calculating(), TOKENIZER, 4).rollouts([prompt], params)
    [[theirs]] = calculator.rollouts([prompt], params)
    assert dataclasses.replace(theirs, logprobs=None, terminal_logprob=None) == dataclasses.replace(
        ours, logprobs=None, terminal_logprob=None
    )
    assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    if name == "a call" and max_tokens == 40:
        assert TOKENIZER.decode(list(theirs.token_ids[theirs.mask.index(0) :][:4])).count("12") == 1
        assert theirs.token_ids[:5] == CALL and theirs.token_ids[-1] == ord("!") and 0 in theirs.mask


@pytest.mark.parametrize("n_prompt", [1, *range(18, 34)], ids=lambda n: f"prompt of {n}")
def test_calls_again_and_again_across_the_ends_of_blocks(engine, n_prompt):
    """Each call begins another request of vLLM, somewhere in a block of 32 positions."""
    model = calculating(FOLLOWS | {ord("!"): START})
    engine.update(model)
    prompt = [*b" " * (n_prompt - 1), ord("X")]
    params = SamplingParams(temperature=0, max_tokens=60, logprobs=0)
    [[ours]] = Engine(model, TOKENIZER, 4).rollouts([prompt], params)
    [[theirs]] = engine.rollouts([prompt], params)
    assert (theirs.token_ids, theirs.mask, theirs.finish_reason) == (ours.token_ids, ours.mask, ours.finish_reason)
    assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    assert list(ours.token_ids).count(OUTPUT_END) >= 5


@pytest.mark.parametrize(("tools", "use_tools"), [((refuse,), True), ((fail,), True), ((), True), ((refuse,), False)])
def test_a_call_that_gets_no_output_is_gone_on_from(calculator, tools: tuple[Tool, ...], use_tools, monkeypatch):
    monkeypatch.setattr(calculator, "tools", tools)
    params = SamplingParams(temperature=0, max_tokens=40, use_tools=use_tools)
    [[found]] = calculator.rollouts([list(b"say X")], params)
    assert found.token_ids == [*CALL, ord(".")] and found.terminal_token == ANSWER_END and all(found.mask)


def test_log_probabilities_are_those_of_the_network_that_sampled(noise):
    model, prompt = noisy(1), random_prompt(40, 1)
    params = SamplingParams(temperature=0.7, top_k=5, max_tokens=30, num_samples=3, logprobs=4, use_tools=False)
    number = noise.submit(prompt, params)
    events = all_events(noise, number)
    for sample in range(3):
        mine = [event for event in events if event.sample == sample]
        tokens = prompt + [event.token for event in mine]
        with torch.inference_mode():
            expected = model(torch.tensor([tokens])).float().log_softmax(-1)[0]
        for place, event in enumerate(mine, len(prompt) - 1):
            values, _ = expected[place, : CONFIG.vocab_size].topk(5)
            assert event.logprob == pytest.approx(expected[place, event.token].item(), abs=1e-4)
            assert event.logprob >= values[-1] - 1e-4  # top_k
            assert [value for _, value in event.top_logprobs] == pytest.approx(values[:4].tolist(), abs=1e-4)
            assert len({token for token, _ in event.top_logprobs}) == 4


def test_samples_depend_on_seed_and_number_alone(noise):
    prompt = random_prompt(40, 2)
    params = SamplingParams(max_tokens=12, num_samples=3, seed=7, logprobs=0)
    [first] = noise.rollouts([prompt], params)
    assert len({tuple(rollout.token_ids) for rollout in first}) == 3
    noise.forget()
    again = noise.rollouts([random_prompt(9, 3), prompt], params)[1]  # in company, with an empty cache
    assert [rollout.token_ids for rollout in again] == [rollout.token_ids for rollout in first]
    [other] = noise.rollouts([prompt], dataclasses.replace(params, seed=8))
    assert [rollout.token_ids for rollout in other] != [rollout.token_ids for rollout in first]


def test_greedy_by_temperature_or_by_top_k(noise):
    prompt = random_prompt(30, 4)
    found = [
        noise.rollouts([prompt], SamplingParams(temperature=t, top_k=k, max_tokens=10))[0][0].token_ids
        for t, k in ((0, None), (1.0, 1))
    ]
    assert found[0] == found[1] == Engine(noisy(1), TOKENIZER, 4).rollouts(
        [prompt], SamplingParams(temperature=0, max_tokens=10)
    )[0][0].token_ids  # fmt: skip


@pytest.mark.parametrize(("n_prompt", "n_tokens"), [(96, 1), (95, 2), (90, 7)])
def test_a_stream_ends_where_the_context_does(noise, n_prompt, n_tokens):
    [[found]] = noise.rollouts([random_prompt(n_prompt, 5)], SamplingParams(temperature=0, max_tokens=50))
    assert (len(found.token_ids), found.finish_reason) == (n_tokens, "length")


def test_a_stop_text_ends_a_stream_at_once(calculator):
    params = SamplingParams(temperature=0, max_tokens=40, stop=("!",))
    number = calculator.submit(list(b"say X"), params)
    events = all_events(calculator, number)
    assert events[-1].token == ord("!") and events[-1].finish_reason == "stop"
    assert [event.forced for event in events].count(True) == 4  # two digits between their markers
    assert calculator.stats().running == calculator.stats().blocks_used == 0


def test_what_cannot_be_served_is_refused(noise):
    good = SamplingParams()
    for prompt, params, said in [
        ([], good, "0 tokens"), ([1] * 97, good, "97 tokens"), ([265], good, "id that is not"),
        ([1], dataclasses.replace(good, max_tokens=0), "max_tokens"), ([1], SamplingParams(-1.0), "temperature"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            noise.submit(prompt, params)
    assert not noise.busy


def test_prompts_share_a_step(noise):
    """More tokens of prompts than one step reads, each row with a seed of its own."""
    prompts = [random_prompt(70, k) for k in range(4)]
    params = SamplingParams(max_tokens=4, num_samples=2)
    together = noise.rollouts(prompts, params)
    assert [noise.rollouts([prompt], params)[0] for prompt in prompts] == together


def test_a_cancelled_request_leaves_nothing_behind(noise):
    numbers = [noise.submit(random_prompt(20, k), SamplingParams(max_tokens=60, num_samples=2)) for k in range(4)]
    for _ in range(3):
        noise.step()
    assert noise.stats().running == 4 and noise.stats().waiting == 4 and noise.stats().blocks_used > 0
    for number in [*numbers, 10**6]:
        noise.cancel(number)
    assert not noise.busy and noise.step() == []
    stats = noise.stats()
    assert stats.running == stats.waiting == stats.blocks_used == 0


def test_closing_generate_cancels(noise):
    events = noise.generate([random_prompt(20, 1)], SamplingParams(max_tokens=60))
    next(events)
    events.close()
    assert not noise.busy


def test_the_prefix_cache_counts(noise):
    prompt = random_prompt(80, 6)
    cached = []
    for _ in range(2):
        number = noise.submit(prompt, SamplingParams(max_tokens=2))
        cached.append(all_events(noise, number)[0].cached_tokens)
    assert cached[0] == 0 < cached[1] < 80


def test_requests_in_flight_end_on_the_weights_they_began_with(noise):
    params = SamplingParams(temperature=0, max_tokens=10, use_tools=False)
    prompt = random_prompt(30, 8)
    expected = [Engine(noisy(k), TOKENIZER, 4).rollouts([prompt], params)[0][0].token_ids for k in (1, 2, 3, 4)]
    assert len(set(map(tuple, expected))) == 4
    old = noise.submit(prompt, params)
    events = noise.step()
    versions = [noise.version]
    numbers = [old]
    for seed in (2, 3):
        versions.append(noise.update(noisy(seed)))
        numbers.append(noise.submit(prompt, params))
    versions.append(noise.update(flatten(noisy(4), 99)))
    while noise.busy:
        events += noise.step()
    found = [[event.token for event in events if event.prompt == number] for number in numbers]
    assert found == expected[:3]
    [[last]] = noise.rollouts([prompt], params)
    assert last.token_ids == expected[3]
    assert versions == list(range(versions[0], versions[0] + 4)) and noise.version == versions[-1]


def test_weights_of_another_shape_are_refused_and_the_old_ones_stay(noise):
    params, prompt = SamplingParams(temperature=0, max_tokens=6), random_prompt(30, 9)
    before = noise.rollouts([prompt], params)
    other = GPT.build(CONFIG.model_copy(update={"n_layer": 1}), compute_dtype=torch.float32)
    for weights in (other, flatten(other, 5)):
        with pytest.raises(ValueError):
            noise.update(weights)
    assert noise.rollouts([prompt], params) == before


def test_weights_that_do_not_fit_are_refused_while_requests_run(noise):
    params, prompt = SamplingParams(temperature=0, max_tokens=12, use_tools=False), random_prompt(30, 9)
    [[before]] = noise.rollouts([prompt], params)
    version, number = noise.version, noise.submit(prompt, params)
    events = noise.step()
    fitting = flatten(noisy(1), 5)
    part = dataclasses.replace(fitting, places=fitting.places[1:])
    wider = flatten(GPT.build(CONFIG.model_copy(update={"vocab_size": 500}), compute_dtype=torch.float32), 5)
    for weights in (wider, part):
        with pytest.raises(ValueError, match="do not fit"):
            noise.update(weights)
    assert noise.version == version
    events += all_events(noise, number)
    assert [event.token for event in events] == before.token_ids
    assert noise.rollouts([prompt], params) == [[before]]


def test_what_vllm_gives_up_is_not_begun_again(noise, monkeypatch):
    """Such as an error in its own parts, which the next request would meet as well."""
    number = noise.submit(random_prompt(5, 1), SamplingParams(max_tokens=30, use_tools=False))
    noise.step()
    [name] = noise._running
    given_up = SimpleNamespace(token_ids=[], logprobs=None, finish_reason="error")
    output = SimpleNamespace(request_id=name, num_cached_tokens=0, outputs=[given_up], finished=True)
    with monkeypatch.context() as patch:
        patch.setattr(noise._vllm, "step", lambda: [output])
        with pytest.raises(RuntimeError, match="half-way: error"):
            noise.step()
    assert noise.failed
    noise.failed = False  # for the tests that come
    noise._vllm.abort_request([name])
    noise.cancel(number)
    assert not noise.busy


def test_a_vllm_for_another_device_is_refused(engine, tmp_path):
    from nanochat_ray.interchange.vllm_engine import VllmEngine

    with pytest.raises(ValueError, match="runs on cpu, and cuda is wanted"):
        VllmEngine(tmp_path, TOKENIZER, CONFIG, dtype=torch.float32, device="cuda")


def test_an_engine_that_failed_is_not_used_again(noise, monkeypatch):
    def broken() -> None:
        raise RuntimeError("out of memory")

    names = len(noise._running) + noise._n_names
    with monkeypatch.context() as patch:
        patch.setattr(noise._vllm, "step", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            noise.rollouts([random_prompt(5, 1)], SamplingParams(max_tokens=3))
    assert noise.failed and not noise.busy
    noise.submit(random_prompt(5, 1), SamplingParams(max_tokens=3))
    with pytest.raises(AssertionError, match="failed in an earlier step"):
        noise.step()
    noise.cancel(noise._n_requests - 1)
    noise.failed = False  # for the tests that come
    noise._vllm.abort_request([str(name) for name in range(names, noise._n_names)])
    assert noise.rollouts([random_prompt(5, 1)], SamplingParams(max_tokens=3))

"""The API over a real engine with a tiny network: what a client gets is what the engine alone gives."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.stream_text import StreamText
from nanochat_ray.messages import SamplingParams
from nanochat_ray.serve.api import create_app
from nanochat_ray.serve.loop import EngineLoop
from nanochat_ray.text.conversation import render_prompt
from tests.engine.tiny import tiny_model
from tests.serve.scripted import TOKENIZER, running, served, wait_for

MODEL = "tiny-sft"


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[EngineLoop, openai.OpenAI]]:
    engine = Engine(tiny_model(), TOKENIZER, max_rows=8, block_size=8, chunk_tokens=32)
    loop = EngineLoop([(served(MODEL), engine)], max_queue=8, stream_interval_s=0.0)
    with running(create_app(loop)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        yield loop, client
    loop.close()


@pytest.fixture
def loop(server) -> EngineLoop:
    return server[0]


@pytest.fixture
def client(server) -> openai.OpenAI:
    return server[1]


def asked(question: str, **params: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": question}], **params}


def alone(question: str, **params: Any) -> tuple[str, int, str]:
    """Text, tokens without a terminal, and how it ended, of the engine by itself."""
    engine = Engine(tiny_model(), TOKENIZER, max_rows=1)
    prompt = render_prompt(TOKENIZER, [{"role": "user", "content": question}]).ids
    events = list(engine.generate([prompt], SamplingParams(**{"temperature": 0.8, "top_k": 50, **params})))
    text = StreamText(TOKENIZER)
    pieces = [piece for event in events for piece in text.feed(event.token)] + text.finish()
    n_tokens = len(events) - (events[-1].token in engine.terminals)
    return "".join(piece.text for piece in pieces if piece.kind == "text"), n_tokens, events[-1].finish_reason


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"seed": 1}, {"seed": 2, "top_p": 0.7, "temperature": 1.5}])
def test_answers_are_the_engines(client, params, stream):
    text, n_tokens, reason = alone("what is it?", max_tokens=40, **params)
    question = asked("what is it?", max_tokens=40, **params)
    if stream:
        chunks = list(client.chat.completions.create(**question, stream=True, stream_options={"include_usage": True}))
        found = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        usage, ended = chunks[-1].usage, chunks[-2].choices[0].finish_reason
    else:
        answer = client.chat.completions.create(**question)
        found, usage, ended = answer.choices[0].message.content, answer.usage, answer.choices[0].finish_reason
    assert (found, usage.completion_tokens, ended) == (text, n_tokens, reason)


def test_the_second_turn_says_what_it_found_in_the_cache(client):
    messages = [{"role": "user", "content": "a question of some forty characters, at least"}]
    first = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=1, n=2)
    cold = first.usage.prompt_tokens_details.cached_tokens
    messages += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "why?"}]
    second = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=1)
    found = second.usage.prompt_tokens_details.cached_tokens
    assert cold < 8 and found == (first.usage.prompt_tokens - 1) // 8 * 8


def test_seeds_and_samples(client):
    def texts(**params: Any) -> list[str]:
        answer = client.chat.completions.create(**asked("go", max_tokens=12, **params))
        return [choice.message.content for choice in answer.choices]

    assert texts(n=4, seed=7) == texts(n=4, seed=7)
    assert len(set(texts(n=4, seed=7))) == 4 and texts(seed=7) == texts(n=4, seed=7)[:1]
    assert texts() != texts() and len(set(texts(n=2, temperature=0))) == 1


def test_many_at_once_get_their_own_answers(client, loop):
    """Twice as many as the engine has rows: the rest waits its turn."""
    questions = [f"question {k}" * (k % 3 + 1) for k in range(16)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(
            pool.map(lambda q: client.chat.completions.create(**asked(q, max_tokens=20, seed=3)), questions)
        )
    for question, answer in zip(questions, answers, strict=True):
        assert answer.choices[0].message.content == alone(question, max_tokens=20, seed=3)[0]
    assert wait_for(lambda: loop.stats()["running"] == 0)


def test_more_than_may_wait_are_told_so(client, loop, monkeypatch):
    (lane,) = loop._lanes.values()
    full = asked("x", max_tokens=30, n=8, seed=1)
    go_on = threading.Event()
    step = lane.engine.step
    monkeypatch.setattr(lane.engine, "step", lambda: go_on.wait(60) and step())
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(client.chat.completions.create, **full) for _ in range(2)]
        try:
            assert wait_for(lambda: lane.live == 16, 20), "eight run, eight wait"
            with pytest.raises(openai.RateLimitError) as failed:
                client.chat.completions.create(**asked("y", n=8))
        finally:
            go_on.set()
        assert int(failed.value.response.headers["retry-after"]) >= 1
        texts = [[choice.message.content for choice in answer.result().choices] for answer in answers]
    assert texts[0] == texts[1], "those that were accepted are answered in full"
    assert client.chat.completions.create(**asked("y", n=8, max_tokens=3))


def test_a_closed_stream_frees_its_rows(client, loop):
    """Several, for any one may have ended by itself before it was closed."""
    before = loop.stats()["cancelled"]
    for seed in range(6):
        with client.chat.completions.create(**asked("x", max_tokens=170, n=8, seed=seed), stream=True) as stream:
            next(iter(stream))
        assert wait_for(lambda: loop.stats()["running"] == loop.stats()["waiting"] == 0)
    assert loop.stats()["cancelled"] > before


def test_stop_texts(client):
    text = alone("stop here", max_tokens=60, seed=5)[0]
    stop = next(text[k : k + 2] for k in range(8, len(text)) if text[k : k + 2].isascii())
    at = text.find(stop)
    answer = client.chat.completions.create(**asked("stop here", max_tokens=60, seed=5, stop=[stop]))
    assert answer.choices[0].message.content == text[:at] and answer.choices[0].finish_reason == "stop"


def test_logprobs_are_the_models(client):
    question = asked("p", max_tokens=8, temperature=0, logprobs=True, top_logprobs=3)
    entries = client.chat.completions.create(**question).choices[0].logprobs.content
    for entry in entries:
        tops = [top.logprob for top in entry.top_logprobs]
        assert len(tops) == 3 and tops == sorted(tops, reverse=True)
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, tops[0]), "greedy takes the likeliest"


def test_a_prompt_that_almost_fills_the_context(client, loop):
    overhead = len(render_prompt(TOKENIZER, [{"role": "user", "content": ""}]).ids)
    answer = client.chat.completions.create(**asked("x" * (191 - overhead), max_tokens=100))
    assert answer.usage.total_tokens <= 192 and answer.usage.prompt_tokens == 191
    with pytest.raises(openai.BadRequestError) as failed:
        client.chat.completions.create(**asked("x" * (192 - overhead)))
    assert failed.value.code == "context_length_exceeded"


def test_nothing_else_in_flight_notices_bad_requests(client):
    expected = alone("steady", max_tokens=120, seed=11)[0]
    found = []
    steady = threading.Thread(
        target=lambda: found.append(client.chat.completions.create(**asked("steady", max_tokens=120, seed=11)))
    )
    steady.start()
    for bad in ({"n": 99}, {"temperature": 9}, {"model": "nope"}, {"max_tokens": 500}, {"stop": [""]}):
        with pytest.raises(openai.APIStatusError):
            client.chat.completions.create(**{**asked("x"), **bad})
    steady.join()
    assert found[0].choices[0].message.content == expected

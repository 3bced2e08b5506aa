"""What cannot be answered: the right status, OpenAI's error body, and the client's exception for it."""

from __future__ import annotations

import json
import random
import time

import httpx
import openai
import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError

from nanochat_ray.serve.api import create_app
from nanochat_ray.serve.backend import EngineFailed, Overloaded
from nanochat_ray.serve.protocol import ChatRequest, CompletionRequest
from nanochat_ray.serve.settings import HttpSettings
from tests.serve.scripted import Scripted, running, served

HI = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"


def local(backend: Scripted, **settings) -> TestClient:
    app = create_app(backend, HttpSettings(**settings))
    return TestClient(app, base_url="http://localhost", client=("127.0.0.1", 1), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client() -> TestClient:
    return local(Scripted(models=[served(), served("tiny-base", chat=False)]))


def error_of(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"] and error["type"]
    return error


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [3]}, "messages.0"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": [{"type": "python", "text": "1"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [*HI, *HI]}, "messages"),
        ({"messages": [*HI, {"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [*HI, {"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [*HI, {"role": "assistant", "content": None}, *HI]}, "messages.1.content"),
        ({"messages": [{"role": ["x"], "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"content": "x"}]}, "messages.0.role"),
        ({"messages": [*HI, {"role": "assistant", "content": 3}, *HI]}, "messages.1.content"),
        ({"user": 3}, "user"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": 1.5}, "n"),
        ({"seed": 10**20}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": list("abcde")}, "stop"),
        ({"stop": ["a", ""]}, "stop.1"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 4096}, "max_tokens"),
        ({"max_completion_tokens": 193}, "max_completion_tokens"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": False}, "frequency_penalty"),
        ({"logit_bias": {"50": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"model": 3}, "model"),
        ({"model": "tiny-base"}, "model"),
    ],
)  # fmt: skip
def test_bad_parameters_are_named(client, change, param):
    body = json.dumps({"messages": HI, **change})
    error = error_of(client.post(CHAT, content=body, headers={"content-type": "application/json"}), 400)
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert param.rpartition(".")[2] in error["message"] or param == "model"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": 3}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt.0"),
        ({"prompt": [1, "x"]}, "prompt.1"),
        ({"prompt": [-1]}, "prompt.0"),
        ({"prompt": [265]}, "prompt"),
        ({"prompt": ["x"] * 17}, "prompt"),
        ({"prompt": ["x"] * 9, "n": 2}, "n"),
        ({"prompt": "x", "echo": True, "logprobs": 1}, "logprobs"),
        ({"prompt": "x", "logprobs": 6}, "logprobs"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "best_of": 2}, "best_of"),
        ({"prompt": "x" * 200}, "prompt"),
    ],
)
def test_bad_completions_are_named(client, body, param):
    assert error_of(client.post("/v1/completions", json=body), 400)["param"] == param


def test_too_long_a_conversation_says_the_numbers():
    backend = Scripted()
    for answers in (local(backend), local(backend, max_prompt_tokens=50)):
        long = [*HI[:1], {"role": "assistant", "content": "b"}, {"role": "user", "content": "c" * 186}]
        error = error_of(answers.post(CHAT, json={"messages": long}), 400)
        assert error["code"] == "context_length_exceeded" and error["param"] == "messages"
        assert "192" in error["message"] and "197" in error["message"], "BOS, 189 characters and 7 markers"
    short = answers.post(CHAT, json={"messages": [{"role": "user", "content": "c" * 60}]})
    assert "50" in error_of(short, 400)["message"] and short.json()["error"]["code"] == "context_length_exceeded"
    assert backend.opened == 0, "nothing was dropped from it and nothing asked of the engine"


def test_wrong_paths_methods_and_types(client):
    assert error_of(client.get("/v1/nothing"), 404)["code"] == "not_found"
    assert error_of(client.get("/v1/models/"), 404)
    wrong_method = client.get(CHAT)
    assert error_of(wrong_method, 405)["code"] == "method_not_allowed" and wrong_method.headers["allow"] == "POST"
    for content_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = client.post(CHAT, content="{}", headers={"content-type": content_type})
        assert error_of(response, 415)["code"] == "unsupported_media_type"
    assert error_of(client.post(CHAT, json={"messages": HI, "model": "gpt-4o"}), 404)["code"] == "model_not_found"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"nope", b"[]", b"3", b"null", b"\xff\xfe{", b"[" * 50_000, b'{"messages":' + b"9" * 5000]
)
def test_bodies_that_are_no_json_objects(client, body):
    error_of(client.post(CHAT, content=body, headers={"content-type": "application/json"}), 400)


def test_fuzzed_bodies_are_answered(client):
    """A valid body with bytes changed, cut or doubled: any answer but a failure of the server's."""
    body = json.dumps({
        "messages": [*HI, {"role": "assistant", "parts": [{"type": "text", "text": "x"}]}, *HI], "temperature": 0.5,
        "stop": ["a"], "n": 2, "seed": 1, "logprobs": True, "top_logprobs": 3,
        "stream_options": {"include_usage": True},
    }).encode()  # fmt: skip
    rng = random.Random(0)
    statuses = set()
    for _ in range(300):
        changed = bytearray(body)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(changed))
            kind = rng.randrange(3)
            if kind == 0:
                changed[at] = rng.randrange(256)
            elif kind == 1:
                del changed[at : at + rng.randint(1, 9)]
            else:
                changed[at:at] = changed[at : at + rng.randint(1, 30)]
        response = client.post(CHAT, content=bytes(changed), headers={"content-type": "application/json"})
        statuses.add(response.status_code)
        if response.status_code != 200:
            error_of(response, response.status_code)
    assert statuses <= {200, 400} and len(statuses) == 2


def test_a_body_is_counted_while_it_is_read():
    client = local(Scripted(), max_body_bytes=1000)
    padding = {"messages": HI, "pad": "x" * 1000}
    assert error_of(client.post(CHAT, json=padding), 413)["code"] == "request_too_large"

    lengths = {"content-type": "application/json", "content-length": "9" * 5000}
    error_of(client.post(CHAT, content=b"{}", headers=lengths), 413)

    def pieces():
        yield b'{"pad":"'
        for _ in range(100):
            yield b"x" * 100

    response = client.post(CHAT, content=pieces(), headers={"content-type": "application/json"})
    assert "content-length" not in response.request.headers
    error_of(response, 413)


def test_a_liar_about_the_length_is_counted_too():
    """No Content-Length at all, over a real socket, and the reading stops at the limit."""
    n_sent = 0

    def endless():
        nonlocal n_sent
        while n_sent < 50_000_000:
            n_sent += 65536
            yield b" " * 65536

    with running(create_app(Scripted(), HttpSettings(max_body_bytes=100_000))) as url:
        try:
            response = httpx.post(f"{url}{CHAT}", content=endless(), headers={"content-type": "application/json"})
            assert response.status_code == 413
        except httpx.WriteError:
            pass  # the server has hung up, which says the same
    assert n_sent < 50_000_000


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "expected"),
    [
        (Overloaded("too many", 2.6), 429, openai.RateLimitError),
        (ValueError("too large for the pool"), 400, openai.BadRequestError),
        (EngineFailed("it broke"), 503, openai.InternalServerError),
        (RuntimeError("secret"), 500, openai.InternalServerError),
    ],
)
def test_errors_before_the_first_token_have_their_status(failure, status, expected, stream):
    backend = Scripted(failure=failure)
    with running(create_app(backend)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        with pytest.raises(expected) as failed:
            client.chat.completions.create(model="tiny-sft", messages=HI, stream=stream)
    assert failed.value.status_code == status and "secret" not in str(failed.value)
    if status == 429:
        assert failed.value.response.headers["retry-after"] == "3" and failed.value.code == "rate_limit_exceeded"
    assert backend.opened == backend.closed == 1


def test_the_client_tries_again_when_the_server_is_busy():
    backend = Scripted(failure=Overloaded("too many", 0.1))

    def reply(prompt, params):
        backend.failure = None if backend.opened > 1 else backend.failure
        return "done"

    backend.reply = reply
    with running(create_app(backend)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=1) as client:
        answer = client.chat.completions.create(model="tiny-sft", messages=HI)
    assert answer.choices[0].message.content == "done" and backend.opened == 2


@pytest.mark.parametrize("failure", [EngineFailed("it broke"), RuntimeError("secret"), ValueError("secret")])
def test_errors_in_the_middle_are_the_streams_last_event(failure):
    backend = Scripted(failure=failure, fail_at=3)
    with running(create_app(backend)) as url:
        asked = {"messages": HI, "stream": True}
        text = httpx.post(f"{url}{CHAT}", json=asked).text
        *chunks, last, rest = text.split("\n\n")
        assert rest == "" and "[DONE]" not in text and len(chunks) == 4
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["type"] == "server_error" and "secret" not in text
        with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
            seen = ""
            with pytest.raises(openai.APIError) as failed:
                for chunk in client.chat.completions.create(model="tiny-sft", messages=HI, stream=True):
                    seen += chunk.choices[0].delta.content or ""
            assert seen == "Hel" and failed.value.message == error["message"]
            with pytest.raises(openai.InternalServerError):
                client.chat.completions.create(model="tiny-sft", messages=HI)
    assert backend.opened == backend.closed == 3


def test_one_failing_prompt_of_several_ends_the_request():
    backend = Scripted()

    def reply(prompt, params):
        if len(prompt) > 2:
            raise Overloaded("no room for this one", 1)
        return "x" * 50

    backend.reply = reply
    error_of(local(backend).post("/v1/completions", json={"prompt": ["a", "long"]}), 429)
    assert backend.opened == backend.closed == 2


def test_while_no_model_is_loaded():
    client = local(Scripted(models=[]))
    response = client.post(CHAT, json={"messages": HI})
    assert error_of(response, 503)["code"] == "loading" and response.headers["retry-after"]
    assert client.get("/health").json()["ready"] is False and client.get("/healthz").status_code == 200
    error_of(client.get("/readyz"), 503)
    assert client.get("/v1/models").json() == {"object": "list", "data": []}


def test_a_failure_of_the_servers_own(caplog):
    backend = Scripted()
    backend.stats = lambda: 1 / 0
    response = local(backend).get("/stats")
    error = error_of(response, 500)
    assert error["type"] == "server_error" and "division" not in response.text and response.headers["x-request-id"]
    assert "ZeroDivisionError" in caplog.text, "its log says more"


def test_no_limit_can_be_talked_around():
    client = local(Scripted(), max_messages=3, max_new_tokens=10, max_samples=2)
    messages = [*HI, {"role": "assistant", "content": "x"}] * 2 + HI
    assert error_of(client.post(CHAT, json={"messages": messages}), 400)["code"] == "too_many_messages"
    assert error_of(client.post(CHAT, json={"messages": HI, "max_tokens": 11}), 400)["param"] == "max_tokens"
    assert error_of(client.post(CHAT, json={"messages": HI, "n": 3}), 400)["param"] == "n"
    answer = client.post(CHAT, json={"messages": HI}).json()
    assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 10


def test_a_megabyte_of_one_letter_does_not_hold_the_server_up():
    client = local(Scripted())
    began = time.monotonic()
    for text in ("a" * 900_000, " " * 900_000, "a1" * 450_000):
        response = client.post(CHAT, json={"messages": [{"role": "user", "content": text}]})
        assert error_of(response, 400)["code"] == "context_length_exceeded"
    assert time.monotonic() - began < 120, "a quadratic encoder would take hours"


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatRequest, {"messages": [7] * 50_000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [7] * 50_000}]}),
        (ChatRequest, {"messages": [{"role": "assistant", "parts": [7] * 50_000}]}),
        (CompletionRequest, {"prompt": [{}] * 50_000}),
    ],
)
def test_a_long_list_of_rubbish_is_refused_at_its_first_item(kind, body):
    """Describing every item would hold up all other requests for seconds."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert len(caught.value.errors()) <= 4

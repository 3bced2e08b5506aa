"""Every way a request can end: the client leaves, time runs out, silence. The backend is closed in all of them."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Iterator

import httpx
import openai
import pytest

from nanochat_ray.serve.api import create_app
from nanochat_ray.serve.backend import EngineFailed
from nanochat_ray.serve.settings import HttpSettings
from tests.serve.scripted import Scripted, running, served, wait_for

HI = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"
ENDLESS = "x" * 10_000
REQUESTS = {
    "stream": (CHAT, {"messages": HI, "stream": True}),
    "whole": (CHAT, {"messages": HI}),
    "many": (CHAT, {"messages": HI, "stream": True, "n": 3}),
    "prompts": ("/v1/completions", {"prompt": ["a", "b"], "stream": True}),
    "prompts, whole": ("/v1/completions", {"prompt": ["a", "b"]}),
    "native": ("/chat/completions", {"messages": HI}),
}


def endless(step_s: float) -> Scripted:
    return Scripted(ENDLESS, [served(context=20_000, max_tokens=10_000)], step_s=step_s)


@pytest.fixture(scope="module")
def slow() -> Iterator[tuple[Scripted, str]]:
    """10,000 tokens, one every 20 ms."""
    backend = endless(0.02)
    with running(create_app(backend)) as url:
        yield backend, url


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("early", [False, True])
def test_a_client_that_leaves_frees_its_place(slow, name, early):
    backend, url = slow
    path, body = REQUESTS[name]
    before = backend.opened
    address = httpx.URL(url)
    backend.step_s = 60.0 if early else 0.02
    with socket.create_connection((address.host, address.port)) as connection:
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        n_prompts = len(body.get("prompt", "x"))
        assert wait_for(lambda: backend.opened == before + n_prompts)
        if not early:
            steps = backend.steps
            assert wait_for(lambda: backend.steps > steps + 5)
        assert backend.closed == before
    assert wait_for(lambda: backend.closed == backend.opened, 20), "without waiting for the next step"
    steps = backend.steps
    time.sleep(0.1)
    assert backend.steps == steps, "nothing runs on"


def test_a_stream_that_the_openai_client_closes(slow):
    backend, url = slow
    backend.step_s = 0.02
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x") as client:
        with client.chat.completions.create(model="tiny-sft", messages=HI, stream=True) as stream:
            assert [next(iter(stream)) for _ in range(3)]
        assert wait_for(lambda: backend.closed == backend.opened)
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.2, max_retries=0).chat.completions.create(model="tiny-sft", messages=HI)
        assert wait_for(lambda: backend.closed == backend.opened)


def test_a_cancelled_task_closes_too():
    """What Ray Serve does when a client has left: it cancels the task that runs the app."""
    backend = endless(0.01)
    app = create_app(backend)
    body = json.dumps({"messages": HI, "stream": True}).encode()
    scope = {
        "type": "http", "method": "POST", "path": CHAT, "root_path": "", "query_string": b"", "scheme": "http",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")], "http_version": "1.1",
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip

    async def run() -> None:
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        sent = asyncio.Event()

        async def receive():
            if not messages:
                await asyncio.Event().wait()
            return messages.pop()

        async def send(message):
            sent.set()

        task = asyncio.create_task(app(scope, receive, send))
        await sent.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert backend.opened == backend.closed == 1, "closed before the task is over"

    asyncio.run(run())


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_has_a_deadline(name):
    backend = endless(0.02)
    path, body = REQUESTS[name]
    with running(create_app(backend, HttpSettings(request_timeout_s=0.3))) as url:
        began = time.monotonic()
        response = httpx.post(f"{url}{path}", json=body)
        assert 0.25 < time.monotonic() - began < 60, "of 200 s"
    if response.headers["content-type"].startswith("text/event-stream"):
        last = response.text.removesuffix("\n\n").rpartition("\n\n")[2]
        error = json.loads(last.removeprefix("data: "))["error"]
    else:
        assert response.status_code == 504 and response.headers["x-should-retry"] == "false"
        error = response.json()["error"]
    assert error["code"] == "timeout" and backend.closed == backend.opened


def test_a_deadline_before_the_first_token():
    with running(create_app(Scripted(step_s=5), HttpSettings(request_timeout_s=0.2))) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x")
        with pytest.raises(openai.InternalServerError) as failed:
            client.chat.completions.create(model="tiny-sft", messages=HI, stream=True)
    assert failed.value.status_code == 504


def test_a_body_that_does_not_come():
    with running(create_app(Scripted(), HttpSettings(request_timeout_s=0.3))) as url:
        address = httpx.URL(url)
        with socket.create_connection((address.host, address.port), timeout=5) as connection:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            answer = connection.recv(65536)
            assert b" 408 " in answer.partition(b"\r\n")[0] and b"request_timeout" in answer


def test_a_client_that_leaves_within_its_body(caplog):
    with running(create_app(Scripted())) as url:
        address = httpx.URL(url)
        with socket.create_connection((address.host, address.port), timeout=5) as connection:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            time.sleep(0.1)
        assert httpx.get(f"{url}/healthz").status_code == 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_silent_stream_is_kept_open_from_the_start():
    backend = Scripted("ab", step_s=0.3)
    with running(create_app(backend, HttpSettings(keep_alive_s=0.1))) as url:
        asked = {"messages": HI, "stream": True}
        events = httpx.post(f"{url}{CHAT}", json=asked).text.split("\n\n")
        assert events[0] == events[1] == ": keep-alive", "before the first token"
        assert events[-2] == "data: [DONE]" and events.count(": keep-alive") >= 4
        with openai.OpenAI(base_url=f"{url}/v1", api_key="x") as client:
            chunks = list(client.chat.completions.create(model="tiny-sft", messages=HI, stream=True))
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "ab"
            whole = client.chat.completions.create(model="tiny-sft", messages=HI)
            assert whole.choices[0].message.content == "ab"
        # Once the response has begun, an error is an event, even if no token came.
        backend.failure = EngineFailed("it broke")
        backend.fail_at = 1
        response = httpx.post(f"{url}{CHAT}", json=asked)
        assert response.status_code == 200 and "engine_failed" in response.text


def test_a_slow_reader_holds_up_nobody_else():
    backend = Scripted("y" * 9_000, [served(context=10_000, max_tokens=9_000)])
    with running(create_app(backend)) as url, httpx.Client() as reader:
        with reader.stream("POST", f"{url}{CHAT}", json={"messages": HI, "stream": True, "n": 4}) as slow:
            pieces = slow.iter_raw()
            next(pieces)
            time.sleep(0.3)
            other = httpx.post(f"{url}{CHAT}", json={"messages": HI, "max_tokens": 5})
            assert other.status_code == 200
            rest = b"".join(pieces)
            assert rest.endswith(b"data: [DONE]\n\n")
    assert backend.opened == backend.closed == 2


def test_the_log_has_counts_and_no_words(caplog):
    caplog.set_level(logging.INFO, "nanochat_ray.serve")
    secret = [{"role": "user", "content": "my secret"}]
    for log_conversations in (False, True):
        caplog.clear()
        with running(create_app(Scripted("the answer"), HttpSettings(log_conversations=log_conversations))) as url:
            headers = {"x-request-id": "mine-1"}
            answer = httpx.post(f"{url}{CHAT}", json={"messages": secret}, headers=headers)
            assert answer.headers["x-request-id"] == "mine-1"
            httpx.post(f"{url}{CHAT}", json={"messages": secret, "n": "my secret"})
            other = httpx.get(f"{url}/a%0Ab", headers={"x-request-id": "no good"})
            assert other.headers["x-request-id"].startswith("req-")
        text = "\n".join(record.getMessage() for record in caplog.records)
        assert "mine-1 POST '/v1/chat/completions' 200" in text
        assert "model=tiny-sft prompt_tokens=13 completion_tokens=10 first_token_s=" in text
        assert "'/a\\nb' 404" in text
        assert ("my secret" in text) == ("the answer" in text) == log_conversations

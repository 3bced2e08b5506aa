"""The proxy's middleware over stand-ins for Serve's proxy: what it sends again, and what it says."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable

import pytest
from starlette.types import Message, Receive, Scope, Send

from nanochat_ray.serve import edge

Proxy = Callable[[Scope, Receive, Send], Awaitable[None]]
START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}


def body(data: bytes, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


def ask(
    proxy: Proxy, parts: tuple[bytes, ...] = (b"hello",), path: str = "/v1/x", leaves: bool = False
) -> list[Message]:
    """What the client gets. `parts`: its body; `leaves`: it goes after it."""
    sent: list[Message] = []

    async def run() -> None:
        ends = [True] * (len(parts) - 1) + [False]
        body = zip(parts, ends, strict=True)
        waiting = [{"type": "http.request", "body": part, "more_body": more} for part, more in body]

        async def receive() -> Message:
            if waiting:
                return waiting.pop(0)
            if not leaves:
                await asyncio.Event().wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "path": path, "headers": [(b"a", b"b")]}
        await asyncio.wait_for(edge.Edge(proxy)(scope, receive, send), 5)

    asyncio.run(run())
    return sent


class DyingProxy:
    """Reads the body as Serve's proxy does, and dies `deaths` times before it answers with what it has read."""

    def __init__(self, deaths: int, read_first: bool = True) -> None:
        self.deaths, self.read_first = deaths, read_first
        self.tries = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.tries += 1
        scope["headers"].append((b"x-request-id", b"%d" % self.tries))
        read: list[Message] = []

        async def pump() -> None:
            while (message := await receive())["type"] != "http.disconnect":
                read.append(message)

        pumping = asyncio.create_task(pump())
        await asyncio.sleep(0.01)
        pumping.cancel()
        if self.tries <= self.deaths:
            return
        assert scope["headers"] == [(b"a", b"b"), (b"x-request-id", b"%d" % self.tries)]
        await send(START)
        await send(body(b"".join(message["body"] for message in read)))


def error_of(message: Message) -> dict:
    return json.loads(message["body"].decode().removeprefix("data: "))["error"]


@pytest.mark.parametrize("deaths", [0, 1, 2])
def test_a_request_whose_replica_died_is_sent_again_with_its_body(deaths):
    proxy = DyingProxy(deaths)
    sent = ask(proxy, parts=(b"one ", b"two ", b"three"))
    assert proxy.tries == deaths + 1
    assert sent == [START, body(b"one two three")]


def test_after_two_more_tries_the_client_is_told():
    proxy = DyingProxy(99)
    start, answer = ask(proxy)
    assert proxy.tries == 3
    assert start["status"] == 503 and (b"retry-after", b"1") in start["headers"]
    assert error_of(answer)["code"] == "replica_died" and not answer["more_body"]


def test_a_long_body_is_not_kept(monkeypatch):
    monkeypatch.setattr(edge, "MAX_KEPT_BYTES", 10)
    proxy = DyingProxy(1)
    assert ask(proxy, parts=(b"12345678", b"12345678"))[0]["status"] == 503
    assert proxy.tries == 1


def test_nobody_answers_a_client_that_has_left():
    proxy = DyingProxy(99)
    assert ask(proxy, leaves=True) == []
    assert proxy.tries == 1


def test_a_stream_that_breaks_ends_with_an_error_event():
    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        await send(body(b"data: 1\n\n", more=True))

    start, one, last = ask(proxy)
    assert start["status"] == 200 and one["body"] == b"data: 1\n\n"
    assert error_of(last)["code"] == "stream_interrupted" and last["body"].endswith(b"\n\n") and not last["more_body"]


def test_a_broken_answer_of_another_kind_stays_broken():
    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        await send({**START, "headers": [(b"content-type", b"application/json")]})
        await send(body(b'{"half":', more=True))

    assert len(ask(proxy)) == 2  # uvicorn then closes the connection: a client sees that it is not whole


@pytest.mark.parametrize(("status", "kind"), [(404, "invalid_request_error"), (408, "invalid_request_error"),
                                              (429, "rate_limit_error"), (503, "server_error")])  # fmt: skip
def test_the_proxys_own_errors_are_openais(status, kind):
    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"retry-after", b"7"), (b"x-request-id", b"r1")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send(body(b"Request dropped due to ", more=True))
        await send(body(b"backpressure"))

    start, answer = ask(proxy)
    headers = dict(start["headers"])
    assert start["status"] == status and headers[b"content-type"] == b"application/json"
    assert headers[b"retry-after"] == b"7" and headers[b"x-request-id"] == b"r1"
    assert int(headers[b"content-length"]) == len(answer["body"])
    assert error_of(answer)["type"] == kind
    if status == 429:
        assert ask(proxy, path="/-/healthz")[1]["body"] == b"Request dropped due to "  # the proxy's own paths


def test_the_applications_errors_pass():
    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": [(b"content-type", b"application/json")]})
        await send(body(b"{}"))

    assert ask(proxy)[1]["body"] == b"{}"


def test_websockets_are_left_alone():
    seen = []

    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    asyncio.run(edge.Edge(proxy)({"type": "websocket", "path": "/"}, None, None))  # type: ignore[arg-type]
    assert seen == ["websocket"]


def test_the_proxy_process_loads_no_torch():
    code = "import sys, nanochat_ray.serve.edge as e\nassert e.middlewares()\nprint('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"

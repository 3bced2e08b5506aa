"""What the HTTP side costs of CPU time, without a model: per chunk of a stream, per request.

    python bench/sse.py [--tokens 4000] [--requests 300] [--rounds 5]

The application runs in this process over a backend that has its tokens ready. `text` is the part that every way of
showing tokens has (whole characters, markers, stop texts), `writer` that and the JSON, `app` also the way through the
ASGI application, `socket` also uvicorn's and the kernel's, with the client in another process. One token per chunk is
the worst case: the server gives the tokens of one `stream_interval_s` together. Medians of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import uvicorn
from fastapi import FastAPI

from nanochat_ray.messages import SamplingParams, TokenEvent
from nanochat_ray.serve.answers import Sample
from nanochat_ray.serve.api import create_app
from nanochat_ray.serve.backend import ServedModel
from nanochat_ray.serve.plan import Plan
from nanochat_ray.serve.writers import ChatWriter
from nanochat_ray.text.tokenizer import Tokenizer

CLIENT = """
import http.client, sys
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
connection.request("POST", "/v1/chat/completions", sys.argv[2], {"Content-Type": "application/json"})
assert connection.getresponse().read().endswith(b"[DONE]\\n\\n")
"""


class Ready:
    """A backend whose tokens cost nothing."""

    def __init__(self, n_tokens: int) -> None:
        tokenizer = Tokenizer.from_tokens([bytes([byte]) for byte in range(256)])
        defaults = SamplingParams(max_tokens=n_tokens)
        self.models = [ServedModel("ready", tokenizer, 1 << 30, 0, True, defaults)]
        self.events = [
            TokenEvent(0, 0, 97 + k % 26, False, "length" if k + 1 == n_tokens else None) for k in range(n_tokens)
        ]

    def stats(self) -> dict[str, Any]:
        return {}

    async def generate(
        self, model: ServedModel, prompt: Sequence[int], params: SamplingParams
    ) -> AsyncGenerator[list[TokenEvent], None]:
        for event in self.events[-params.max_tokens :]:
            yield [event]


def request_body(**more: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "hi"}], "stream": True, **more}).encode()


async def through_app(app: FastAPI, body: bytes, times: int) -> None:
    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "root_path": "", "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")], "client": ("127.0.0.1", 1),
        "http_version": "1.1", "scheme": "http", "server": ("127.0.0.1", 80),
    }  # fmt: skip

    async def send(message: Any) -> None:
        pass

    for _ in range(times):
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive(messages: list[dict[str, Any]] = messages) -> dict[str, Any]:
            return messages.pop() if messages else await asyncio.Event().wait()  # type: ignore[return-value]

        await app(dict(scope), receive, send)


def cpu_us(work: Any, n: int) -> float:
    began = time.process_time()
    work()
    return (time.process_time() - began) / n * 1e6


def measure(n_tokens: int, n_requests: int) -> dict[str, float]:
    backend = Ready(n_tokens)
    model = backend.models[0]
    app = create_app(backend)
    sample = Sample(model.tokenizer, ())
    writer = ChatWriter(Plan(model, [[0]], [model.defaults]), with_usage=False)
    found = {
        "text us/chunk": cpu_us(lambda: [sample.feed(event) for event in backend.events], n_tokens),
        "writer us/chunk": cpu_us(lambda: [writer.feed(0, [event]) for event in backend.events], n_tokens),
        "app us/chunk": cpu_us(lambda: asyncio.run(through_app(app, request_body(), 1)), n_tokens),
        "app us/request": cpu_us(
            lambda: asyncio.run(through_app(app, request_body(max_tokens=1), n_requests)), n_requests
        ),
    }
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = str(listener.getsockname()[1])
    command = [sys.executable, "-S", "-c", CLIENT, port, request_body().decode()]
    found["socket us/chunk"] = cpu_us(lambda: subprocess.run(command, check=True), n_tokens)
    server.should_exit = True
    thread.join()
    listener.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    measure(args.tokens, args.requests)  # to warm up
    rounds = [measure(args.tokens, args.requests) for _ in range(args.rounds)]
    medians = {name: round(statistics.median(found[name] for found in rounds), 1) for name in rounds[0]}
    for name, value in medians.items():
        print(f"{name:<18} {value:>8.1f}")
    print(json.dumps({"bench": "sse", **medians}))


if __name__ == "__main__":
    main()

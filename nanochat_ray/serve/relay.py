"""One request's way from the engine to the client: its beginning, its events, and every way it can end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from fastapi import Response
from starlette.types import Receive, Scope, Send

from nanochat_ray.messages import TokenEvent
from nanochat_ray.serve.answers import Writer
from nanochat_ray.serve.backend import Backend
from nanochat_ray.serve.errors import as_api_error, json_response
from nanochat_ray.serve.plan import Plan
from nanochat_ray.serve.request_log import Note

Batches = AsyncGenerator[tuple[int, list[TokenEvent]], None]  # number of a prompt, and its events
STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache, no-transform",
    "x-accel-buffering": "no",  # nginx would wait for a whole buffer
}
_KEEP_ALIVE = b": keep-alive\n\n"


class Relay(Response):
    """Runs a plan and answers with what its writer makes of the events.

    The response begins with the first event, so that an error before it has a status of its own; a stream that is
    silent for long begins with a comment. In every path, the client's going and the deadline included, the backend's
    generators are closed before this returns.
    """

    def __init__(self, backend: Backend, plan: Plan, writer: Writer, stream: bool, keep_alive_s: float) -> None:
        super().__init__()
        self._open: Callable[[], Batches] = lambda: merged(backend, plan)
        self._writer, self._stream, self._keep_alive_s = writer, stream, keep_alive_s
        self._began = False  # whether an event came
        self._started = False  # whether the response's head was sent
        self._one_at_a_time = asyncio.Lock()  # the keep-alive's messages and the answer's

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        note = Note.of(scope)
        work = asyncio.create_task(self._work(scope, receive, send, note))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not work.done():
                note.outcome = "cancelled"
            work.cancel()
            gone.cancel()
            await asyncio.wait({work, gone})
            note.counts = self._writer.counts
            note.answer = self._writer.text
        if not work.cancelled():
            work.result()

    async def _work(self, scope: Scope, receive: Receive, send: Send, note: Note) -> None:
        ticking = asyncio.create_task(self._tick(send)) if self._stream else None
        try:
            async with asyncio.timeout_at(note.deadline), aclosing(self._open()) as batches:
                async for prompt, events in batches:
                    if not self._began:
                        self._began, note.first_s = True, time.perf_counter() - note.began
                    chunk = self._writer.feed(prompt, events)
                    if self._stream and chunk:
                        await self._emit(send, chunk)
            closing = self._writer.last() if self._stream else b""
        except Exception as error:
            failure = as_api_error(error, self._began)
            note.outcome = failure.code or failure.kind
            if not self._started:
                raise failure from error
            closing = self._writer.error(failure)
        finally:
            if ticking:
                ticking.cancel()
        if self._stream:
            await self._emit(send, closing, more=False)
        else:
            await json_response(self._writer.whole())(scope, receive, send)

    async def _emit(self, send: Send, chunk: bytes, more: bool = True) -> None:
        async with self._one_at_a_time:
            if not self._started:
                self._started = True
                headers = [(name.encode(), value.encode()) for name, value in STREAM_HEADERS.items()]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": chunk, "more_body": more})

    async def _tick(self, send: Send) -> None:
        while True:
            await asyncio.sleep(self._keep_alive_s)
            await self._emit(send, _KEEP_ALIVE)


async def _gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def merged(backend: Backend, plan: Plan) -> Batches:
    """The events of all prompts as they come, with the prompts' numbers. An error of one ends all."""
    sources = [
        backend.generate(plan.model, prompt, params) for prompt, params in zip(plan.prompts, plan.params, strict=True)
    ]
    if len(sources) == 1:
        async with aclosing(sources[0]) as only:
            async for events in only:
                yield 0, events
        return
    queue: asyncio.Queue[tuple[int, list[TokenEvent]] | Exception | None] = asyncio.Queue()

    async def read(number: int, source: AsyncGenerator[list[TokenEvent], None]) -> None:
        try:
            async with aclosing(source):
                async for events in source:
                    queue.put_nowait((number, events))
            queue.put_nowait(None)
        except Exception as error:  # the reader below raises it
            queue.put_nowait(error)

    readers = [asyncio.create_task(read(number, source)) for number, source in enumerate(sources)]
    try:
        n_running = len(readers)
        while n_running:
            item = await queue.get()
            if item is None:
                n_running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.wait(readers)

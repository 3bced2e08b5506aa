"""One line of log per request: id, path, status, times, counts. What was said only if it was asked for."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat_ray.serve.errors import ApiError, error_response

_log = logging.getLogger(__name__)
_ID = re.compile(r"[A-Za-z0-9_.:-]{1,80}")
_KEY = "nanochat_ray.note"


@dataclass
class Note:
    """What is known of a request, for the log's line; filled in on its way."""

    request_id: str
    began: float  # time.perf_counter
    deadline: float  # the event loop's time
    status: int | None = None
    model: str | None = None
    outcome: str | None = None  # how a generation ended, if not well
    first_s: float | None = None  # until the first token
    counts: dict[str, int] = field(default_factory=dict)
    prompt: str | None = None
    answer: Callable[[], str] | None = None

    @staticmethod
    def of(scope: Scope) -> Note:
        note = scope[_KEY]
        assert isinstance(note, Note)
        return note


class RequestLog:
    """ASGI middleware: names the request, answers what nothing else caught with 500, writes the line at the end."""

    def __init__(self, app: ASGIApp, timeout_s: float, log_conversations: bool) -> None:
        self._app, self._timeout_s, self._log_conversations = app, timeout_s, log_conversations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        now = asyncio.get_running_loop().time()
        note = scope[_KEY] = Note(request_id, time.perf_counter(), now + self._timeout_s)

        async def noted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                note.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, noted_send)
        except Exception:
            _log.exception("%s %s %r failed", request_id, scope["method"], scope["path"])
            if note.status is not None:
                raise  # the connection is cut, which is all that can still be said
            failed = ApiError(500, "The server failed at this request; its log says more.")
            await error_response(failed, scope["path"])(scope, receive, noted_send)
        finally:
            self._write(scope, note)

    def _write(self, scope: Scope, note: Note) -> None:
        seconds = time.perf_counter() - note.began
        extra = {"model": note.model, **note.counts, "first_token_s": note.first_s, "outcome": note.outcome}
        words = "".join(
            f" {name}={value:.3f}" if isinstance(value, float) else f" {name}={value}"
            for name, value in extra.items()
            if value is not None
        )
        line = "%s %s %r %s %.3fs%s"  # a path may hold anything, line ends too
        _log.info(line, note.request_id, scope["method"], scope["path"], note.status, seconds, words)
        if self._log_conversations and note.prompt is not None:
            _log.info("%s prompt: %r", note.request_id, note.prompt)
            _log.info("%s answer: %r", note.request_id, note.answer() if note.answer else "")

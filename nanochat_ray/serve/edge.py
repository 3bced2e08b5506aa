"""What a client sees when a replica dies: middleware of Serve's HTTP proxy, and no request lost that has no answer yet.

Switched on by the environment variable RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=nanochat_ray.serve.edge:middlewares
of Serve's controller, from which its proxies have it; `controller_options` in `serve_configs/` sets it. The proxy of
Ray 2.60 ends a stream without a word when its replica dies, and answers a request that had no response yet with a bare
500; its own errors are plain text.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat_ray.serve.errors import ApiError, error_response, json_bytes

logger = logging.getLogger("ray.serve")  # the proxy's log

MAX_TRIES = 3  # the first, and twice again
MAX_KEPT_BYTES = 1 << 23  # of a body; a longer one is not sent again
OWN_PATHS = "/-/"  # of the proxy itself
DIED = "The replica that worked on this request died, and so did those that took it over; try again."
BROKEN = "The answer ends here: the replica that worked on it died, or its time was up. Ask again."
MESSAGES = {
    404: "Nothing is served at this path. If the server has just been started, its models may still be loading.",
    408: "The request took longer than the server's time limit.",
    429: "The server is busy; try again after the time in Retry-After.",
    503: "The server has no replica for this request now; try again.",
}


def middlewares() -> list[Middleware]:
    """For Serve's callback."""
    return [Middleware(Edge)]


class Edge:
    """Sends requests again whose replica died before it answered, and puts words to what else goes wrong."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(OWN_PATHS):
            await self._app(scope, receive, send)
            return
        body = _Body(receive)
        answer = _Answer(scope["path"], send, body.drop)
        for tried in range(1, MAX_TRIES + 1):
            await self._app({**scope, "headers": list(scope["headers"])}, body.replay(), answer.send)
            if answer.begun or body.gone:
                break
            if body.lost:
                logger.warning("%s: not sent again, its body is longer than %d bytes", scope["path"], MAX_KEPT_BYTES)
                break
            logger.warning("%s: a replica died before it answered (try %d of %d)", scope["path"], tried, MAX_TRIES)
        if not body.gone:
            await answer.end()


class _Body:
    """A request's body as it comes, kept so that it can be sent again."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._kept: list[Message] = []
        self._kept_bytes = 0
        self.lost = False  # too long to be kept
        self.gone = False  # the client has left

    def drop(self) -> None:
        """It will not be sent again."""
        self._kept, self.lost = [], True

    def replay(self) -> Receive:
        """A receive function that begins with what has come so far."""
        again = deque(self._kept)

        async def receive() -> Message:
            if again:
                return again.popleft()
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.gone = True
            elif not self.lost:
                self._kept_bytes += len(message.get("body", b""))
                self.lost = self._kept_bytes > MAX_KEPT_BYTES
                self._kept = [] if self.lost else [*self._kept, message]
            return message

        return receive


class _Answer:
    """The response on its way to the client: whether it has begun, ended, and is a stream of events."""

    def __init__(self, path: str, send: Send, on_begin: Callable[[], None]) -> None:
        self._path, self._send, self._on_begin = path, send, on_begin
        self.begun = self.ended = self._events = False
        self._plain: ApiError | None = None  # the proxy's own error, said again in JSON when its body has come

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            self._on_begin()
            headers = MutableHeaders(scope=message)
            kind = headers.get("content-type", "")
            self._events = kind.startswith("text/event-stream")
            if message["status"] in MESSAGES and kind.startswith("text/plain"):
                kept = {name: headers[name] for name in ("retry-after", "x-request-id") if name in headers}
                self._plain = ApiError(message["status"], MESSAGES[message["status"]], headers=kept)
                return
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.ended = True
            if self._plain is not None:
                await self._say(self._plain)
                return
        if self._plain is None:
            await self._send(message)

    async def end(self) -> None:
        """Complete what the proxy left open."""
        if self.ended:
            return
        if not self.begun:
            await self._say(ApiError(503, DIED, code="replica_died", headers={"retry-after": "1"}))
        elif self._events:
            error = ApiError(503, BROKEN, code="stream_interrupted")
            event = b"data: " + json_bytes(error.body()) + b"\n\n"
            await self._send({"type": "http.response.body", "body": event, "more_body": False})

    async def _say(self, error: ApiError) -> None:
        response = error_response(error, self._path)
        start = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
        await self._send(start)
        await self._send({"type": "http.response.body", "body": response.body, "more_body": False})

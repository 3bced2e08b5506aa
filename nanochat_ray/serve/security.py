"""Who is answered: holders of a key, or without keys only this machine; and how much of a body is read."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import re
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from nanochat_ray.serve.errors import ApiError, error_response
from nanochat_ray.serve.request_log import Note

MAX_DIGITS = 18  # of a length; Python does not even read numbers of thousands of digits
# What a person needs to open the page and give it a key, and what a load balancer asks.
OPEN_PATHS = frozenset({"/", "/logo.svg", "/healthz"})
# Marks of a reverse proxy: behind one every peer looks local.
_PROXY_HEADERS = (
    "forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-forwarded-port", "x-forwarded-server",
    "x-real-ip", "x-client-ip", "true-client-ip", "cf-connecting-ip", "via",
)  # fmt: skip
_HOST = re.compile(r"(\[(?P<v6>[^]]*)\]|(?P<name>[^:\[\]]*))(:\d+)?", re.ASCII)


class Guard:
    """ASGI middleware: 401 without a right key; where there are no keys 403 for all but this machine itself."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/")) or "/"
            refusal = self._without_key(scope, headers) if not self._digests else self._key_refusal(path, headers)
            if refusal:
                await error_response(refusal, path)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _key_refusal(self, path: str, headers: Headers) -> ApiError | None:
        if path in OPEN_PATHS:
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = _digest(key.strip())
        # Every key is compared, so that the time tells nothing.
        right = sum([hmac.compare_digest(digest, known) for known in self._digests])
        if scheme.lower() == "bearer" and right:
            return None
        message = "This server needs a key: send the header Authorization: Bearer <key>."
        if key:
            message = "The key is not one of this server's."
        return ApiError(401, message, headers={"www-authenticate": "Bearer"})

    def _without_key(self, scope: Scope, headers: Headers) -> ApiError | None:
        hint = "set api_keys or api_keys_file (and use TLS) to answer others"
        client = scope.get("client")
        if not client or not is_loopback(client[0]):
            return ApiError(403, f"Without keys this server answers its own machine only; {hint}.")
        if any(name in headers for name in _PROXY_HEADERS):
            return ApiError(403, f"Without keys this server does not answer through a proxy; {hint}.")
        # A page of another site whose name was pointed at this machine (DNS rebinding) still sends that name.
        if not all(is_local_host(host) for host in headers.getlist("host") or [""]):
            return ApiError(403, f"Without keys this server answers to localhost and loopback addresses only; {hint}.")
        return None


def is_loopback(address: str) -> bool:
    """127.0.0.0/8, ::1, and the former as IPv6."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback


def is_local_host(host: str) -> bool:
    """Whether a Host header names this machine; with or without a port."""
    found = _HOST.fullmatch(host.lower())
    if not found:
        return False
    name = (found["v6"] or found["name"]).removesuffix(".")
    return name == "localhost" or name.endswith(".localhost") or is_loopback(name)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class _LimitedRequest(Request):
    """A request whose body is counted while it is read, whatever its headers say."""

    max_body_bytes = 0

    async def stream(self) -> AsyncGenerator[bytes, None]:
        n_bytes = 0
        async for chunk in super().stream():
            n_bytes += len(chunk)
            if n_bytes > self.max_body_bytes:
                raise _too_large(self.max_body_bytes)
            yield chunk


def _too_large(limit: int) -> ApiError:
    message = f"The body is larger than the {limit} bytes that this server reads."
    return ApiError(413, message, headers={"connection": "close"})  # or the rest of it would still be received


def json_route(max_body_bytes: int) -> type[APIRoute]:
    """Routes that take JSON only, of limited size, within the request's time.

    Other types are refused (415): a browser sends them to any server without asking it first.
    """

    class JsonRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            answer = super().get_route_handler()

            async def handle(request: Request) -> Response:
                if request.method != "POST":
                    return await answer(request)
                media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
                if media_type != "application/json":
                    raise ApiError(415, "Send the body as JSON, with the header Content-Type: application/json.")
                declared = request.headers.get("content-length", "")
                if declared.isdecimal() and (len(declared) > MAX_DIGITS or int(declared) > max_body_bytes):
                    raise _too_large(max_body_bytes)
                limited = _LimitedRequest(request.scope, request.receive)
                limited.max_body_bytes = max_body_bytes
                try:
                    async with asyncio.timeout_at(Note.of(request.scope).deadline):
                        await limited.body()  # kept in the request
                except TimeoutError as error:
                    late = "The body did not come within the time a request may take."
                    raise ApiError(408, late, headers={"connection": "close"}) from error
                except ClientDisconnect as error:
                    raise ApiError(400, "The client left before its body had come.") from error
                return await answer(limited)

            return handle

    return JsonRoute

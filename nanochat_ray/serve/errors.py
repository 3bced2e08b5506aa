"""Everything that goes wrong, as OpenAI's error body with the right status."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from nanochat_ray.serve.backend import EngineFailed, Overloaded

NATIVE_PATH = "/chat/completions"
_log = logging.getLogger(__name__)
# status: type and code of the error body
_KINDS: dict[int, tuple[str, str | None]] = {
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "forbidden"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "request_timeout"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    500: ("server_error", "internal_error"),
    503: ("server_error", "unavailable"),
    504: ("server_error", "timeout"),
}
_NO_TOOL_MESSAGES = (
    "There are no messages of tools: this server runs its tool itself, and an assistant's parts tell of it."
)
# What pydantic adds to a place to say which alternative of a union it tried.
_UNION_TAG = re.compile(r"str|int|float|bool|none|(list|constrained|function|literal)[-\[].*|[A-Z]\w+")
_ROLES = {"system", "developer", "user", "assistant"}  # such tags too, behind a message's number


class ApiError(Exception):
    """An answer that is not what was asked for."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, dict(headers or {})
        self.kind, usual_code = _KINDS.get(status, ("invalid_request_error", None))
        self.code = code or usual_code

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def json_bytes(value: Any) -> bytes:
    """JSON with raw Unicode. A lone surrogate, which UTF-8 cannot hold, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json_bytes(value), status, headers=headers, media_type="application/json")


def error_response(error: ApiError, path: str = "") -> Response:
    """Nanochat's own endpoint says `detail` too."""
    detail = {"detail": error.message} if path == NATIVE_PATH else {}
    return json_response({**detail, **error.body()}, error.status, error.headers)


def as_api_error(error: Exception, began: bool) -> ApiError:
    """What a request's reader is told when the backend raised. `began`: some of the answer had already come."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Overloaded):
        seconds = max(1, round(error.retry_after_s))
        return ApiError(429, str(error), headers={"retry-after": str(seconds)})
    if isinstance(error, EngineFailed):
        _log.error("the engine failed: %s", error)
        message = "The model's engine failed; ask again."
        return ApiError(503, message, code="engine_failed", headers={"retry-after": "1"})
    if isinstance(error, TimeoutError):
        # Asking again would only begin the same long answer anew: tell OpenAI's clients not to.
        message = "The answer took longer than a request may take here; ask for fewer tokens."
        return ApiError(504, message, headers={"x-should-retry": "false"})
    if isinstance(error, ValueError) and not began:
        return ApiError(400, str(error))
    _log.error("a request failed", exc_info=error)
    return ApiError(500, "The server failed at this request; its log says more.")


def install_error_handlers(app: FastAPI) -> None:
    """Every error of the app's own, the framework's and the validator's in one shape."""

    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error_response(error, request.url.path)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path
        texts = {
            404: f"There is nothing at {path}.",
            405: f"{path} does not answer {request.method}.",
        }
        message = texts.get(error.status_code, str(error.detail))
        return error_response(ApiError(error.status_code, message, headers=error.headers), path)

    async def validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(_described(error.errors()), request.url.path)

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, validation_error)


def _described(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """One error for what the validator found, without a word of what was sent."""
    first = errors[0]
    if first["type"] == "json_invalid":
        place = f" at character {first['loc'][-1]}" if isinstance(first["loc"][-1], int) else ""
        return ApiError(400, f"The body is no JSON: {first['ctx']['error']}{place}.", code="invalid_json")
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):  # a message's role
        param = f"{_param(first['loc'])}.role"
        message = f"{param}: it must be system, developer, user or assistant. {_NO_TOOL_MESSAGES}"
        return ApiError(400, message, param=param)
    # Of the alternatives of a union the one that was understood furthest tells the most.
    params = [_param(error["loc"]) for error in errors]
    param = max((name for name in params if name.startswith(params[0])), key=lambda name: name.count("."))
    same = [error["msg"].removeprefix("Value error, ") for error in errors if _param(error["loc"]) == param]
    message = ", or: ".join(dict.fromkeys(same))
    if not param:
        return ApiError(400, f"The body must be a JSON object. {message}")
    return ApiError(400, f"{param}: {message}", param=param)


def _param(place: Sequence[int | str]) -> str:
    """Dotted name of the place, such as messages.0.content."""
    names = [str(step) for step in place if step not in ("body", "path", "query")]
    roles = {k for k, name in enumerate(names) if name in _ROLES and k > 0 and names[k - 1].isdecimal()}
    return ".".join(name for k, name in enumerate(names) if not _UNION_TAG.fullmatch(name) and k not in roles)

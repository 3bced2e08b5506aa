"""The HTTP application: routes, and nothing else. Runs under any ASGI server, with any backend."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response, Security
from fastapi.security import HTTPBearer
from starlette.middleware.cors import CORSMiddleware

from nanochat_ray.serve.answers import Writer
from nanochat_ray.serve.backend import Backend, ServedModel
from nanochat_ray.serve.errors import NATIVE_PATH, install_error_handlers, json_response
from nanochat_ray.serve.health import add_health
from nanochat_ray.serve.native import NativeRequest, NativeWriter, plan_native
from nanochat_ray.serve.page import add_page
from nanochat_ray.serve.plan import Plan, find_model, plan_chat, plan_completion
from nanochat_ray.serve.protocol import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorBody,
    ModelCard,
    ModelList,
)
from nanochat_ray.serve.relay import Relay
from nanochat_ray.serve.request_log import Note, RequestLog
from nanochat_ray.serve.security import Guard, json_route
from nanochat_ray.serve.settings import HttpSettings
from nanochat_ray.serve.writers import ChatWriter, CompletionWriter

OWNER = "nanochat-ray"


class EventStream(Response):
    media_type = "text/event-stream"


_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_EVENTS: dict[str, Any] = {"text/event-stream": {"schema": _EVENT}}
_NOT_HERE = (401, 403, 404)
_NOT_NOW = (400, 408, 413, 415, 429, 500, 503, 504)


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document. With "default" FastAPI does not add its own 422, which never comes."""
    body = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
    listed: dict[int | str, dict[str, Any]] = {
        status: {"description": HTTPStatus(status).phrase, "content": body} for status in statuses
    }
    return {**listed, "default": {"description": "Any other error", "model": ErrorBody}}


_ERRORS = _errors(*_NOT_HERE, *_NOT_NOW)
_READ_ERRORS = _errors(*_NOT_HERE, 503)


def create_app(backend: Backend, settings: HttpSettings | None = None) -> FastAPI:
    """The API, the page and the health checks over a backend.

    FileNotFoundError or ValueError for a file of keys without keys.
    """
    settings = settings or HttpSettings()
    keys = settings.keys()
    app = FastAPI(
        title="nanochat-ray",
        description="One chat model, behind OpenAI's API and nanochat's own.",
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    install_error_handlers(app)
    # The key is asked for by the Guard; this only says so in the OpenAPI document.
    keyed = APIRouter(
        route_class=json_route(settings.max_body_bytes),
        dependencies=[Security(HTTPBearer(auto_error=False))] if keys else [],
    )
    _add_generation(keyed, backend, settings)
    _add_models(keyed, backend)
    add_health(app, keyed, backend, _READ_ERRORS)
    app.include_router(keyed)
    add_page(app)
    # The last one added is the outermost.
    app.add_middleware(Guard, keys=keys)
    app.add_middleware(
        RequestLog, timeout_s=settings.request_timeout_s, log_conversations=settings.log_conversations
    )
    if settings.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allow_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app


def _add_generation(routes: APIRouter, backend: Backend, settings: HttpSettings) -> None:
    def relay(request: Request, plan: Plan, writer: Writer, stream: bool) -> Relay:
        note = Note.of(request.scope)
        note.model = plan.model.name
        if settings.log_conversations:
            note.prompt = "\n".join(plan.model.tokenizer.decode(prompt) for prompt in plan.prompts)
        return Relay(backend, plan, writer, stream, settings.keep_alive_s)

    @routes.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={200: {"content": _EVENTS}, **_ERRORS},
    )
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """Answer a conversation; with `stream` as server-sent events."""
        plan = await plan_chat(backend, settings, body)
        return relay(request, plan, ChatWriter(plan, body.with_usage), bool(body.stream))

    @routes.post("/v1/completions", response_model=Completion, responses={200: {"content": _EVENTS}, **_ERRORS})
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continue text; with `stream` as server-sent events."""
        plan = await plan_completion(backend, settings, body)
        return relay(request, plan, CompletionWriter(plan, body.with_usage, bool(body.echo)), bool(body.stream))

    @routes.post(NATIVE_PATH, response_class=EventStream, responses={200: {"content": _EVENTS}, **_ERRORS})
    async def native(request: Request, body: NativeRequest) -> Response:
        """Nanochat's own API: always a stream."""
        plan = await plan_native(backend, settings, body)
        return relay(request, plan, NativeWriter(plan), True)


def _add_models(routes: APIRouter, backend: Backend) -> None:
    @routes.get("/v1/models", response_model=ModelList, responses=_READ_ERRORS)
    async def models() -> Response:
        """All models that a request can name; the first answers those that name none."""
        return json_response({"object": "list", "data": [_card(model) for model in backend.models]})

    @routes.get("/v1/models/{model}", response_model=ModelCard, responses=_READ_ERRORS)
    async def model(model: str) -> Response:
        """One model."""
        return json_response(_card(find_model(backend, model)))


def _card(model: ServedModel) -> dict[str, Any]:
    defaults = model.defaults
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": OWNER,
        "context": model.context,
        "chat": model.chat,
        "defaults": {
            "temperature": defaults.temperature,
            "top_k": defaults.top_k or 0,
            "top_p": defaults.top_p,
            "max_tokens": defaults.max_tokens,
        },
        "lineage": model.lineage,
    }

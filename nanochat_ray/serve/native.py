"""Nanochat's own endpoint: always a stream, of `{"token": text, "gpu": 0}` events and `{"done": true}` at the end."""

from __future__ import annotations

from collections.abc import Sequence
from json.encoder import encode_basestring
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from nanochat_ray.engine.stream_text import Brackets
from nanochat_ray.messages import TokenEvent
from nanochat_ray.serve.answers import Sample, sse
from nanochat_ray.serve.backend import Backend
from nanochat_ray.serve.errors import ApiError
from nanochat_ray.serve.plan import Plan, plan_chat
from nanochat_ray.serve.protocol import Answer, ChatRequest, Question, Request, whole
from nanochat_ray.serve.settings import HttpSettings

MAX_MESSAGES = 500
MAX_MESSAGE_CHARS = 8_000
MAX_CONVERSATION_CHARS = 32_000
MAX_TOP_K = 200
MAX_TOKENS = 4096


class NativeMessage(Request):
    role: Literal["system", "user", "assistant"]
    content: str = Field(min_length=1, max_length=MAX_MESSAGE_CHARS)


class NativeRequest(Request):
    """What is left out, or null, comes from the model's defaults."""

    messages: list[NativeMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_k: Annotated[int, *whole(0, MAX_TOP_K)] | None = Field(None, description="0: the whole vocabulary")
    max_tokens: Annotated[int, *whole(1, MAX_TOKENS)] | None = None

    @model_validator(mode="after")
    def _not_too_long(self) -> NativeRequest:
        n_chars = sum(len(message.content) for message in self.messages)
        if n_chars > MAX_CONVERSATION_CHARS:
            raise ValueError(f"messages of at most {MAX_CONVERSATION_CHARS} characters together, not {n_chars}")
        return self


async def plan_native(backend: Backend, settings: HttpSettings, body: NativeRequest) -> Plan:
    """ApiError for a request that cannot be answered as it is."""
    same = ChatRequest(
        messages=[_openai(message) for message in body.messages],
        temperature=body.temperature,
        top_k=body.top_k,
        max_tokens=body.max_tokens,
    )
    return await plan_chat(backend, settings, same)


def _openai(message: NativeMessage) -> Question | Answer:
    if message.role == "assistant":
        return Answer(role="assistant", content=message.content)
    return Question(role=message.role, content=message.content)


class NativeWriter:
    """Text as it comes; a tool call as `[12*7 = 84]`."""

    def __init__(self, plan: Plan) -> None:
        self._sample = Sample(plan.model.tokenizer, plan.stops)
        self._brackets = Brackets()
        self._prompt_tokens = plan.prompt_tokens

    def feed(self, prompt: int, events: Sequence[TokenEvent]) -> bytes:
        text = "".join(self._brackets.feed(self._sample.feed(event)) for event in events)
        if self._sample.finish_reason is not None:
            text += self._brackets.finish()
        return f'data: {{"token":{encode_basestring(text)},"gpu":0}}\n\n'.encode() if text else b""

    def last(self) -> bytes:
        return sse({"done": True})

    def whole(self) -> dict[str, Any]:
        raise AssertionError("this endpoint always streams")

    def error(self, error: ApiError) -> bytes:
        return sse(error.body())

    @property
    def counts(self) -> dict[str, int]:
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": self._sample.n_tokens}

    def text(self) -> str:
        return "".join(part["text"] for part in self._sample.parts)

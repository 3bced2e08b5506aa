"""From a request's body to what the engine is asked for: model, prompts, sampling parameters."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nanochat_ray.messages import SamplingParams
from nanochat_ray.serve.backend import Backend, ServedModel
from nanochat_ray.serve.errors import ApiError
from nanochat_ray.serve.protocol import Answer, ChatRequest, CompletionRequest, Question, SamplingRequest
from nanochat_ray.serve.settings import HttpSettings
from nanochat_ray.text.conversation import render_prompt
from nanochat_ray.text.tokenizer import Tokenizer

_UNLIMITED_TOKENS = 1 << 62  # for render_prompt, which would drop the oldest turns beyond its limit
_INLINE_CHARS = 4_000  # of a prompt; a longer one is tokenized in a thread, so that other streams go on


@dataclass(frozen=True)
class Plan:
    """One request of the engine's kind for each prompt."""

    model: ServedModel
    prompts: list[list[int]]
    params: list[SamplingParams]  # of each prompt

    @property
    def samples(self) -> int:
        """Of each prompt."""
        return self.params[0].num_samples

    @property
    def stops(self) -> tuple[str, ...]:
        return self.params[0].stop

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


def find_model(backend: Backend, name: str | None, chat: bool = False) -> ServedModel:
    """The model with this name; without one the first, or the first that can chat. ApiError 404, 400 or 503."""
    models = list(backend.models)
    if not models:
        raise ApiError(503, "No model is loaded yet; try again soon.", code="loading", headers={"retry-after": "2"})
    if name is None:
        found = next((model for model in models if model.chat), models[0]) if chat else models[0]
    else:
        named = [model for model in models if model.name == name]
        if not named:
            known = ", ".join(model.name for model in models)
            raise ApiError(404, f"There is no model {name[:100]!r} here, but: {known}.", "model", "model_not_found")
        found = named[0]
    if chat and not found.chat:
        message = f"{found.name} is a base model, which continues text and knows no conversations: use /v1/completions."
        raise ApiError(400, message, "model", "model_not_supported")
    return found


async def plan_chat(backend: Backend, settings: HttpSettings, body: ChatRequest) -> Plan:
    """ApiError for a request that cannot be answered as it is."""
    model = find_model(backend, body.model, chat=True)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs: it needs logprobs to be true", "top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    prompt = await chat_prompt(model, settings, [_plain(k, message) for k, message in enumerate(body.messages)])
    newer = body.max_completion_tokens is not None
    asked, param = (body.max_completion_tokens, "max_completion_tokens") if newer else (body.max_tokens, "max_tokens")
    limit = answer_tokens(model, settings, prompt, asked, param)
    _check_samples(settings, body.n or 1)
    return Plan(model, [prompt], [_sampling(model, body, limit, logprobs, use_tools=body.use_tools is not False)])


async def plan_completion(backend: Backend, settings: HttpSettings, body: CompletionRequest) -> Plan:
    """ApiError for a request that cannot be answered as it is."""
    model = find_model(backend, body.model)
    if body.echo and body.logprobs is not None:
        raise ApiError(400, "logprobs: those of the prompt, which echo asks for, are not computed", "logprobs")
    given = body.prompt if body.prompt is not None else ""
    single = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
    texts: list[Any] = [given] if single else list(given)
    if not 1 <= len(texts) <= settings.max_samples:
        raise ApiError(400, f"prompt: 1 to {settings.max_samples} of them, not {len(texts)}", "prompt")
    _check_samples(settings, len(texts) * (body.n or 1))
    prompts = [await _raw_prompt(model, text) for text in texts]
    params = []
    for prompt in prompts:
        _check_length(model, settings, len(prompt), "prompt")
        limit = answer_tokens(model, settings, prompt, body.max_tokens, "max_tokens")
        params.append(_sampling(model, body, limit, body.logprobs, use_tools=body.use_tools is True))
    return Plan(model, prompts, params)


async def chat_prompt(model: ServedModel, settings: HttpSettings, messages: list[dict[str, Any]]) -> list[int]:
    """Ids that ask for the next answer; nothing of the conversation is left out. ApiError if it does not fit."""
    if len(messages) > settings.max_messages:
        message = f"messages: at most {settings.max_messages}, not {len(messages)}"
        raise ApiError(400, message, "messages", "too_many_messages")

    def rendered() -> list[int]:
        return render_prompt(model.tokenizer, messages, max_tokens=_UNLIMITED_TOKENS).ids

    n_chars = sum(_n_chars(message["content"]) for message in messages)
    try:
        ids = rendered() if n_chars <= _INLINE_CHARS else await asyncio.to_thread(rendered)
    except ValueError as error:
        raise ApiError(400, f"messages: {error}", "messages") from error
    _check_length(model, settings, len(ids), "messages")
    return ids


def answer_tokens(
    model: ServedModel, settings: HttpSettings, prompt: Sequence[int], asked: int | None, param: str
) -> int:
    """How long an answer may become. What is asked for is an upper bound: the context may leave less."""
    longest = min(settings.max_new_tokens or model.context, model.context)
    if asked is not None and asked > longest:
        message = f"{param}: at most {longest} for {model.name}, whose context is {model.context} tokens, not {asked}"
        raise ApiError(400, message, param, "max_tokens_exceeded")
    room = model.context - len(prompt)
    return min(asked or min(model.defaults.max_tokens, longest), room)


def _check_length(model: ServedModel, settings: HttpSettings, n_tokens: int, param: str) -> None:
    if n_tokens >= model.context:
        message = (
            f"{model.name} has a context of {model.context} tokens for prompt and answer together; the {param} come "
            f"to {n_tokens} tokens. Shorten them."
        )
        raise ApiError(400, message, param, "context_length_exceeded")
    if settings.max_prompt_tokens is not None and n_tokens > settings.max_prompt_tokens:
        message = f"This server reads prompts of at most {settings.max_prompt_tokens} tokens; this one has {n_tokens}."
        raise ApiError(400, message, param, "context_length_exceeded")


def _check_samples(settings: HttpSettings, n: int) -> None:
    if n > settings.max_samples:
        raise ApiError(400, f"n: at most {settings.max_samples} answers per request, not {n}", "n")


def _sampling(
    model: ServedModel, body: SamplingRequest, max_tokens: int, logprobs: int | None, use_tools: bool
) -> SamplingParams:
    """Without a seed a new one each time, also for each prompt of a list."""
    defaults = model.defaults
    return replace(
        defaults,
        temperature=defaults.temperature if body.temperature is None else body.temperature,
        top_p=defaults.top_p if body.top_p is None else body.top_p,
        top_k=defaults.top_k if body.top_k is None else body.top_k,
        max_tokens=max_tokens,
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        num_samples=body.n or 1,
        use_tools=use_tools,
        stop=body.stops,
        logprobs=logprobs,
    )


def _plain(k: int, message: Question | Answer) -> dict[str, Any]:
    """A message as text/conversation.py knows it."""
    if isinstance(message, Question):
        role = "system" if message.role == "developer" else message.role
        text = message.content if isinstance(message.content, str) else "".join(part.text for part in message.content)
        return {"role": role, "content": text}
    said = message.content if message.parts is None else message.parts
    if said is None:
        place = f"messages.{k}.content"
        raise ApiError(400, f"{place}: an assistant's message needs content or parts", place)
    content = said if isinstance(said, str) else [{"type": part.type, "text": part.text} for part in said]
    return {"role": message.role, "content": content}


def _n_chars(content: str | list[dict[str, str]]) -> int:
    return len(content) if isinstance(content, str) else sum(len(part["text"]) for part in content)


async def _raw_prompt(model: ServedModel, text: str | list[int]) -> list[int]:
    """Text or ids with BOS in front, once."""
    tokenizer: Tokenizer = model.tokenizer
    if isinstance(text, str):
        if len(text) <= _INLINE_CHARS:
            return tokenizer.encode(text, prepend=tokenizer.bos_id)
        return await asyncio.to_thread(tokenizer.encode, text, prepend=tokenizer.bos_id)
    if max(text) >= tokenizer.vocab_size:
        message = f"prompt: {model.name} has {tokenizer.vocab_size} tokens, so there is no token {max(text)}"
        raise ApiError(400, message, "prompt")
    return text if text[0] == tokenizer.bos_id else [tokenizer.bos_id, *text]

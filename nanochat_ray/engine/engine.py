"""Generation: prompts and sampling parameters in, a stream of tokens out, many sequences in one batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanochat_ray.engine.kv_cache import KVCache
from nanochat_ray.engine.sampler import row_generator, sample
from nanochat_ray.engine.tool_use import ToolState
from nanochat_ray.messages import FinishReason, Rollout, SamplingParams, TokenEvent
from nanochat_ray.model.gpt import GPT
from nanochat_ray.text.tokenizer import Tokenizer


@dataclass
class _Stream:
    """One sample of one prompt while it is being decoded."""

    prompt: int
    sample: int
    max_tokens: int
    generator: torch.Generator
    tools: ToolState | None
    forced: deque[int] = field(default_factory=deque)  # tokens that a tool wants next
    n_tokens: int = 0
    last: int = -1
    finished: bool = False

    def take(self, sampled: int, terminals: frozenset[int]) -> TokenEvent:
        """Append the sampled token, or the forced one that is due instead of it."""
        forced = bool(self.forced)
        token = self.forced.popleft() if forced else sampled
        if self.tools is not None and not forced:
            self.forced.extend(self.tools.feed(token))
        self.n_tokens += 1
        self.last = token
        reason: FinishReason | None = None
        if token in terminals:
            reason = "stop"
        elif self.n_tokens == self.max_tokens:
            reason = "length"
        self.finished = reason is not None
        return TokenEvent(self.prompt, self.sample, token, forced, reason)


@dataclass
class _Prefilled:
    """A prompt that has been read, and those of its samples that have not begun."""

    cache: KVCache  # one row
    logits: Tensor  # (1, V) of the prompt's last position
    waiting: deque[_Stream]


class Engine:
    """Decodes with a key-value cache, up to `max_rows` sequences of any prompts at once.

    A finished row leaves the batch, and prompts that wait take the room. The tokens of one sample do not depend on what
    else is in the batch, up to the rounding of matrix products of different sizes.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, max_rows: int = 64) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows {max_rows}: an engine needs at least one row")
        self.model, self.tokenizer, self.max_rows = model, tokenizer, max_rows
        self.terminals = frozenset({tokenizer.encode_special("<|assistant_end|>"), tokenizer.bos_id})

    @property
    def context(self) -> int:
        """Positions a sequence may fill, prompt included."""
        return self.model.config.sequence_len

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Iterator[TokenEvent]:
        """Decode `params.num_samples` completions of each prompt; events of all streams in the order of decoding.

        A stream ends with the event that has a finish reason: "stop" with its terminal token (the assistant's end or
        BOS), "length" at `max_tokens` or when the context is full. Closing the iterator stops everything. Raises
        ValueError, before anything is decoded, for an empty prompt, one longer than the context, ids beyond the
        vocabulary and parameters without meaning.
        """
        self._check(prompts, params)
        return self._decode_all(prompts, params)

    def rollouts(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[Rollout]]:
        """What `generate` gives, collected: a list of `num_samples` completions for each prompt, in order."""
        events: list[list[list[TokenEvent]]] = [[[] for _ in range(params.num_samples)] for _ in prompts]
        for event in self.generate(prompts, params):
            events[event.prompt][event.sample].append(event)
        return [
            [_rollout(prompt, stream) for stream in streams] for prompt, streams in zip(prompts, events, strict=True)
        ]

    def _check(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
        if params.max_tokens < 1 or params.num_samples < 1:
            raise ValueError(
                f"max_tokens {params.max_tokens} and num_samples {params.num_samples} must be at least 1"
            )
        if params.temperature < 0 or (params.top_k or 0) < 0:
            raise ValueError(f"temperature {params.temperature} and top_k {params.top_k} must not be negative")
        vocab_size = self.model.config.vocab_size
        for number, prompt in enumerate(prompts):
            if not 1 <= len(prompt) <= self.context:
                raise ValueError(
                    f"prompt {number} has {len(prompt)} tokens, the model's context is 1 to {self.context}; shorten it"
                )
            if not 0 <= min(prompt) <= max(prompt) < vocab_size:
                raise ValueError(f"prompt {number} has an id that is not among the model's 0 to {vocab_size - 1}")

    def _decode_all(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Iterator[TokenEvent]:
        # The last token of a stream is never read, so a prompt that fills the context still gets one.
        capacity = min(max((len(prompt) for prompt in prompts), default=1) + params.max_tokens - 1, self.context)
        prefills = (self._prefill(number, prompt, params) for number, prompt in enumerate(prompts))
        group = next(prefills, None)
        streams: list[_Stream] = []
        cache: KVCache | None = None
        while group or streams:
            # Joining copies the whole batch, so it waits until some room has come together.
            if group and (not streams or len(streams) <= 0.75 * self.max_rows):
                parts = [cache] if cache else []
                while group and len(streams) < self.max_rows:
                    room = min(self.max_rows - len(streams), len(group.waiting))
                    new = [group.waiting.popleft() for _ in range(room)]
                    yield from self._advance(new, group.logits.expand(room, -1), params)
                    new = [stream for stream in new if not stream.finished]
                    if new:
                        parts.append(group.cache.expand(len(new), capacity))
                        streams += new
                    group = group if group.waiting else next(prefills, None)
                cache = _join(parts, capacity)
            if cache:
                yield from self._advance(streams, self._forward(streams, cache), params)
                order = _evict(cache, [stream.finished for stream in streams])
                streams = [streams[row] for row in order]
                cache = cache if streams else None

    def _advance(self, streams: list[_Stream], logits: Tensor, params: SamplingParams) -> Iterator[TokenEvent]:
        """One token for each stream. Every position draws, forced ones too: draw n of a stream belongs to token n."""
        sampled = sample(logits, params.temperature, params.top_k, [stream.generator for stream in streams])
        for stream, token in zip(streams, sampled.tolist(), strict=True):
            yield stream.take(token, self.terminals)

    @torch.inference_mode()
    def _prefill(self, number: int, prompt: Sequence[int], params: SamplingParams) -> _Prefilled:
        model = self.model
        cache = KVCache(model.config, 1, len(prompt), model.device, model.compute_dtype)
        idx = torch.tensor([list(prompt)], device=model.device)  # (1, T)
        logits = model(idx, cache=cache, last_only=True)[:, 0]  # (1, V)
        max_tokens = min(params.max_tokens, self.context + 1 - len(prompt))
        waiting = deque(
            _Stream(
                prompt=number,
                sample=k,
                max_tokens=max_tokens,
                generator=row_generator(params.seed, k),
                tools=ToolState(self.tokenizer) if params.use_tools else None,
            )
            for k in range(params.num_samples)
        )
        return _Prefilled(cache, logits, waiting)

    @torch.inference_mode()
    def _forward(self, streams: list[_Stream], cache: KVCache) -> Tensor:
        """Feed every stream its last token: logits (R, V) of the next."""
        idx = torch.tensor([[stream.last] for stream in streams], device=self.model.device)  # (R, 1)
        return self.model(idx, cache=cache, last_only=True)[:, 0]


@torch.inference_mode()
def _evict(cache: KVCache, finished: list[bool]) -> list[int]:
    """Drop rows in place; returns the rows that stay, in their new order.

    The last rows move into the places that become free, so that the cost is that of one row and not of the batch.
    """
    n = finished.count(False)
    stay = [row for row in range(n, len(finished)) if not finished[row]]
    order = [stay.pop() if finished[row] else row for row in range(n)]
    if n == len(finished) or n == 0:
        return order
    for new, old in enumerate(order):
        if new != old:
            length = cache.lengths[old]
            cache.k[:, new, :length] = cache.k[:, old, :length]
            cache.v[:, new, :length] = cache.v[:, old, :length]
    cache.k, cache.v = cache.k[:, :n], cache.v[:, :n]
    cache.lengths = [cache.lengths[row] for row in order]
    cache.prev_ids = cache.prev_ids[order]
    return order


def _join(parts: list[KVCache], capacity: int) -> KVCache | None:
    if len(parts) > 1:
        return KVCache.concat(parts, capacity)
    return parts[0] if parts else None


def _rollout(prompt: Sequence[int], events: list[TokenEvent]) -> Rollout:
    reason = events[-1].finish_reason
    assert reason is not None, "a stream ends with a finish reason"
    terminal = events[-1].token if reason == "stop" else None
    kept = events[:-1] if reason == "stop" else events
    return Rollout(
        prompt_ids=list(prompt),
        token_ids=[event.token for event in kept],
        mask=[int(not event.forced) for event in kept],
        finish_reason=reason,
        terminal_token=terminal,
    )


@torch.inference_mode()
def naive_generate(
    model: GPT, ids: Sequence[int], max_tokens: int, temperature: float = 1.0, top_k: int | None = None, seed: int = 42
) -> Iterator[int]:
    """`max_tokens` ids after `ids`, each by a whole forward pass: the reference that the engine is tested against.

    No cache, no tools, no stop. With `top_k`, all ids as likely as the k-th stay in.
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    idx = torch.tensor([list(ids)], device=model.device)  # (1, T)
    for _ in range(max_tokens):
        logits = model(idx, last_only=True)[:, 0]  # (1, V)
        if temperature == 0:
            token = logits.argmax(dim=-1, keepdim=True)
        else:
            logits = logits / temperature
            if top_k:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -torch.inf)
            token = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
        idx = torch.cat([idx, token], dim=1)
        yield int(token)

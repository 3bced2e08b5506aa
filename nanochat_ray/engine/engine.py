"""Generation: requests come and go between steps, all that run share each step's forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psutil
import torch

from nanochat_ray.engine.blocks import Node
from nanochat_ray.engine.calculator import calculate
from nanochat_ray.engine.cuda_graphs import DecodeGraphs
from nanochat_ray.engine.kv_cache import KVCache, kinds_of, page_bytes, pages_needed
from nanochat_ray.engine.sampler import RowSampler, check_sampling, sample_rows
from nanochat_ray.engine.scheduler import Scheduler, Stream
from nanochat_ray.engine.stream_text import StreamText
from nanochat_ray.engine.tool_use import Tool, ToolState
from nanochat_ray.messages import Rollout, SamplingParams, TokenEvent
from nanochat_ray.model.gpt import GPT
from nanochat_ray.text.tokenizer import Tokenizer

# Of the free memory, how much the cache may take when it is not told.
KV_FRAC_CPU, KV_FRAC_GPU = 0.25, 0.8
Params = SamplingParams | Sequence[SamplingParams]


@dataclass(frozen=True)
class EngineStats:
    """What an engine is doing, and what it has done since it was made."""

    running: int  # streams
    waiting: int
    blocks_used: int  # pages of the cache that streams hold
    blocks_total: int
    prompt_tokens: int  # of the streams that began; each sample counts its prompt
    cached_tokens: int  # of those, found in the cache
    sampled_tokens: int
    preemptions: int
    version: int  # of the weights for new requests


class _Weights:
    """One version: the network, the root of what was computed with it, and its decoding steps on a GPU."""

    def __init__(self, model: GPT) -> None:
        self.model, self.root = model, Node()
        self.graphs = DecodeGraphs(model) if model.device.type == "cuda" else None


class Engine:
    """Decodes up to `max_rows` streams at once with a paged key-value cache (arXiv:2309.06180).

    Between two steps requests join and leave. A step computes the next token of every running stream and at most
    `chunk_tokens` tokens of prompts. Beginnings that were computed before are found in the cache. The tokens of one
    sample do not depend on what else is running, up to the rounding of matrix products of different sizes.
    Not for several threads at once.
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, max_rows: int = 64, *, block_size: int = 16, chunk_tokens: int = 256,
        kv_bytes: int | None = None, prefix_cache: bool = True, tools: Sequence[Tool] = (calculate,),
    ) -> None:  # fmt: skip
        """`kv_bytes` is the memory of the cache; unset, what `max_rows` whole contexts need, within the free memory.

        `tools` are asked in turn for the output of a python block, see `ToolState`.
        """
        if min(max_rows, block_size, chunk_tokens) < 1:
            raise ValueError(
                f"max_rows {max_rows}, block_size {block_size} and chunk_tokens {chunk_tokens} must be at least 1"
            )
        self.tokenizer, self.max_rows, self.chunk_tokens = tokenizer, max_rows, chunk_tokens
        self.tools = tuple(tools)
        self.terminals = frozenset({tokenizer.encode_special("<|assistant_end|>"), tokenizer.bos_id})
        self.version = 0
        self._weights = {0: _Weights(model)}  # by version
        n_pages = _n_pages(model, max_rows, block_size, chunk_tokens, kv_bytes)
        config = model.config
        cache = KVCache(
            config, n_pages, max_rows, config.sequence_len, block_size, model.device, model.compute_dtype
        )
        self._scheduler = Scheduler(cache, max_rows, chunk_tokens, prefix_cache)
        self._requests: dict[int, list[Stream]] = {}  # those that have not ended
        self._n_requests = self._sampled_tokens = 0
        self._unread: dict[int, list[TokenEvent]] = {}  # events of one `generate` that another one came by

    @property
    def model(self) -> GPT:
        """The network for new requests."""
        return self._weights[self.version].model

    @property
    def context(self) -> int:
        """Positions a sequence may fill, prompt included."""
        return self.model.config.sequence_len

    @property
    def busy(self) -> bool:
        """Whether any stream runs or waits."""
        return bool(self._requests)

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raise ValueError for a request that cannot be served.

        An empty prompt, one longer than the context, ids beyond the vocabulary, parameters without meaning, and more
        positions than the whole cache has.
        """
        p = params
        if p.max_tokens < 1 or p.num_samples < 1:
            raise ValueError(f"max_tokens {p.max_tokens} and num_samples {p.num_samples} must be at least 1")
        check_sampling(p)
        if not 1 <= len(prompt) <= self.context:
            raise ValueError(
                f"a prompt has {len(prompt)} tokens, the model's context is 1 to {self.context}; shorten it"
            )
        vocab_size = self.model.config.vocab_size
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(f"a prompt has an id that is not among the model's 0 to {vocab_size - 1}")
        cache = self._scheduler.cache
        longest = min(len(prompt) + p.max_tokens - 1, self.context)
        wanted = cache.most_pages(longest, self.chunk_tokens)
        if wanted > cache.pool.n_pages:
            raise ValueError(
                f"{len(prompt)} tokens of prompt and {p.max_tokens} more need {wanted} pages of the cache, "
                f"which has {cache.pool.n_pages}; ask for less, or give it more memory"
            )

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Queue a request; its number, which stands in the events of its streams. ValueError as in `check`."""
        streams = self._new_streams(prompt, params, self._weights[self.version].root)
        self._scheduler.waiting += streams
        return streams[0].request

    def _new_streams(self, prompt: Sequence[int], params: SamplingParams, root: Node) -> list[Stream]:
        """The streams of a new request, which are noted as such. ValueError as in `check`."""
        self.check(prompt, params)
        number, self._n_requests = self._n_requests, self._n_requests + 1
        self._requests[number] = streams = [
            Stream(
                request=number,
                sample=sample,
                version=self.version,
                root=root,
                n_prompt=len(prompt),
                tokens=list(prompt),
                # The last token of a stream is never read, so a prompt that fills the context still gets one.
                max_len=min(len(prompt) + params.max_tokens, self.context + 1),
                sampler=RowSampler(params, sample),
                tools=ToolState(self.tokenizer, self.tools) if params.use_tools else None,
                text=StreamText(self.tokenizer, params.stop) if params.stop else None,
            )
            for sample in range(params.num_samples)
        ]
        return streams

    def cancel(self, number: int) -> None:
        """End a request without another event; its rows and blocks are free at once. One that has ended is ignored."""
        for stream in self._requests.pop(number, ()):
            self._scheduler.drop(stream)
        self._forget_old_weights()

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Compute once: at most one token of every stream. A stream ends with the event that has a finish reason.

        That is "stop" with its terminal token (the assistant's end or BOS) or with the token that completes a stop
        text, "length" at `max_tokens` or when the context is full.
        """
        planned = self._scheduler.plan()
        events = []
        for version in sorted({stream.version for stream, _ in planned}):
            events += self._forward(self._weights[version], [part for part in planned if part[0].version == version])
        if any(event.finish_reason for event in events):
            self._forget_old_weights()
        return events

    def _forward(self, weights: _Weights, planned: Sequence[tuple[Stream, int]]) -> list[TokenEvent]:
        scheduler = self._scheduler
        parts = []
        for stream, n in planned:
            assert stream.row is not None
            parts.append((stream.row, stream.tokens[stream.row.n : stream.row.n + n]))
        decoding = all(stream.pending == 1 and row.n for (row, _), (stream, _) in zip(parts, planned, strict=True))
        step = scheduler.cache.step(parts, padded=decoding and weights.graphs is not None)
        ordered = [planned[k] for k in step.order]
        ready = [place for place, (stream, n) in enumerate(ordered) if stream.pending == n]
        if decoding and weights.graphs is not None:
            logits = weights.graphs(step)  # (R, V)
        else:
            at = step.last[torch.tensor(ready, dtype=torch.int64, device=step.last.device)]
            logits = weights.model(step.idx, cache=step, at=at)  # (ready, V)
        step.done()
        for stream, _ in ordered:
            scheduler.computed(stream)
        events = []
        sampled = sample_rows(logits, [ordered[place][0].sampler for place in ready]) if ready else []
        for place, token in zip(ready, sampled, strict=True):
            stream = ordered[place][0]
            events.append(stream.take(token, self.terminals))
            self._sampled_tokens += not events[-1].forced
            if stream.finished:
                scheduler.drop(stream)
                streams = self._requests[stream.request]
                streams.remove(stream)
                if not streams:
                    del self._requests[stream.request]
        return events

    def update(self, model: GPT) -> int:
        """Take new weights for the requests submitted from now on; those in flight keep theirs. Returns the version.

        ValueError unless the network has the same shape, precision and device.
        """
        old = self.model
        if (model.config, model.compute_dtype, model.device) != (old.config, old.compute_dtype, old.device):
            raise ValueError(
                f"new weights must fit the old ones' place: {model.config}, {model.compute_dtype}, {model.device} "
                f"instead of {old.config}, {old.compute_dtype}, {old.device}; start another engine"
            )
        self.version += 1
        self._weights[self.version] = _Weights(model)
        self._forget_old_weights()
        return self.version

    def _forget_old_weights(self) -> None:
        if len(self._weights) > 1:
            alive = {stream.version for streams in self._requests.values() for stream in streams} | {self.version}
            self._weights = {version: kept for version, kept in self._weights.items() if version in alive}

    def forget(self) -> None:
        """Empty the cache of what no running stream holds."""
        self._scheduler.cache.pool.forget()

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        pool = scheduler.cache.pool
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            blocks_used=pool.held,
            blocks_total=pool.n_pages,
            prompt_tokens=scheduler.prompt_tokens,
            cached_tokens=scheduler.cached_tokens,
            sampled_tokens=self._sampled_tokens,
            preemptions=scheduler.preemptions,
            version=self.version,
        )

    def generate(self, prompts: Sequence[Sequence[int]], params: Params) -> Iterator[TokenEvent]:
        """Decode `num_samples` completions of each prompt; events of all streams in the order of decoding.

        `params` are for all prompts, or one for each. An event's `prompt` is the index in `prompts`. Closing the
        iterator stops everything. Raises ValueError as `check` does, before anything is decoded. Not to be mixed with
        `submit` and `step`.
        """
        each = _for_each(prompts, params)
        for number, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
            try:
                self.check(prompt, own)
            except ValueError as error:
                raise ValueError(f"prompt {number}: {error}") from None
        return self._decode_all(prompts, each)

    def _decode_all(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> Iterator[TokenEvent]:
        index: dict[int, int] = {}
        try:
            for k, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
                number = self.submit(prompt, own)
                index[number], self._unread[number] = k, []
            while any(number in self._requests or self._unread[number] for number in index):
                mine = [event for number in index for event in self._unread[number]]
                for number in index:
                    self._unread[number] = []
                for event in mine:
                    yield _renumbered(event, index[event.prompt])
                for event in [] if mine else self.step():
                    self._unread[event.prompt].append(event)
        finally:
            for number in index:
                self.cancel(number)
                self._unread.pop(number, None)

    def rollouts(self, prompts: Sequence[Sequence[int]], params: Params) -> list[list[Rollout]]:
        """What `generate` gives, collected: a list of `num_samples` completions for each prompt, in order."""
        each = _for_each(prompts, params)
        events: list[list[list[TokenEvent]]] = [[[] for _ in range(own.num_samples)] for own in each]
        for event in self.generate(prompts, params):
            events[event.prompt][event.sample].append(event)
        return [
            [self._rollout(prompt, stream, own) for stream in streams]
            for prompt, streams, own in zip(prompts, events, each, strict=True)
        ]

    def _rollout(self, prompt: Sequence[int], events: list[TokenEvent], params: SamplingParams) -> Rollout:
        reason, last = events[-1].finish_reason, events[-1].token
        assert reason is not None, "a stream ends with a finish reason"
        terminal = last if last in self.terminals else None
        kept = events if terminal is None else events[:-1]
        return Rollout(
            prompt_ids=list(prompt),
            token_ids=[event.token for event in kept],
            mask=[int(not event.forced) for event in kept],
            finish_reason=reason,
            terminal_token=terminal,
            logprobs=None if params.logprobs is None else [event.logprob or 0.0 for event in kept],
            terminal_logprob=None if terminal is None else events[-1].logprob,
        )


def _for_each(prompts: Sequence[Sequence[int]], params: Params) -> list[SamplingParams]:
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, {len(each)} sampling parameters: give one for all, or one for each")
    return each


def _renumbered(event: TokenEvent, prompt: int) -> TokenEvent:
    return dataclasses.replace(event, prompt=prompt)


def _n_pages(model: GPT, max_rows: int, block_size: int, chunk_tokens: int, kv_bytes: int | None) -> int:
    """Pages of the cache."""
    lefts, layers = kinds_of(model.config)
    each = page_bytes(model.config, block_size, model.compute_dtype)
    one = pages_needed(lefts, [len(those) for those in layers], model.config.sequence_len, chunk_tokens, block_size)
    if kv_bytes is not None:
        if kv_bytes < each * model.config.n_layer:
            raise ValueError(f"kv_bytes {kv_bytes} are less than the {each * model.config.n_layer} of a single block")
        return kv_bytes // each
    if model.device.type == "cuda":
        free = int(torch.cuda.mem_get_info(model.device)[0] * KV_FRAC_GPU)
    else:
        free = int(psutil.virtual_memory().available * KV_FRAC_CPU)
    return max(one, min(max_rows * one, free // each))

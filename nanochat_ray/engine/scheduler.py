"""Which streams run in the next step, and on how many tokens each. No tensors here."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from nanochat_ray.engine.blocks import Node, known_beginning
from nanochat_ray.engine.kv_cache import KVCache, Row
from nanochat_ray.engine.sampler import RowSampler, Sampled
from nanochat_ray.engine.stream_text import StreamText
from nanochat_ray.engine.tool_use import ToolState
from nanochat_ray.messages import FinishReason, TokenEvent


@dataclass(eq=False)
class Stream:
    """One sample of one request.

    All that is known of it are its tokens. What of them has been computed lies in its row; a stream that lost its row
    is read again like a prompt, and goes on.
    """

    request: int
    sample: int
    version: int  # of the weights
    root: Node  # of all beginnings that were computed with these weights
    n_prompt: int
    tokens: list[int]  # prompt and completion
    max_len: int  # of the tokens
    sampler: RowSampler
    tools: ToolState | None
    text: StreamText | None  # looks for stop texts
    forced: deque[int] = field(default_factory=deque)  # tokens that a tool wants next
    row: Row | None = None
    cached_tokens: int | None = None  # of its prompt, once it has begun
    finished: bool = False

    @property
    def pending(self) -> int:
        """Tokens that are not computed yet: one while it is decoding, more while it is being read."""
        return len(self.tokens) - (self.row.n if self.row else 0)

    def take(self, sampled: Sampled, terminals: frozenset[int]) -> TokenEvent:
        """Append the sampled token, or the forced one that is due instead of it."""
        begins = len(self.tokens) == self.n_prompt
        forced = bool(self.forced)
        token = self.forced.popleft() if forced else sampled.token
        if self.tools is not None and not forced:
            self.forced.extend(self.tools.feed(token))
        self.tokens.append(token)
        if self.text is not None:
            self.text.feed(token)
        reason: FinishReason | None = None
        if token in terminals or (self.text is not None and self.text.stopped):
            reason = "stop"
        elif len(self.tokens) == self.max_len:
            reason = "length"
        self.finished = reason is not None
        cached = (self.cached_tokens or 0) if begins else 0
        if forced:
            return TokenEvent(self.request, self.sample, token, True, reason, cached_tokens=cached)
        return TokenEvent(self.request, self.sample, token, False, reason, sampled.logprob, sampled.top, cached)


class Scheduler:
    """First come, first served. Running streams go on in every step; the rest of it goes to prompts, in chunks.

    When the memory is full, the stream that began last loses its row and waits again at the front. The oldest stream
    always goes on, so everything ends.
    """

    def __init__(self, cache: KVCache, max_rows: int, chunk_tokens: int, prefix_cache: bool) -> None:
        self.cache, self.max_rows, self.chunk_tokens, self.prefix_cache = cache, max_rows, chunk_tokens, prefix_cache
        self.waiting: deque[Stream] = deque()
        self.running: list[Stream] = []  # in the order in which they began
        self.preemptions = self.prompt_tokens = self.cached_tokens = 0

    def drop(self, stream: Stream) -> None:
        """Forget a stream that ended or is not wanted any more; its row and blocks are free.

        Also after an interrupt in the middle of `plan`, wherever that left the stream.
        """
        if stream in self.running:
            self.running.remove(stream)
        if stream in self.waiting:
            self.waiting.remove(stream)
        if stream.row is not None:
            self._close(stream)

    def plan(self) -> list[tuple[Stream, int]]:
        """The streams of the next step with the number of tokens to compute; their blocks are there."""
        planned: list[tuple[Stream, int]] = []
        budget = self.chunk_tokens
        preempted = self.preemptions
        for stream in list(self.running):
            if stream.row is None:  # an older one needed its blocks
                continue
            pending = stream.pending
            n = min(pending, budget if pending > 1 else 1)
            if n and self._make_room(stream, n):
                planned.append((stream, n))
                budget -= n if pending > 1 else 0
        if self.preemptions == preempted:
            planned += self._admit(budget)
        return planned

    def computed(self, stream: Stream) -> None:
        """A planned part of the stream has been computed: share what is whole, give up what no window reaches."""
        assert stream.row is not None
        if self.prefix_cache:
            self.cache.publish(stream.row, stream.tokens)
        self.cache.trim(stream.row, stream.row.n)

    def _make_room(self, stream: Stream, n: int) -> bool:
        """Get blocks for n more tokens, from the streams that began last if need be; False if that hit the stream."""
        assert stream.row is not None
        while self.cache.missing_pages(stream.row, stream.row.n + n) > self.cache.pool.available:
            victim = self.running.pop()
            self._close(victim)
            self.waiting.appendleft(victim)
            self.preemptions += 1
            if victim is stream:
                return False
        self.cache.extend(stream.row, stream.row.n + n)
        return True

    def _admit(self, budget: int) -> list[tuple[Stream, int]]:
        """Begin with streams that wait, while the budget lasts and there are rows, and blocks for whole prompts."""
        planned: list[tuple[Stream, int]] = []
        if len(self.running) == self.max_rows:
            return planned
        for stream in list(self.waiting):
            if not budget or len(self.running) == self.max_rows:
                break
            known = self._known(stream)
            if self._is_being_read(stream, len(known) * self.cache.block_size):
                continue
            row = stream.row = self.cache.open()
            row.node = stream.root
            self.cache.adopt(row, known, stream.tokens)
            wanted = self.cache.most_pages(len(stream.tokens), self.chunk_tokens) - self.cache.held_pages(row)
            # Each running stream will soon want another block; one that begins now must not be the first to lose its.
            spare = len(self.running) * sum(self.cache.pool.layers)
            if self.running and wanted + spare > self.cache.pool.available:
                self._close(stream)
                break
            if stream.cached_tokens is None:
                stream.cached_tokens = row.n
                self.prompt_tokens += len(stream.tokens)
                self.cached_tokens += row.n
            n = min(stream.pending, budget)
            self.cache.extend(row, row.n + n)
            self.running.append(stream)
            self.waiting.remove(stream)
            planned.append((stream, n))
            budget -= n
        return planned

    def _known(self, stream: Stream) -> list[Node]:
        if not self.prefix_cache:
            return []
        return known_beginning(stream.root, stream.tokens, self.cache.block_size, self.cache.lefts)

    def _close(self, stream: Stream) -> None:
        row, stream.row = stream.row, None
        assert row is not None
        self.cache.close(row)

    def _is_being_read(self, stream: Stream, n_known: int) -> bool:
        """Whether a running stream is about to compute the block after the first `n_known` tokens."""
        stop = n_known + self.cache.block_size
        if not self.prefix_cache or stop >= len(stream.tokens):
            return False
        return any(
            other.root is stream.root
            and other.row is not None
            and other.row.n < stop < len(other.tokens)
            and other.tokens[:stop] == stream.tokens[:stop]
            for other in self.running
        )

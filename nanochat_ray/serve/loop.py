"""Engines behind asyncio: one thread steps them all, readers on event loops get what comes out."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nanochat_ray.messages import SamplingParams, TokenEvent
from nanochat_ray.serve.backend import EngineFailed, Overloaded, ServedModel

if TYPE_CHECKING:
    from nanochat_ray.engine.engine import Engine
    from nanochat_ray.model.gpt import GPT

logger = logging.getLogger(__name__)

RECENT_S = 60.0  # what Retry-After is estimated from
RETRY_AFTER_S = (1.0, 60.0)  # its bounds
UNKNOWN_RETRY_S = 5.0  # before any stream has ended
ENDED = "the engines' thread has ended"
MAX_SAMPLES = 10_000  # of times between two calls of `take_times`


@dataclass(eq=False)
class _Request:
    """One request, between its reader's event loop and the engines' thread."""

    lane: _Lane
    prompt: Sequence[int]
    params: SamplingParams
    reader: asyncio.AbstractEventLoop
    chunks: asyncio.Queue[list[TokenEvent] | Exception]  # used on the reader's loop only
    asked_s: float
    # The rest belongs to the engines' thread.
    number: int | None = None  # the engine's, once it has been submitted
    left: int = 1  # streams that have not ended
    held: list[TokenEvent] = field(default_factory=list)  # for the next chunk
    posted_s: float | None = None  # of the last chunk
    over: bool = False  # ended, failed or cancelled: its engine does not know it any more


@dataclass(eq=False)
class _Lane:
    """One model's engine and its requests."""

    served: ServedModel
    engine: Engine
    requests: dict[int, _Request] = field(default_factory=dict)
    live: int = 0  # streams asked for that have not ended, counted where requests come in
    failure: str | None = None
    snapshot: dict[str, Any] = field(default_factory=dict)
    cancelled: int = 0
    rejected: int = 0
    finished: int = 0  # requests


@dataclass(frozen=True)
class Times:
    """Seconds that requests have waited, for distributions."""

    first_token_s: list[tuple[str, float]]  # (model, from the request to its first token)
    between_tokens_s: list[tuple[str, float]]  # (model, mean over one chunk of one request)


class EngineLoop:
    """A Backend (see backend.py) over one engine per served model; all of them run in one thread.

    Requests, cancellations and new weights are applied between two steps. A request's first token is handed over at
    once; after that all requests get their tokens together, every `stream_interval_s` or, with many requests, so
    seldom that there are `max_chunks_per_s`: each chunk that leaves the process costs about half a millisecond of CPU,
    which the engine's thread lacks. The thread sleeps while there is nothing to do.

    `max_queue` bounds the streams of a model beyond its engine's rows. An engine whose step raises is not used again:
    its requests get EngineFailed, and `check_health` says so from then on.
    """

    def __init__(
        self, engines: Sequence[tuple[ServedModel, Engine]], max_queue: int = 128, stream_interval_s: float = 0.04,
        stuck_s: float = 60.0, max_chunks_per_s: float = 200.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        if not engines:
            raise ValueError("no models: an engine loop needs at least one")
        self._lanes = {served.name: _Lane(served, engine) for served, engine in engines}
        if len(self._lanes) < len(engines):
            raise ValueError(f"models {[served.name for served, _ in engines]}: every name may be there once")
        self.notes: dict[str, Any] = {}  # what `stats` says besides; JSON types only
        self._max_chunks_per_s = max_chunks_per_s
        self._max_queue, self._interval_s, self._stuck_s, self._clock = max_queue, stream_interval_s, stuck_s, clock
        self._orders: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._over = False  # the thread has ended, or is about to and takes no more orders
        self._working_since: float | None = None
        self._flushed_s = -math.inf
        self._ended: deque[float] = deque()  # when streams ended, over RECENT_S
        self._first_s: deque[tuple[str, float]] = deque(maxlen=MAX_SAMPLES)
        self._between_s: deque[tuple[str, float]] = deque(maxlen=MAX_SAMPLES)
        for lane in self._lanes.values():
            self._take_snapshot(lane)
        self._thread = threading.Thread(target=self._run, name="engines", daemon=True)
        self._thread.start()

    # --- for readers, on any event loop --------------------------------------------------------------------------

    @property
    def models(self) -> Sequence[ServedModel]:
        """What is served, with the lineage of the weights that new requests get."""
        return tuple(lane.served for lane in self._lanes.values())

    async def generate(
        self, model: ServedModel, prompt: Sequence[int], params: SamplingParams
    ) -> AsyncGenerator[list[TokenEvent], None]:
        """Backend.generate. Closing it, also by cancelling its reader, frees the request at the next step."""
        lane = self._lanes[model.name]
        self._admit(lane, params.num_samples)
        loop = asyncio.get_running_loop()
        request = _Request(lane, prompt, params, loop, asyncio.Queue(), self._clock(), left=params.num_samples)
        lane.live += params.num_samples
        left = params.num_samples
        try:
            self._order(lambda: self._submit(request))
            while left:
                chunk = await request.chunks.get()
                if isinstance(chunk, Exception):
                    raise chunk
                left -= sum(event.finish_reason is not None for event in chunk)
                yield chunk
        finally:
            lane.live -= params.num_samples
            if left:
                self._order(lambda: self._cancel(request))

    async def update(self, served: ServedModel, model: GPT) -> int:
        """Weights for requests of `served.name` that come from now on; those that run keep theirs. The new version."""
        lane = self._lanes[served.name]
        done: Future[int] = Future()

        def apply() -> None:
            try:
                if lane.failure:
                    raise EngineFailed(lane.failure)
                version = lane.engine.update(model)
            except Exception as error:
                done.set_exception(error)
                return
            lane.served = served
            self._take_snapshot(lane)
            done.set_result(version)

        self._order(apply)
        return await asyncio.wrap_future(done)

    def stats(self) -> dict[str, Any]:
        """Backend.stats: sums over the models, and each model's own numbers. Never waits for a step."""
        models = {lane.served.name: self._lane_stats(lane) for lane in self._lanes.values()}
        sums = ("running", "waiting", "finished", "cancelled", "rejected")
        return {name: sum(model[name] for model in models.values()) for name in sums} | {
            "healthy": self.problem() is None, "models": models, **self.notes,
        }  # fmt: skip

    def take_times(self) -> Times:
        """The waiting times measured since the last call."""
        return Times(_drain(self._first_s), _drain(self._between_s))

    def problem(self) -> str | None:
        """What is wrong with the engines, None if nothing is."""
        failures = [f"{lane.served.name}: {lane.failure}" for lane in self._lanes.values() if lane.failure]
        if failures:
            return "; ".join(failures)
        if self._over or not self._thread.is_alive():
            return ENDED
        since = self._working_since
        if since is not None and self._clock() - since > self._stuck_s:
            return f"one engine step has been under way for {self._clock() - since:.0f} s (limit {self._stuck_s:g} s)"
        return None

    def check_health(self) -> None:
        """Raise EngineFailed if an engine has failed, hangs in a step, or has no thread any more."""
        if problem := self.problem():
            raise EngineFailed(problem)

    def close(self) -> None:
        """End the thread; requests that still run get EngineFailed."""
        self._closing = True
        self._wake.set()
        self._thread.join(timeout=self._stuck_s)

    def _admit(self, lane: _Lane, streams: int) -> None:
        if lane.failure or self._over:
            raise EngineFailed(f"the engine of {lane.served.name} is not running: {self.problem()}")
        most = lane.engine.max_rows + self._max_queue
        if lane.live and lane.live + streams > most:
            lane.rejected += 1
            retry_s = self._retry_after_s(lane)
            raise Overloaded(f"{lane.served.name} is busy: {lane.live} streams run or wait, {most} may", retry_s)

    def _retry_after_s(self, lane: _Lane) -> float:
        """When the streams that wait will have found a row, if streams go on ending as they did in the last minute."""
        ended = [when for when in list(self._ended) if when > self._clock() - RECENT_S]
        if not ended:
            return UNKNOWN_RETRY_S
        per_s = len(ended) / max(self._clock() - ended[0], 1.0)
        least, most = RETRY_AFTER_S
        return min(max((lane.live - lane.engine.max_rows) / per_s, least), most)

    def _lane_stats(self, lane: _Lane) -> dict[str, Any]:
        return lane.snapshot | {
            "finished": lane.finished, "cancelled": lane.cancelled, "rejected": lane.rejected, "failure": lane.failure,
        }  # fmt: skip

    def _order(self, order: Callable[[], None]) -> None:
        """Have the engines' thread do something between two steps."""
        self._orders.append(order)
        self._wake.set()
        if self._over:
            self._fail_all(ENDED)

    # --- the engines' thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        reason = "the server is shutting down"
        try:
            while not self._closing:
                while self._orders:
                    self._working_since = self._clock()
                    self._orders.popleft()()
                busy = [lane for lane in self._lanes.values() if lane.failure is None and lane.engine.busy]
                for lane in busy:
                    self._step(lane)
                self._working_since = None
                if not busy:
                    self._flush()
                    self._wake.wait()
                    self._wake.clear()
        except Exception as error:
            logger.exception("the engines' thread ends")
            reason = f"{ENDED}: {type(error).__name__}: {error}"
        finally:
            self._over, self._working_since = True, None
            self._fail_all(reason)

    def _submit(self, request: _Request) -> None:
        lane = request.lane
        if request.over:
            return
        if lane.failure:
            self._give(request, EngineFailed(lane.failure))
            return
        try:
            request.number = lane.engine.submit(request.prompt, request.params)
        except ValueError as error:
            self._give(request, error)
        except Exception as error:
            self._give(request, EngineFailed(f"{type(error).__name__}: {error}"))
            self._fail(lane, error)
        else:
            lane.requests[request.number] = request

    def _cancel(self, request: _Request) -> None:
        if request.over:
            return
        request.over = True
        lane = request.lane
        lane.cancelled += 1
        if request.number is None:
            return
        del lane.requests[request.number]
        try:
            lane.engine.cancel(request.number)
        except Exception as error:
            self._fail(lane, error)

    def _step(self, lane: _Lane) -> None:
        self._working_since = self._clock()
        try:
            events = lane.engine.step()
        except Exception as error:
            self._fail(lane, error)
            return
        now = self._clock()
        due: list[_Request] = []
        for event in events:
            request = lane.requests[event.prompt]
            request.held.append(event)
            if event.finish_reason is not None:
                self._ended.append(now)
                request.left -= 1
            if request.left == 0:
                del lane.requests[event.prompt]
                request.over = True
                lane.finished += 1
            if request.over or request.posted_s is None:
                due.append(request)
        self._give_held(due)
        n_requests = sum(len(lane.requests) for lane in self._lanes.values())
        if now - self._flushed_s >= max(self._interval_s, n_requests / self._max_chunks_per_s):
            self._flush()

    def _flush(self) -> None:
        """Hand over all that is held."""
        self._flushed_s = self._clock()
        while self._ended and self._ended[0] < self._flushed_s - RECENT_S:
            self._ended.popleft()
        for lane in self._lanes.values():
            self._give_held([request for request in lane.requests.values() if request.held])
            if lane.failure is None:
                self._take_snapshot(lane)

    def _give_held(self, requests: list[_Request]) -> None:
        """One wake-up of each reader's event loop for all chunks that are due."""
        now = self._clock()
        parcels: dict[asyncio.AbstractEventLoop, list[tuple[_Request, list[TokenEvent]]]] = {}
        for request in requests:
            if not request.held:  # twice in the list
                continue
            name = request.lane.served.name
            if request.posted_s is None:
                self._first_s.append((name, now - request.asked_s))
            else:
                rounds = len(request.held) / request.params.num_samples
                self._between_s.append((name, (now - request.posted_s) / rounds))
            request.posted_s = now
            parcels.setdefault(request.reader, []).append((request, request.held))
            request.held = []
        for reader, parcel in parcels.items():
            _call(reader, _unpack, parcel)

    def _give(self, request: _Request, error: Exception) -> None:
        request.over = True
        _call(request.reader, request.chunks.put_nowait, error)

    def _fail(self, lane: _Lane, error: Exception) -> None:
        logger.exception("the engine of %s failed", lane.served.name, exc_info=error)
        lane.failure = f"the engine failed: {type(error).__name__}: {error}"
        self._give_held([request for request in lane.requests.values() if request.held])
        for request in lane.requests.values():
            self._give(request, EngineFailed(lane.failure))
        lane.requests.clear()

    def _fail_all(self, reason: str) -> None:
        for lane in self._lanes.values():
            lane.failure = lane.failure or reason
            for request in list(lane.requests.values()):
                self._give(request, EngineFailed(lane.failure))
            lane.requests.clear()
        while self._orders:  # submissions find the failure
            self._orders.popleft()()

    def _take_snapshot(self, lane: _Lane) -> None:
        lane.snapshot = dataclasses.asdict(lane.engine.stats())


def _unpack(parcel: list[tuple[_Request, list[TokenEvent]]]) -> None:
    for request, events in parcel:
        request.chunks.put_nowait(events)


def _call(reader: asyncio.AbstractEventLoop, function: Callable[..., None], argument: object) -> None:
    try:
        reader.call_soon_threadsafe(function, argument)
    except RuntimeError:  # the reader's event loop is closed: nobody is there to read
        logger.debug("a reader has gone")


def _drain(values: deque[tuple[str, float]]) -> list[tuple[str, float]]:
    found = []
    while values:
        found.append(values.popleft())
    return found

"""One ordered stream of rows for all ranks: Ray Data packs the items, an actor cuts the result into steps and deals.

The actor is the only consumer, so order and cursor need no agreement between ranks, and a group of workers that starts
again, with any number of ranks, opens the stream anew at its checkpoint's cursor.

Nobody here waits for ever. A rank waits `wait_s` for its rows, says so meanwhile, and ends with a ClusterError, as it
does when the dealer dies. A packing process asks for its turn in short calls and ends when the stream is gone. The
dealer's own thread waits only for ranks to take what is ready; it ends with the stream, or with the actor, which its
owner kills.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from itertools import count, islice
from typing import Any, TypeAlias

import numpy as np
import ray
import ray.data
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nanochat_ray.corpus.items import Visit
from nanochat_ray.messages import ClusterError, Cursor, PackCounts, PackedBatch, PackedRows, PassedOn
from nanochat_ray.stages.rows import RowSource, row_blocks, visits_from
from nanochat_ray.text.packing import cut_steps

logger = logging.getLogger(__name__)

DealerHandle: TypeAlias = ray.actor.ActorHandle

ITEMS_PER_EXECUTION = 1024  # of Ray Data; the stream has no end, its executions do
ITEMS_AHEAD = 6  # per packing process
# Steps ready for the ranks, by number and size. Between two executions of Ray Data nothing is packed for 2 to 4 s.
STEPS_AHEAD = 64
BYTES_AHEAD = 256 << 20
MIN_STEPS_AHEAD = 4
WAIT_S = 600.0
LOST_S = 120.0  # without a word from any packing process while rows are wanted: none has a CPU to start on
LOOK_S = 5.0
SAY_EVERY_S = 30.0
TURN_S = 6.0  # one call of a packing process that waits
HUNGRY_S = 5.0  # without the next item, after which those behind it may be packed too
DEAF_S = 300.0  # a dealer that has not answered a packing process for so long is given up


class PackItems:
    """Ray Data's side of packing: one item in, its rows out as one block of tensors.

    It waits until the item is near its turn. Left to its own back-pressure Ray Data reads far ahead, and its executor
    keeps a CPU busy with waiting.
    """

    def __init__(self, source: RowSource, dealer: DealerHandle, stream: str, passed_on: PassedOn):
        passed_on.take()
        self.source, self.dealer, self.stream = source, dealer, stream
        self.may_pack = 0  # items of the stream before this number are near their use

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        for number, item in zip(batch["number"], batch["item"], strict=True):
            if self.has_turn(int(number)):
                yield to_columns(int(number), self.source.pack(int(item)))

    def has_turn(self, number: int) -> bool:
        """Wait until item `number` of the stream is near its use; False if the stream is gone."""
        while number >= self.may_pack:
            answer: Any = ray.get(self.dealer.may_pack.remote(self.stream, number), timeout=DEAF_S)
            if answer is None:
                return False
            self.may_pack = answer
        return True


def to_columns(number: int, rows: PackedRows) -> dict[str, np.ndarray]:
    """A packed item as a block of Ray Data, each row with the item's number and counts.

    An item without rows is heard of too: as one blank row that has consumed nothing.
    """
    if not len(rows):
        width = rows.tokens.shape[1]
        blank = None if rows.mask is None else np.zeros((1, width), dtype=bool)
        rows = PackedRows(np.zeros((1, width), rows.tokens.dtype), blank, np.zeros(1, np.int32), rows.counts)
    columns = {
        "number": np.full(len(rows), number),  # (n,)
        "tokens": rows.tokens,  # (n, T+1)
        "consumed": np.arange(1, len(rows) + 1) if rows.consumed is None else rows.consumed,  # (n,)
        "counts": np.tile(np.array(astuple(rows.counts), dtype=np.int64), (len(rows), 1)),  # (n, fields)
    }
    return columns if rows.mask is None else {**columns, "mask": rows.mask}


def from_columns(block: dict[str, np.ndarray]) -> Iterator[tuple[int, PackedRows]]:
    """The items of a block with their numbers."""
    numbers, consumed = block["number"], block["consumed"]
    starts = np.flatnonzero(np.r_[True, numbers[1:] != numbers[:-1]])
    for start, stop in zip(starts, np.r_[starts[1:], len(numbers)], strict=True):
        part = slice(int(start), int(stop) if consumed[start] else int(start))
        mask = block["mask"][part] if "mask" in block else None
        counts = PackCounts(*block["counts"][start].tolist())
        yield int(numbers[start]), PackedRows(block["tokens"][part], mask, consumed[part], counts)


def set_up_ray_data(actors: int) -> None:
    """Set Ray Data's options for this process, which is the dealer's own.

    They are global to it: set for one stream only, they would be taken back when that stream ends while the next one
    runs, and its rows would come out of order.
    """
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(cpu=float(actors))
    context.target_max_block_size = None  # one block an item, however large
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # ranks may evaluate for an hour between two steps


def packed_items(
    source: RowSource, cursor: Cursor, actors: int, dealer: DealerHandle, stream: str, name: str,
    per_execution: int = ITEMS_PER_EXECUTION,
) -> Iterator[tuple[Visit, PackedRows]]:
    """Every item from the cursor on with its rows, in order, read, tokenized and packed by Ray Data."""
    visits, due = enumerate(visits_from(source, cursor)), count()
    while batch := dict(islice(visits, per_execution)):
        numbered = [{"number": number, "item": visit.item} for number, visit in batch.items()]
        dataset = ray.data.from_items(numbered, override_num_blocks=len(numbered)).map_batches(
            PackItems, fn_constructor_args=(source, dealer, stream, PassedOn.here()), batch_size=1, num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=min(actors, len(numbered)), max_tasks_in_flight_per_actor=4),
        )
        dataset.set_name(name)
        blocks: Any = dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2)
        for block in blocks:
            for number, rows in from_columns(block):
                assert number == next(due), f"Ray Data gave item {number} of the stream out of its order"
                yield batch[number], rows


class RowDealer:
    """Cuts the stream into optimizer steps and hands each rank its part. Waiting calls run in threads of their own."""

    def __init__(
        self, source: RowSource, rows_per_step: int, actors: int, name: str, per_execution: int, passed_on: PassedOn
    ):
        passed_on.take()
        set_up_ray_data(actors)
        self.per_execution = per_execution
        self.source, self.rows_per_step, self.actors, self.name = source, rows_per_step, actors, name
        self._changed = threading.Condition()
        self._stream = ""
        self._parts: dict[tuple[int, int], PackedBatch] = {}
        self._error: BaseException | None = None
        self._end: int | None = None
        self._taken = 0  # items of the stream that were needed so far
        self._hungry_since: float | None = None  # while the next one is waited for
        self._heard_s = time.monotonic()  # when a packing process last asked
        self._asked_s = time.monotonic()

    def __repr__(self) -> str:
        return f"RowDealer({self.name})"  # Ray's dashboard and logs show this

    def open(self, stream: str, cursor: Cursor, first_step: int, world_size: int) -> None:
        """Start dealing from a cursor under a new name; calls for the old name end with an error."""
        with self._changed:
            self._stream, self._parts, self._error, self._end, self._taken = stream, {}, None, None, 0
            self._heard_s = time.monotonic()
            self._asked_s = time.monotonic()
            self._changed.notify_all()
        threading.Thread(
            target=self._produce, args=(stream, cursor, first_step, world_size), name=stream, daemon=True
        ).start()

    def part(self, stream: str, step: int, rank: int, wait_s: float = WAIT_S) -> PackedBatch | None:
        """A rank's rows of a step, None behind the stream's end. Raises what packing raised."""
        self._asked_s = time.monotonic()
        with self._changed:

            def answerable() -> bool:
                ended = self._end is not None and step >= self._end
                return self._stream != stream or bool(self._error) or (step, rank) in self._parts or ended

            begun = time.monotonic()
            while not self._changed.wait_for(answerable, timeout=min(LOOK_S, wait_s)):
                if time.monotonic() - begun >= wait_s or self._lost():
                    break
            if self._stream != stream:
                raise ClusterError(f"the stream of rows {stream!r} is closed; open is {self._stream!r}")
            if (step, rank) in self._parts:
                batch = self._parts.pop((step, rank))
                self._changed.notify_all()
                return batch
            if self._error:
                raise self._error
            if self._end is None:
                waited_s = time.monotonic() - begun
                raise ClusterError(f"no rows for step {step} within {waited_s:.0f} s: {self._describe()}")
            return None

    def note_life(self) -> None:
        """A rank lives, though it asks for nothing."""
        self._asked_s = time.monotonic()

    def silent_s(self) -> float:
        """Seconds since a rank was last heard of."""
        return time.monotonic() - self._asked_s

    def describe(self) -> str:
        """How far packing is, for who waits for it."""
        with self._changed:
            return self._describe()

    def may_pack(self, stream: str, number: int) -> int | None:
        """The first item that is too far ahead to be packed, ITEMS_AHEAD per packing process; None: the stream is gone.

        Waits until item `number` may be, but not long: who asks has to ask again. While the next item is missing, all
        may: it may be queued behind an item that waits here, since its own process died.
        """
        with self._changed:
            self._heard_s = time.monotonic()
            self._changed.wait_for(lambda: self._stream != stream or number < self._too_far(), timeout=TURN_S)
            hungry = self._hungry_since is not None and time.monotonic() - self._hungry_since > HUNGRY_S
            too_far = max(self._too_far(), number + 1 if hungry else 0)
            return too_far if self._stream == stream else None

    def _lost(self) -> bool:
        """Whether the next item is missing and nobody has been heard of for long who could pack it."""
        since = self._hungry_since
        return since is not None and time.monotonic() - max(since, self._heard_s) > LOST_S

    def _too_far(self) -> int:
        return self._taken + ITEMS_AHEAD * self.actors

    def _describe(self) -> str:
        ready = len({step for step, _ in self._parts})
        if self._taken or ready:
            return f"{self._taken} items packed, {ready} steps ready"
        return f"nothing packed yet; {self.actors} data processes need a free CPU each"

    def _packed(self, stream: str, cursor: Cursor) -> Iterator[tuple[Visit, PackedRows]]:
        """The packed items, counted as they are taken."""
        this = ray.get_runtime_context().current_actor
        name = f"{self.name} rows"
        items = packed_items(self.source, cursor, self.actors, this, stream, name, self.per_execution)
        for taken in count(1):
            self._hungry_since = time.monotonic()
            packed = next(items, None)
            self._hungry_since = None
            if packed is None:
                return
            with self._changed:
                if self._stream != stream:
                    return
                self._taken = taken
                self._changed.notify_all()
            yield packed

    def _produce(self, stream: str, cursor: Cursor, first_step: int, world_size: int) -> None:
        end = first_step
        try:
            blocks = row_blocks(self._packed(stream, cursor), cursor, self.source.n_items)
            for number, step in enumerate(cut_steps(blocks, self.rows_per_step), first_step):
                ahead = max(MIN_STEPS_AHEAD, min(STEPS_AHEAD, BYTES_AHEAD // max(1, step.rows.tokens.nbytes)))
                with self._changed:
                    while self._stream == stream and len(self._parts) >= ahead * world_size:
                        self._changed.wait()
                    if self._stream != stream:
                        return
                    for rank in range(world_size):
                        self._parts[number, rank] = step.batch(number, rank, world_size)
                    self._changed.notify_all()
                end = number + 1
            self._finish(stream, end=end)
        except BaseException as error:  # whatever it is, the ranks that wait must hear of it
            self._finish(stream, error=_what_packing_raised(error))

    def _finish(self, stream: str, end: int | None = None, error: BaseException | None = None) -> None:
        with self._changed:
            if self._stream == stream:
                self._end, self._error = end, error
                self._changed.notify_all()


def _what_packing_raised(error: BaseException) -> BaseException:
    """The innermost error of those that Ray and Ray Data put around each other."""
    inner: object = error
    while isinstance(inner, BaseException):
        error = inner
        inner = getattr(error, "cause", None) or error.__cause__
    return error


def start_dealer(
    source: RowSource, rows_per_step: int, world_size: int, actors: int, name: str = "training",
    per_execution: int = ITEMS_PER_EXECUTION,
) -> DealerHandle:
    """The dealer as an actor. It reserves no CPU: packing happens in Ray Data's own actors.

    `name` is what the dashboard shows. A dealer that dies is not started again: its ranks end with a ClusterError, and
    who launches them again starts another.
    """
    actor_class: Any = ray.remote(RowDealer)
    calls = 2 * world_size + 2 * actors + 4  # of which most only wait
    # Beside its owner, for other nodes come and go. Without task events: Ray keeps a record of the last 100,000 calls,
    # and there are some per step and rank.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = actor_class.options(
        num_cpus=0, max_concurrency=calls, enable_task_events=False, scheduling_strategy=here
    )
    return options.remote(source, rows_per_step, actors, name, per_execution, PassedOn.here())


def batches_from(
    dealer: DealerHandle, stream: str, step: int, rank: int, wait_s: float = WAIT_S
) -> Iterator[PackedBatch]:
    """This rank's batches from a step on; a thread fetches the next one while one is in use.

    Raises what packing raised, and ClusterError when the dealer is dead or has no rows within `wait_s`.
    """
    fetcher = ThreadPoolExecutor(1, thread_name_prefix="rows")
    try:
        ahead = fetcher.submit(_receive, dealer, stream, step, rank, wait_s)
        while (batch := ahead.result()) is not None:
            step += 1
            ahead = fetcher.submit(_receive, dealer, stream, step, rank, wait_s)
            yield batch
    finally:
        fetcher.shutdown(wait=False, cancel_futures=True)


def _receive(dealer: DealerHandle, stream: str, step: int, rank: int, wait_s: float) -> PackedBatch | None:
    started_s = time.monotonic()
    part: ray.ObjectRef = dealer.part.remote(stream, step, rank, wait_s)
    try:
        while not ray.wait([part], timeout=SAY_EVERY_S)[0]:
            waited_s = time.monotonic() - started_s
            state: Any = ray.get(dealer.describe.remote(), timeout=SAY_EVERY_S)
            logger.warning("rank %d: waiting for the rows of step %d for %.0f s: %s", rank, step, waited_s, state)
            if waited_s > wait_s + SAY_EVERY_S:
                raise ClusterError(f"the data dealer gave no rows for step {step} within {waited_s:.0f} s: {state}")
        return ray.get(part)
    except ray.exceptions.GetTimeoutError as error:
        raise ClusterError(f"the data dealer does not answer; rank {rank} waits for step {step}") from error
    except ray.exceptions.RayActorError as error:
        raise ClusterError(f"the data dealer died; rank {rank} was to get step {step} from it: {error}") from error

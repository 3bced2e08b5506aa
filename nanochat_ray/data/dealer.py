"""One ordered stream of rows for all ranks: Ray Data packs the items, an actor cuts the result into steps and deals.

The actor is the only consumer, so order and cursor need no agreement between ranks, and a group of workers that starts
again, with any number of ranks, opens the stream anew at its checkpoint's cursor.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import ray
import ray.data

from nanochat_ray.corpus.items import Visit
from nanochat_ray.messages import Cursor, PackedBatch, PackedRows
from nanochat_ray.stages.rows import RowSource, row_blocks, visits_from
from nanochat_ray.text.packing import cut_steps, rank_part

DealerHandle: TypeAlias = ray.actor.ActorHandle

ITEMS_PER_EXECUTION = 512  # of Ray Data; the stream has no end, its executions do
STEPS_AHEAD = 4
ITEMS_AHEAD = 6  # per packing process
WAIT_S = 600.0
NO_ROWS = PackedRows(np.zeros((0, 1), dtype=np.uint16))


class PackItems:
    """Ray Data's side of packing: one item in, its rows out as one block of tensors.

    It waits until the item is near its turn. Left to its own back-pressure Ray Data reads far ahead, and its executor
    keeps a CPU busy with waiting.
    """

    def __init__(self, source: RowSource, dealer: DealerHandle, stream: str):
        self.source, self.dealer, self.stream = source, dealer, stream

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        for number, item in zip(batch["number"], batch["item"], strict=True):
            ray.get(self.dealer.wait_for_turn.remote(self.stream, int(number)))
            rows = self.source.pack(int(item))
            if not len(rows):  # an item without rows is heard of too: as one row that has consumed nothing
                width, mask = rows.tokens.shape[1], rows.mask
                blank = None if mask is None else np.zeros((1, width), dtype=bool)
                rows = PackedRows(np.zeros((1, width), rows.tokens.dtype), blank, np.zeros(1, np.int32))
            consumed = np.arange(1, len(rows) + 1) if rows.consumed is None else rows.consumed
            block = {"number": np.full(len(rows), number), "tokens": rows.tokens, "consumed": consumed}
            if rows.mask is not None:
                block["mask"] = rows.mask
            yield block


def packed_items(
    source: RowSource, cursor: Cursor, actors: int, dealer: DealerHandle, stream: str
) -> Iterator[tuple[Visit, PackedRows]]:
    """Every item from the cursor on with its rows, in order, read, tokenized and packed by Ray Data."""
    visits = enumerate(visits_from(source, cursor))
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(cpu=float(actors))
    context.target_max_block_size = None  # one block an item, however large
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # ranks may evaluate for an hour between two steps
    with ray.data.DataContext.current(context):
        while batch := dict(islice(visits, ITEMS_PER_EXECUTION)):
            numbered = [{"number": number, "item": visit.item} for number, visit in batch.items()]
            dataset = ray.data.from_items(numbered, override_num_blocks=len(numbered)).map_batches(
                PackItems, fn_constructor_args=(source, dealer, stream), batch_size=1, num_cpus=1,
                compute=ray.data.ActorPoolStrategy(size=min(actors, len(numbered))),
            )
            blocks: Any = dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2)
            for block in blocks:
                for number, rows in _by_item(block):
                    yield batch[number], rows


def _by_item(block: dict[str, np.ndarray]) -> Iterator[tuple[int, PackedRows]]:
    numbers = block["number"]
    starts = np.flatnonzero(np.r_[True, numbers[1:] != numbers[:-1]])
    for start, stop in zip(starts, np.r_[starts[1:], len(numbers)], strict=True):
        part = slice(int(start), int(stop))
        mask = block["mask"][part] if "mask" in block else None
        rows = PackedRows(block["tokens"][part], mask, block["consumed"][part])
        yield int(numbers[start]), rows if block["consumed"][start] else NO_ROWS


class RowDealer:
    """Cuts the stream into optimizer steps and hands each rank its part. Waiting calls run in threads of their own."""

    def __init__(self, source: RowSource, rows_per_step: int, actors: int):
        self.source, self.rows_per_step, self.actors = source, rows_per_step, actors
        self._changed = threading.Condition()
        self._stream = ""
        self._parts: dict[tuple[int, int], PackedBatch | None] = {}
        self._error: Exception | None = None
        self._end: int | None = None
        self._taken = 0  # items of the stream that were needed so far
        self._asked_s = time.monotonic()

    def open(self, stream: str, cursor: Cursor, first_step: int, world_size: int) -> None:
        """Start dealing from a cursor under a new name; calls for the old name end with an error."""
        with self._changed:
            self._stream, self._parts, self._error, self._end, self._taken = stream, {}, None, None, 0
            self._asked_s = time.monotonic()
            self._changed.notify_all()
        threading.Thread(target=self._produce, args=(stream, cursor, first_step, world_size), daemon=True).start()

    def part(self, stream: str, step: int, rank: int) -> PackedBatch | None:
        """A rank's rows of a step, None behind the stream's end. Raises what packing raised."""
        self._asked_s = time.monotonic()
        with self._changed:
            ready = self._changed.wait_for(
                lambda: self._stream != stream or self._error or (step, rank) in self._parts
                or (self._end is not None and step >= self._end),
                timeout=WAIT_S,
            )
            if self._stream != stream:
                raise RuntimeError(f"the stream {stream} was replaced by {self._stream}")
            if (step, rank) in self._parts:
                batch = self._parts.pop((step, rank))
                self._changed.notify_all()
                return batch
            if self._error:
                raise self._error
            if not ready:
                raise TimeoutError(f"no rows for step {step} within {WAIT_S:.0f} s; has the cluster a CPU for data?")
            return None

    def silent_s(self) -> float:
        """Seconds since a rank last asked for rows."""
        return time.monotonic() - self._asked_s

    def wait_for_turn(self, stream: str, number: int) -> None:
        """Return when item `number` of the stream is at most ITEMS_AHEAD per packing process before its use."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stream != stream or number < self._taken + ITEMS_AHEAD * self.actors
            )

    def _packed(self, stream: str, cursor: Cursor) -> Iterator[tuple[Visit, PackedRows]]:
        """The packed items, counted as they are taken."""
        this = ray.get_runtime_context().current_actor
        for taken, packed in enumerate(packed_items(self.source, cursor, self.actors, this, stream), 1):
            with self._changed:
                self._taken = taken
                self._changed.notify_all()
            yield packed

    def _produce(self, stream: str, cursor: Cursor, first_step: int, world_size: int) -> None:
        end = first_step
        try:
            blocks = row_blocks(self._packed(stream, cursor), cursor, self.source.n_items)
            for step, cut in enumerate(cut_steps(blocks, self.rows_per_step), first_step):
                with self._changed:
                    self._changed.wait_for(
                        lambda: self._stream != stream or len(self._parts) < STEPS_AHEAD * world_size
                    )
                    if self._stream != stream:
                        return
                    for rank in range(world_size):
                        part = rank_part(len(cut.rows), rank, world_size)
                        mask = None if cut.rows.mask is None else cut.rows.mask[part]
                        batch = PackedBatch(step, cut.rows.tokens[part], mask, cut.cursor, cut.progress)
                        self._parts[step, rank] = batch
                    self._changed.notify_all()
                end = step + 1
            self._finish(stream, end=end)
        except Exception as error:  # whatever it is, the ranks that wait must hear of it
            self._finish(stream, error=error)

    def _finish(self, stream: str, end: int | None = None, error: Exception | None = None) -> None:
        with self._changed:
            if self._stream == stream:
                self._end, self._error = end, error
                self._changed.notify_all()


def start_dealer(source: RowSource, rows_per_step: int, world_size: int, actors: int) -> DealerHandle:
    """The dealer as an actor. It reserves no CPU: packing happens in Ray Data's own actors."""
    actor_class: Any = ray.remote(RowDealer)
    calls = 2 * world_size + actors + 3  # of which most only wait
    return actor_class.options(num_cpus=0, max_concurrency=calls, max_restarts=3).remote(source, rows_per_step, actors)


def batches_from(dealer: DealerHandle, stream: str, step: int, rank: int) -> Iterator[PackedBatch]:
    """This rank's batches from a step on; the next one is on its way while one is in use."""
    ahead: ray.ObjectRef = dealer.part.remote(stream, step, rank)
    while True:
        batch = ray.get(ahead)
        if batch is None:
            return
        step += 1
        ahead = dealer.part.remote(stream, step, rank)
        yield batch

"""What a training loop tells the outside: metrics, checkpoints, and whether it was asked to stop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from nanochat_ray.config import RunSettings
from nanochat_ray.messages import Cursor, PackedBatch, World
from nanochat_ray.model.checkpoint import note_evaluation, save_checkpoint
from nanochat_ray.remote import Every, Remote
from nanochat_ray.report.tracker import Tracker
from nanochat_ray.run_dir import (
    CHECKPOINTS,
    METRICS_FILE,
    STOP_FILE,
    StaleWriterError,
    check_writer,
    push_records,
    writing_as,
)

logger = logging.getLogger(__name__)

Metrics = dict[str, Any]
OpenBatches = Callable[[Cursor, int], Iterator[PackedBatch]]  # (cursor, first step) -> this rank's batches from there

SAVE_INTERVAL_S = 600.0
WATCH_INTERVAL_S = 3.0
PUSH_METRICS_EVERY = 5  # looks of the watch
COMMIT_WAITS_S = (5.0, 10.0, 20.0)  # besides what each try itself waits for the store
BEAT_EVERY_S = 1.0
BEAT_AT_MOST_S = 3600.0  # a write that takes longer counts as hung


@dataclass(frozen=True)
class TrainingState:
    """All that a checkpoint holds. Tensors are copies on the CPU, which nobody changes, and only on rank 0."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    meta: dict[str, Any]


class Hooks(Protocol):
    """The loop's way out. `save` and `flush` are called on every rank, the others on rank 0 only.

    A checkpoint is written while training goes on. What goes wrong with it is raised by the next call of `save`,
    `stop_requested`, `check` or `flush`, once.
    """

    def report(self, step: int, metrics: Metrics) -> None: ...

    def save(self, step: int, state: TrainingState) -> float:
        """Hand over a checkpoint; returns the seconds that training stood still for it."""
        ...

    def note_bpb(self, step: int, val_bpb: float | None) -> None:
        """What the evaluation at this step found, for the choice of the best checkpoint."""
        ...

    def stop_requested(self) -> bool: ...

    def save_due(self) -> bool:
        """Whether the time-based checkpoint is due; only asked when no `save_every` is set."""
        ...

    def flush(self) -> None:
        """Wait until all that was handed over is stored."""
        ...

    def beat(self) -> None:
        """This rank lives, though it may be long until its next step. For all ranks."""
        ...

    def guard(self) -> AbstractContextManager[None]:
        """The right to write into the stage's folder, while this is open; StaleWriterError without it."""
        ...


class FolderHooks:
    """Hooks that write into the stage's folder: metrics (and wandb), and checkpoints guarded by the run's lease.

    With `background`, one thread writes checkpoints, one at a time: a second `save` waits for the first. `keep_last` is
    the number of newest checkpoints to keep besides the best one, None the default of the settings. `beat` is called
    every second while a write is waited for, an hour at most. `close` ends the threads; it must be called, and raises
    nothing.
    """

    def __init__(
        self, stage_folder: Path, lease_epoch: int, world: World, tracker: Tracker | None,
        keep_last: int | None = None, background: bool = False, beat: Callable[[], None] = lambda: None,
    ):
        self.folder = stage_folder
        self.lease_epoch = lease_epoch
        self.world = world
        self.tracker = tracker
        self.beat = beat
        self.keep_last = RunSettings().keep_checkpoints if keep_last is None else keep_last
        self.checkpoint_stall_s = 0.0  # of all saves together
        self._writer = ThreadPoolExecutor(1, "checkpoint") if background and world.rank == 0 else None
        self._handed_over: list[Future] = []
        self._watch = _StoreWatch.of(stage_folder, lease_epoch) if world.rank == 0 else None
        self._last_save_s = time.monotonic()

    def report(self, step: int, metrics: Metrics) -> None:
        if self.tracker is not None:
            self.tracker.log(step, metrics)

    def save(self, step: int, state: TrainingState) -> float:
        begun = time.perf_counter()
        if self.world.rank == 0:
            self._wait()
            self._hand_over(self._write, step, state)
        self._last_save_s = time.monotonic()
        stall_s = time.perf_counter() - begun
        self.checkpoint_stall_s += stall_s
        return stall_s

    def note_bpb(self, step: int, val_bpb: float | None) -> None:
        if val_bpb is not None and self.world.rank == 0:
            self._hand_over(note_evaluation, self.folder / CHECKPOINTS, step, val_bpb, self.guard)

    def stop_requested(self) -> bool:
        self.check()
        if self._watch is not None:
            return self._watch.stop_requested() or (self.folder / STOP_FILE).exists()
        check_writer(self.folder.parent, self.lease_epoch)  # an orphan of a job that was followed by another ends here
        return (self.folder / STOP_FILE).exists()

    def save_due(self) -> bool:
        return time.monotonic() - self._last_save_s > SAVE_INTERVAL_S

    def check(self) -> None:
        """Raise what went wrong in the background, if anything did."""
        done = [future for future in self._handed_over if future.done()]
        self._handed_over = [future for future in self._handed_over if future not in done]
        for future in done:
            future.result()

    @property
    def writing(self) -> bool:
        """Whether something that was handed over is not stored yet."""
        return any(not future.done() for future in self._handed_over)

    def flush(self) -> None:
        self._wait()
        if self._watch is not None:
            self._hand_over(push_records, self.folder)
            self._wait()

    def close(self) -> None:
        """Finish what was handed over and end the threads; what goes wrong now is only logged."""
        try:
            self._wait()
        except Exception as error:
            logger.warning("%s", error)
        if self._writer is not None:
            self._writer.shutdown()
        if self._watch is not None:
            self._watch.close()

    def _write(self, step: int, state: TrainingState) -> None:
        save_checkpoint(
            self.folder / CHECKPOINTS, step, state.model, state.optimizer, state.meta, self.keep_last,
            self.guard,
        )

    @contextmanager
    def guard(self) -> Iterator[None]:
        """The right to write, while this is open; StaleWriterError if another job has it.

        While the store does not say who has it, the lock is not held between two tries.
        """
        with ExitStack() as held:
            for wait_s in (*COMMIT_WAITS_S, None):
                try:
                    held.enter_context(writing_as(self.folder.parent, self.lease_epoch))
                    break
                except ConnectionError as error:
                    if wait_s is None:
                        raise
                    logger.info("%s; trying again in %g s", error, wait_s)
                    time.sleep(wait_s)
            yield

    def _hand_over(self, call: Callable[..., None], *args: Any) -> None:
        if self._writer is None:
            call(*args)
        else:
            self._handed_over.append(self._writer.submit(call, *args))

    def _wait(self) -> None:
        begun = time.monotonic()
        while self.writing:
            wait(self._handed_over, BEAT_EVERY_S)
            if time.monotonic() - begun < BEAT_AT_MOST_S:
                self.beat()
        self.check()


class _StoreWatch:
    """For a run in object storage: looks there every few seconds for a new holder of the lease and a request to stop,
    and brings the metrics there. So the loop itself never waits for the network."""

    def __init__(self, remote: Remote, stage_folder: Path, lease_epoch: int):
        self._remote, self._folder, self._epoch = remote, stage_folder, lease_epoch
        self._stop = False
        self._lost: StaleWriterError | None = None
        self._looks = 0
        self._every = Every(WATCH_INTERVAL_S, self.look, "watch-store")

    @staticmethod
    def of(stage_folder: Path, lease_epoch: int) -> _StoreWatch | None:
        remote = Remote.of(stage_folder)
        return _StoreWatch(remote, stage_folder, lease_epoch) if remote is not None else None

    def look(self) -> None:
        try:
            check_writer(self._folder.parent, self._epoch)
        except StaleWriterError as error:
            self._lost = error
        self._stop = self._remote.read(self._folder / STOP_FILE) is not None
        self._looks += 1
        if self._looks % PUSH_METRICS_EVERY == 0 and self._lost is None:
            self._remote.push_log(self._folder / METRICS_FILE)

    def stop_requested(self) -> bool:
        if self._lost is not None:
            raise self._lost
        return self._stop

    def close(self) -> None:
        self._every.close()

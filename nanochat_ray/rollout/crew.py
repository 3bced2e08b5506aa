"""Actors of one kind, each asked for one thing at a time; the dead are replaced, and none is waited for in silence."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Literal

import ray
from ray.exceptions import ActorAlreadyExistsError, ObjectLostError, RayError, RayTaskError

from nanochat_ray.messages import ClusterError

logger = logging.getLogger(__name__)

Fault = Literal["code", "data", "actor"]


@dataclass(eq=False)
class Member:
    """One actor of a crew."""

    actor: ray.actor.ActorHandle
    name: str
    state: Literal["placing", "loading", "idle", "busy"] = "placing"
    since_s: float = field(default_factory=time.monotonic)  # in this state
    asked: ray.ObjectRef | None = None  # what is waited for
    job: Any = None
    overdue: bool = False
    pid: int | None = None


@dataclass(frozen=True)
class Event:
    """An actor's answer has come, or will never come."""

    crew: Crew
    member: Member
    ref: ray.ObjectRef
    future: Future


@dataclass(frozen=True)
class Answer:
    """What became of a job: a value, or an error and whose it was: what ran, what it ran on, or the actor's."""

    member: Member
    job: Any
    value: Any = None
    error: Exception | None = None
    fault: Fault | None = None


class Crew:
    """`count` actors that `start` makes. Events go to a queue; whoever reads it hands them to `heard`."""

    def __init__(
        self, kind: str, start: Callable[[str], ray.actor.ActorHandle], run: str, count: int, events: SimpleQueue,
        start_timeout_s: float, failures_in_a_row: int,
    ) -> None:  # fmt: skip
        self.kind, self.run, self.count = kind, run, count
        self._start, self._events = start, events
        self._start_timeout_s, self._limit = start_timeout_s, failures_in_a_row * count
        self._numbers = itertools.count()
        self._failures = 0  # in a row
        self._ever_loaded = False
        self._lacking_since_s: float | None = None
        self.restarts = 0
        self.members: list[Member] = []
        for _ in range(count):
            self._add()

    @property
    def alive(self) -> int:
        """How many actors have a place and are loaded."""
        return sum(member.state in ("idle", "busy") for member in self.members)

    def idle(self) -> list[Member]:
        return [member for member in self.members if member.state == "idle"]

    def busy(self) -> list[Member]:
        return [member for member in self.members if member.state == "busy"]

    def ask(self, member: Member, job: Any, ref: ray.ObjectRef) -> None:
        """Wait for `ref`, which this idle actor was asked for."""
        member.job, member.overdue = job, False
        self._wait(member, "busy", ref)

    def heard(self, event: Event) -> Answer | None:
        """Take an event; an answer if it ends a job. Raises what makes it useless to go on."""
        member, error = event.member, event.future.exception()
        if member not in self.members or member.asked is not event.ref:
            return None  # of an actor that has been given up
        if member.state == "busy":
            return self._job_ended(member, event.future, error)
        if error is not None:
            if fault_of(error) == "code" and not self._ever_loaded:
                raise plain(error) from error  # a wrong setting: it would fail on every actor
            self.replace(member, error)
        elif member.state == "placing":
            member.pid = event.future.result()
            self._wait(member, "loading", member.actor.load.remote())
        else:
            self._ever_loaded = True
            self._rest(member)
        return None

    def _job_ended(self, member: Member, future: Future, error: BaseException | None) -> Answer:
        job = member.job
        if error is None:
            self._failures = 0
            self._rest(member)
            return Answer(member, job, future.result())
        assert isinstance(error, Exception)
        fault = fault_of(error)
        if fault == "actor" or (fault == "code" and not isinstance(error, ValueError)):
            self.replace(member, error)  # what no prompt explains may be the process' own, and would meet every prompt
        else:
            self.note_failure(error)
            self._rest(member)
        return Answer(member, job, error=error, fault=fault)

    def note_failure(self, error: BaseException) -> None:
        """One more in a row; too many of them end the pool, a job's own error as it is."""
        self._failures += 1
        if self._failures >= self._limit:
            if isinstance(error, RayTaskError):
                raise plain(error) from error
            raise ClusterError(f"{self._failures} failures of {self.kind} actors in a row, the last: {short(error)}")

    def replace(self, member: Member, error: BaseException) -> None:
        """End an actor, if it has not ended, and start another one in its place."""
        logger.warning("%s is replaced: %s", member.name, short(error))
        self.members.remove(member)
        ray.kill(member.actor)
        self.note_failure(error)
        self.restarts += 1
        self._add()

    def check_patience(self, wanted: bool) -> None:
        """End actors that hang while they load. ClusterError if actors are wanted and there are none for too long."""
        now_s = time.monotonic()
        for member in [*self.members]:
            if member.state == "loading" and now_s - member.since_s > self._start_timeout_s:
                self.replace(member, TimeoutError(f"not loaded in {self._start_timeout_s:.0f} s"))
        if self.alive or not wanted:
            self._lacking_since_s = None
        elif self._lacking_since_s is None:
            self._lacking_since_s = now_s
        elif now_s - self._lacking_since_s > self._start_timeout_s:
            raise ClusterError(
                f"no {self.kind} actor could be placed and loaded in {self._start_timeout_s:.0f} s; {self.words()}; "
                f"free: {free_resources()}"
            )

    def words(self) -> str:
        """How the actors are doing."""
        states = [member.state for member in self.members]
        return f"{self.kind} actors: {self.alive} of {self.count} ready" + "".join(
            f", {states.count(state)} {said}"
            for state, said in (("loading", "loading"), ("placing", "without a place"))
            if state in states
        )  # fmt: skip

    def close(self) -> None:
        for member in self.members:
            ray.kill(member.actor)
        self.members = []

    def _add(self) -> None:
        while True:
            name = f"{self.kind} {self.run} #{next(self._numbers)}"
            try:
                member = Member(self._start(name), name)
                break
            except ActorAlreadyExistsError:
                continue  # an actor of an earlier launch is still on its way out
        self.members.append(member)
        self._wait(member, "placing", member.actor.hello.remote())

    def _wait(self, member: Member, state: Literal["placing", "loading", "busy"], ref: ray.ObjectRef) -> None:
        member.state, member.since_s, member.asked = state, time.monotonic(), ref
        ref.future().add_done_callback(lambda future: self._events.put(Event(self, member, ref, future)))

    def _rest(self, member: Member) -> None:
        member.state, member.since_s, member.asked, member.job = "idle", time.monotonic(), None, None


def fault_of(error: BaseException) -> Fault:
    """Whose fault an error that Ray gave is."""
    if isinstance(error, ObjectLostError) or isinstance(getattr(error, "cause", None), ObjectLostError):
        return "data"  # a node went, and what it held
    return "code" if isinstance(error, RayTaskError) else "actor"


def plain(error: BaseException) -> BaseException:
    """What was raised in an actor, without Ray's wrapping."""
    return error.cause if isinstance(error, RayTaskError) else error


def free_resources() -> str:
    """What the cluster has left."""
    free = ray.available_resources()
    return ", ".join(f"{free[name]:g} {name}" for name in ("CPU", "GPU") if name in free) or "none"


def short(error: BaseException) -> str:
    """One line of an error that may carry a traceback."""
    if isinstance(error, RayTaskError):
        return f"{type(error.cause).__name__}: {error.cause}"
    if isinstance(error, RayError):
        return f"{type(error).__name__}: {error}".split(" Worker exit type")[0].splitlines()[-1][:200]
    return str(error)

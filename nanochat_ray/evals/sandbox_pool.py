"""Programs that a model wrote, run on actors without a GPU, which hold nothing that a program could take."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.metrics import Counter

from nanochat_ray import sandbox
from nanochat_ray.messages import ClusterError
from nanochat_ray.sandbox import ProgramResult, SandboxFailed

logger = logging.getLogger(__name__)

ACTOR_CPUS = 1
MAX_TRIES = 3  # of one program, and of starting actors in a row, when actors die
START_TIMEOUT_S = 300.0
PROGRAM_TIMEOUT_S = 300.0  # far above what the sandbox itself waits for
SPEAK_EVERY_S = 30.0
PROGRAMS = "nanochat_sandbox_programs"  # a counter of Ray's metrics agent


class SandboxActor:
    """A small process that launches programs. It imports no torch and sees no GPU."""

    def ready(self, unsafe: bool) -> None:
        """Raises SandboxUnavailable where this actor's machine cannot isolate programs."""
        if not unsafe:
            sandbox.require_isolation()

    def run(self, code: str, unsafe: bool) -> ProgramResult | SandboxFailed:
        return sandbox.try_program(code, unsafe=unsafe)


def start_actor() -> ray.actor.ActorHandle:
    remote: Any = ray.remote(SandboxActor)
    # An actor that asks for no GPU still sees all of them, unless it is told that there are none.
    env = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return remote.options(num_cpus=ACTOR_CPUS, num_gpus=0, runtime_env={"env_vars": env}).remote()


def require_isolation() -> None:
    """Raises SandboxUnavailable if the cluster's machines cannot isolate programs, ClusterError if there is no room."""
    actor = start_actor()
    try:
        ray.get(actor.ready.remote(False), timeout=START_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError as error:
        raise ClusterError(f"no sandbox actor could be placed in {START_TIMEOUT_S:.0f} s") from error
    finally:
        ray.kill(actor)


def run_programs(codes: Sequence[str], actors: int, unsafe: bool = False) -> list[ProgramResult | SandboxFailed]:
    """Run every program on `actors` actors; their results in the order of `codes`.

    An actor that dies, or is silent about a program for PROGRAM_TIMEOUT_S, is replaced and its program run again; after
    MAX_TRIES that program's place holds a SandboxFailed. Raises SandboxUnavailable, and ClusterError if no actor can be
    placed within START_TIMEOUT_S or if they die before they are ready.
    """
    return _Pool(codes, unsafe).run(actors)


class _Pool:
    """What is where: each actor has at most one call, None being its start."""

    def __init__(self, codes: Sequence[str], unsafe: bool) -> None:
        self.codes, self.unsafe = codes, unsafe
        self.waiting = deque(range(len(codes)))
        self.results: list[ProgramResult | SandboxFailed | None] = [None] * len(codes)
        self.tries = [0] * len(codes)
        self.calls: dict[ray.ObjectRef, tuple[ray.actor.ActorHandle, int | None, float]] = {}
        self.actors: list[ray.actor.ActorHandle] = []
        self.failed_starts = 0
        self.heard_s = time.monotonic()
        self.programs = Counter(PROGRAMS, "programs that a model wrote, by how running them ended", ("outcome",))

    def run(self, actors: int) -> list[ProgramResult | SandboxFailed]:
        try:
            for _ in range(min(actors, len(self.codes))):
                self._start()
            while self.waiting or any(number is not None for _, number, _ in self.calls.values()):
                finished, _ = ray.wait([*self.calls], num_returns=1, timeout=SPEAK_EVERY_S)
                if finished:
                    self.heard_s = time.monotonic()
                    self._take(finished[0])
                else:
                    self._check_patience()
        finally:
            for actor in self.actors:
                ray.kill(actor)
        return [result for result in self.results if result is not None]

    def _start(self) -> None:
        actor = start_actor()
        self.actors.append(actor)
        self.calls[actor.ready.remote(self.unsafe)] = (actor, None, time.monotonic())

    def _take(self, ref: ray.ObjectRef) -> None:
        """A call has come back: keep its result and give the actor the next program, or replace it."""
        actor, number, _ = self.calls.pop(ref)
        try:
            found = ray.get(ref)
        except RayActorError as error:
            self._lost(number, error)
            return
        if number is None:
            self.failed_starts = 0
        else:
            self._note(number, found)
        if self.waiting:
            number = self.waiting.popleft()
            self.calls[actor.run.remote(self.codes[number], self.unsafe)] = (actor, number, time.monotonic())

    def _note(self, number: int, result: ProgramResult | SandboxFailed) -> None:
        self.results[number] = result
        outcome = result.outcome if isinstance(result, ProgramResult) else "not run"
        self.programs.inc(tags={"outcome": outcome})

    def _lost(self, number: int | None, error: RayActorError) -> None:
        logger.warning("a sandbox actor died; another one takes its place")
        if number is None:
            self.failed_starts += 1
            if self.failed_starts >= MAX_TRIES:
                raise ClusterError(f"{MAX_TRIES} sandbox actors died before they were ready: {error}") from error
        else:
            self.tries[number] += 1
            if self.tries[number] < MAX_TRIES:
                self.waiting.appendleft(number)
            else:
                self._note(number, SandboxFailed(f"{MAX_TRIES} actors died while it ran"))
        self._start()

    def _check_patience(self) -> None:
        """Nothing has come back for a while: end what hangs, say what is waited for, give up on what gets no place."""
        running = [call for call in self.calls.values() if call[1] is not None]
        for actor, _, begun_s in running:
            if time.monotonic() - begun_s > PROGRAM_TIMEOUT_S:
                logger.warning("a sandbox actor is silent for more than %.0f s; it is ended", PROGRAM_TIMEOUT_S)
                ray.kill(actor)
        silent_s = time.monotonic() - self.heard_s
        if not running and silent_s > START_TIMEOUT_S:
            raise ClusterError(f"no sandbox actor could be placed in {START_TIMEOUT_S:.0f} s; each needs one CPU")
        if not running:
            logger.warning("waiting for a sandbox actor to be placed since %.0f s; each needs one CPU", silent_s)

"""Rollouts on Ray actors: the same units on any number of them, in any order and over any deaths, give the same tokens.

One thread hears of all that happens and gives out the work, so no actor is idle while the caller trains. `finished`
only waits for what the thread puts down.
"""

from __future__ import annotations

import logging
import queue
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import ray
from ray.exceptions import RayError

from nanochat_ray.messages import FinishedUnit, PassedOn, Rollout, RolloutGroup, RolloutUnit
from nanochat_ray.model.flat_weights import flatten
from nanochat_ray.model.gpt import GPT
from nanochat_ray.rollout.actors import Sampled, WeightsError
from nanochat_ray.rollout.crew import Answer, Crew, Event, Member, free_resources, plain, short
from nanochat_ray.rollout.scorer import unscored
from nanochat_ray.rollout.settings import PoolNeeds, PoolPatience, PoolStats
from nanochat_ray.rollout.starting import sampler_starter, scorer_starter
from nanochat_ray.rollout.trials import Trial, Work
from nanochat_ray.stages.rollouts import RolloutSpec
from nanochat_ray.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

TICK_S = 0.5  # how often deadlines are looked at
REMEMBERED_UNITS = 64  # whose durations make the deadline
FETCH_TIMEOUT_S = 30.0  # of one unit's rollouts


@dataclass(eq=False)
class Scoring:
    """Rollouts that wait for their rewards."""

    work: Work
    rollouts: ray.ObjectRef
    sampled: Sampled
    by: str
    failures: int = 0


COUNTS = ("actors", "restarts", "requeued", "reissued", "fetch_s", "busy_s")  # of PoolStats, for the metrics


class ElsewhereRollouts:
    """The pool for the ranks that have none: rank 0 alone has actors, and gives what they finish to the others."""

    def publish(self, version: int, model: GPT) -> None:
        return None

    def submit(self, units: Sequence[RolloutUnit]) -> None:
        return None

    def finished(self, units: Sequence[RolloutUnit]) -> Iterator[FinishedUnit]:
        return iter(())

    def counts(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        return None


class RolloutPool:
    """A `RolloutSource` whose work is done by actors outside the caller's placement group.

    Units are sampled in the order of their steps, by whichever actor is idle, and scored by other actors. What the pool
    cannot get over is raised by the next call of any method: ClusterError, or an actor's own error in loading.
    """

    def __init__(
        self, spec: RolloutSpec, workers: int, scorers: int = 1, *, passed_on: PassedOn,
        patience: PoolPatience = PoolPatience(), needs: PoolNeeds = PoolNeeds(),
        beat: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """`beat` is called at least every second while `finished` waits. ValueError without any worker or scorer."""
        if min(workers, scorers) < 1:
            raise ValueError(f"{workers} rollout workers and {scorers} scorers: there must be at least one of each")
        self.patience, self._beat = patience, beat
        self._tokenizer_folder = spec.tokenizer_folder
        self._changed = threading.Condition()  # guards all that follows
        self._weights: dict[int, ray.ObjectRef] = {}  # by version
        self._newest = -1  # published last
        self._trials: dict[str, Trial] = {}  # by the unit's name, until `finished` hands it out
        self._submitted = 0
        self._waiting: list[Work] = []
        self._to_score: deque[Scoring] = deque()
        self._slack = 1.0  # factor of the deadline
        self._took_s: deque[float] = deque(maxlen=REMEMBERED_UNITS)
        self._failure: BaseException | None = None
        self._closed = False
        self._requeued = self._reissued = self._set_aside = self._unscored = 0
        self._publish_s = self._fetch_s = self._busy_s = 0.0
        self._heard_s = self._spoke_s = time.monotonic()
        self._events: SimpleQueue[Event | None] = SimpleQueue()
        limits = self._events, patience.start_timeout_s, patience.failures_in_a_row
        self._samplers = Crew("rollout", sampler_starter(spec, needs, passed_on), spec.name, workers, *limits)
        self._scorers = Crew("scorer", scorer_starter(spec, needs, passed_on), spec.name, scorers, *limits)
        self._thread = threading.Thread(target=self._run, name="rollout pool", daemon=True)
        self._thread.start()

    # --- what the caller does

    def publish(self, version: int, model: GPT) -> None:
        """Put the weights where every actor finds them; an older version stays as long as units need it."""
        begun_s = time.perf_counter()
        ref = ray.put(flatten(model, version))
        with self._changed:
            self._check()
            self._weights[version], self._newest = ref, version
            self._drop_weights()
            self._publish_s, self._fetch_s = time.perf_counter() - begun_s, 0.0

    def submit(self, units: Sequence[RolloutUnit]) -> None:
        with self._changed:
            self._check()
            for unit in units:
                assert unit.name not in self._trials, f"{unit.name} is submitted twice"
                assert unit.version in self._weights, f"{unit.name} wants unpublished version {unit.version}"
                trial = Trial(unit, self._submitted, self.patience.unit_failures, self.patience.prompt_failures)
                self._submitted += 1
                self._trials[unit.name] = trial
                self._refill(trial)
            self._hand_out()

    def finished(self, units: Sequence[RolloutUnit]) -> Iterator[FinishedUnit]:
        """These units, each as it is done; those that nobody asked for yet are kept."""
        names = [unit.name for unit in units]
        while names:
            with self._changed:
                assert not (unknown := set(names) - self._trials.keys()), f"never submitted: {sorted(unknown)}"
                done = [name for name in names if self._trials[name].finished is not None]
                if not done:
                    self._check()
                    self._changed.wait(TICK_S)
                results = [self._trials.pop(name).finished for name in done]
            names = [name for name in names if name not in done]
            self._beat()
            yield from (result for result in results if result is not None)

    def stats(self) -> PoolStats:
        with self._changed:
            return PoolStats(
                self._samplers.alive, self._samplers.restarts + self._scorers.restarts, self._requeued, self._reissued,
                self._set_aside, self._unscored, self._publish_s, self._fetch_s, self._busy_s,
            )

    def counts(self) -> dict[str, float]:
        stats = self.stats()
        return {name: getattr(stats, name) for name in COUNTS}

    def close(self) -> None:
        """End the actors. May be called again."""
        with self._changed:
            self._closed = True
        self._events.put(None)
        self._thread.join()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        assert not self._closed, "the pool is closed"

    # --- what its thread does

    def _run(self) -> None:
        try:
            while not self._closed:
                event = self._next_event()
                with self._changed:
                    if event is not None:
                        self._hear(event)
                    self._check_deadlines()
                    self._hand_out()
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()
        finally:
            with self._changed:
                self._samplers.close()
                self._scorers.close()
                self._weights = {}

    def _next_event(self) -> Event | None:
        try:
            return self._events.get(timeout=TICK_S)
        except queue.Empty:
            return None

    def _hear(self, event: Event) -> None:
        self._heard_s = time.monotonic()
        answer = event.crew.heard(event)
        if answer is None:
            return
        if event.crew is self._scorers:
            self._hear_scorer(answer)
        elif answer.error is None:
            self._hear_sampled(answer)
        else:
            self._hear_failed(answer, answer.error)

    def _hear_sampled(self, answer: Answer) -> None:
        (work, rollouts), sampled = answer.job, answer.value
        self._busy_s += sampled.fetch_s + sampled.generate_s
        if work.unit.version == self._newest:
            self._fetch_s = max(self._fetch_s, sampled.fetch_s)
        if work.place is None:
            self._took_s.append(sampled.fetch_s + sampled.generate_s)
        if work.trial.finished is None and not work.sampled:  # the first result counts
            work.sampled = True
            self._to_score.append(Scoring(work, rollouts, sampled, answer.member.name))

    def _hear_failed(self, answer: Answer, error: Exception) -> None:
        if isinstance(error, WeightsError):
            raise plain(error) from error
        work, _ = answer.job
        if answer.fault == "code":  # a whole unit that raises would raise again, and so would a wrong prompt alone
            hopeless = work.place is None or isinstance(error, ValueError)
            self._fail(work, f"sampling it failed: {short(error)}", hopeless)
        elif answer.fault == "actor":
            self._requeued += not work.sampled
            self._fail(work, f"its actor died: {short(error)}")
        else:
            self._refill(work.trial)

    def _fail(self, work: Work, why: str, hopeless: bool = False) -> None:
        if work.sampled:
            return
        before = work.trial.set_aside
        work.trial.failed(work, why, hopeless)
        self._set_aside += work.trial.set_aside - before
        self._refill(work.trial)

    def _hear_scorer(self, answer: Answer) -> None:
        scoring = answer.job
        if answer.error is None:
            groups, score_s = answer.value
            self._take_groups(scoring, groups, score_s)
        elif answer.fault == "actor":
            self._scorer_failed(scoring, f"its scorer died: {short(answer.error)}")
        elif answer.fault == "data":
            self._sample_again(scoring, answer.error)
        else:
            raise plain(answer.error) from answer.error  # of the task itself, not of a reward

    def _scorer_failed(self, scoring: Scoring, why: str) -> None:
        scoring.failures += 1
        if scoring.failures < self.patience.score_failures:
            self._to_score.appendleft(scoring)
            return
        unit = scoring.work.unit
        try:
            rollouts: list[list[Rollout]] = ray.get(scoring.rollouts, timeout=FETCH_TIMEOUT_S)
        except RayError as error:
            self._sample_again(scoring, error)
            return
        logger.warning("%s gets no rewards after %d tries: %s", unit.name, scoring.failures, why)
        self._unscored += 1
        self._take_groups(scoring, unscored(Tokenizer.load(self._tokenizer_folder), unit, rollouts, why), 0.0)

    def _sample_again(self, scoring: Scoring, error: Exception) -> None:
        """The rollouts went with the node that had them."""
        logger.warning("%s is sampled again: %s", scoring.work.unit.name, short(error))
        scoring.work.sampled = False
        self._refill(scoring.work.trial)

    def _take_groups(self, scoring: Scoring, groups: Sequence[RolloutGroup], score_s: float) -> None:
        trial = scoring.work.trial
        trial.scored(scoring.work, groups, scoring.sampled.generate_s, score_s, scoring.by)
        self._refill(trial)
        self._drop_weights()

    # --- who does what

    def _refill(self, trial: Trial) -> None:
        """Queue what is open and neither queued, nor being scored, nor with an actor that is within its time."""
        self._waiting = [work for work in self._waiting if work.trial is not trial or work in trial.open]
        taken = [*self._waiting, *(member.job[0] for member in self._samplers.busy() if not member.overdue)]
        self._waiting += [work for work in trial.open if not work.sampled and work not in taken]
        self._waiting.sort(key=lambda work: work.order)

    def _hand_out(self) -> None:
        self._waiting = [work for work in self._waiting if not work.sampled]
        for member in self._samplers.idle()[: len(self._waiting)]:
            work = self._waiting.pop(0)
            call: Any = member.actor.sample.options(num_returns=2)
            rollouts, sampled = call.remote(work.unit, [self._weights[work.unit.version]])
            self._samplers.ask(member, (work, rollouts), sampled)
        for member in self._scorers.idle()[: len(self._to_score)]:
            scoring = self._to_score.popleft()
            score: Any = member.actor.score
            self._scorers.ask(member, scoring, score.remote(scoring.work.unit, scoring.rollouts))

    def _drop_weights(self) -> None:
        needed = {trial.unit.version for trial in self._trials.values() if trial.finished is None} | {self._newest}
        self._weights = {version: ref for version, ref in self._weights.items() if version in needed}

    # --- patience

    def deadline_s(self) -> float:
        """After how long a unit is given to another actor as well."""
        median_s = statistics.median(self._took_s) if self._took_s else 0.0
        return self._slack * max(self.patience.straggler_s, self.patience.straggler_factor * median_s)

    def _check_deadlines(self) -> None:
        now_s, deadline_s = time.monotonic(), self.deadline_s()
        for member in self._samplers.busy():
            self._check_straggler(member, now_s - member.since_s, deadline_s)
        for member in self._scorers.busy():
            if now_s - member.since_s > self.patience.score_s:
                scoring, late = member.job, TimeoutError(f"not scored in {self.patience.score_s:.0f} s")
                self._scorers.replace(member, late)
                self._scorer_failed(scoring, str(late))
        out = [trial for trial in self._trials.values() if trial.finished is None]
        self._samplers.check_patience(bool(self._waiting))
        self._scorers.check_patience(bool(self._to_score))
        if out and now_s - max(self._heard_s, self._spoke_s) > self.patience.speak_every_s:
            self._spoke_s = now_s
            logger.warning(
                "waiting for %d units, nothing heard for %.0f s: %s; %s; free: %s", len(out), now_s - self._heard_s,
                self._samplers.words(), self._scorers.words(), free_resources(),
            )  # fmt: skip

    def _check_straggler(self, member: Member, age_s: float, deadline_s: float) -> None:
        work, _ = member.job
        # A unit gets twice the time, since it may just be larger than those before; a prompt alone does not.
        if age_s > deadline_s * (2 if work.place is None else 1):
            late = TimeoutError(f"not sampled in {age_s:.0f} s")
            if not self._took_s:  # perhaps nothing hangs, and all of this is slow
                self._slack *= 2
            self._samplers.replace(member, late)
            self._fail(work, str(late))
        elif age_s > deadline_s and not member.overdue:
            member.overdue = True
            if not work.sampled and work in work.trial.open:
                name = work.unit.name
                logger.warning("%s works on %s for %.0f s; another actor gets it too", member.name, name, age_s)
                self._reissued += 1
                self._refill(work.trial)

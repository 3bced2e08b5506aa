"""Rewards of a unit's completions, all awaited together.

The text that is graded is the reply as it was written, tool calls and their outputs with their markers, without the
token that ended it: `Half of it is <|python_start|>48/2<|python_end|><|output_start|>24<|output_end|>24.\n#### 24`.
It is the text that chat evaluation grades, so both say the same of a completion, and nothing that a model writes is
hidden from its reward: markers out of place count as what they are.

A reward that raises, or that takes too long, is asked for again. When that does not help, or when what it gives is no
finite number, the rollout has no reward, and `failure` says why. That is never the same as a reward of 0.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import copy
import functools
import inspect
import math
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_ray.messages import Rollout, RolloutGroup, RolloutUnit, ScoredRollout
from nanochat_ray.sandbox import QUEUEING, Queueing
from nanochat_ray.tasks.rl_task import Reward, RLTask
from nanochat_ray.tasks.task import Conversation
from nanochat_ray.text.tokenizer import Tokenizer

BEAT_S = 1.0
QUEUE_BEAT_S = 0.02  # a try that has hardly any time left looks this often whether its program's turn has come
MAX_FAILURE_CHARS = 500


@dataclass(frozen=True)
class RewardLimits:
    """How rewards are asked for."""

    concurrency: int = 64  # at a time, per unit
    timeout_s: float = 60.0  # of one try, but for what `run_program_async` waits until a program's turn comes
    tries: int = 3
    pause_s: float = 1.0  # between two tries


@dataclass(frozen=True)
class Outcome:
    """A reward, or why there is none."""

    reward: float | None
    failure: str | None = None


def score_unit(
    task: RLTask, prompts: Sequence[Conversation], tokenizer: Tokenizer, unit: RolloutUnit,
    rollouts: Sequence[Sequence[Rollout]], limits: RewardLimits = RewardLimits(),
) -> tuple[RolloutGroup, ...]:  # fmt: skip
    """The groups of a unit. `prompts` are the task's of the unit's split.

    Blocks until every reward is there or given up; not for the thread of an event loop.
    """
    for prompt in unit.prompts:
        there = prompts[prompt.index].get("id", prompt.id)
        assert there == prompt.id, f"{unit.name}: prompt {prompt.index} is {there} here, not {prompt.id}"
    texts = [[tokenizer.decode(rollout.token_ids) for rollout in found] for found in rollouts]
    asked = [
        (prompts[prompt.index], text) for prompt, found in zip(unit.prompts, texts, strict=True) for text in found
    ]
    outcomes = iter(reward_all(task.reward, asked, limits))
    groups = []
    for prompt, found, written in zip(unit.prompts, rollouts, texts, strict=True):
        scored = []
        for sample, (rollout, text) in enumerate(zip(found, written, strict=True)):
            outcome, calls = next(outcomes), tool_calls(tokenizer, rollout)
            scored.append(ScoredRollout(
                sample, *with_terminal(rollout), rollout.finish_reason, text, calls, outcome.reward, outcome.failure
            ))
        groups.append(RolloutGroup(prompt, unit.version, tuple(scored)))
    return tuple(groups)


def with_terminal(rollout: Rollout) -> tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]:
    """Tokens, mask and log-probabilities of a rollout, the sampled token that ended it included."""
    assert rollout.logprobs is not None, "rollouts to learn from are sampled with log-probabilities"
    tokens, mask, logprobs = list(rollout.token_ids), list(rollout.mask), list(rollout.logprobs)
    if rollout.terminal_token is not None:
        assert rollout.terminal_logprob is not None
        tokens.append(rollout.terminal_token)
        mask.append(1)
        logprobs.append(rollout.terminal_logprob)
    return tuple(tokens), tuple(mask), tuple(logprobs)


def tool_calls(tokenizer: Tokenizer, rollout: Rollout) -> tuple[tuple[str, str], ...]:
    """What was asked of a tool and what it gave, "" for nothing. Outputs that the model made up do not count."""
    start, end = (tokenizer.encode_special(f"<|python_{edge}|>") for edge in ("start", "end"))
    markers = set(tokenizer.special.values())
    asked: list[list[int]] = []
    given: list[list[int]] = []
    block: list[int] | None = None
    for token, sampled in zip(rollout.token_ids, rollout.mask, strict=True):
        if not sampled:
            given[-1].append(token)  # only the end of a block brings forced tokens
        elif token == start:
            block = []
        elif token == end and block is not None:
            asked.append(block)
            given.append([])
            block = None
        elif block is not None:
            block.append(token)

    def text(tokens: list[int]) -> str:
        return tokenizer.decode([token for token in tokens if token not in markers])

    return tuple((tokenizer.decode(call), text(output)) for call, output in zip(asked, given, strict=True))


def reward_all(
    reward: Reward, asked: Sequence[tuple[Conversation, str]], limits: RewardLimits = RewardLimits()
) -> list[Outcome]:
    """The outcomes for these conversations and completions, in order.

    All units of a process share one event loop, so a reward may keep a client open. If a reward blocks the loop for as
    long as a try may take, the outcomes that are missing are failures, and the next unit gets another loop.
    """
    outcomes: list[Outcome | None] = [None] * len(asked)
    beat_at_s = time.monotonic()

    def beat() -> None:
        nonlocal beat_at_s
        beat_at_s = time.monotonic()

    async def ask() -> None:
        gate = asyncio.Semaphore(limits.concurrency)

        async def one(place: int) -> None:
            async with gate:
                outcomes[place] = await _outcome(reward, *asked[place], limits)

        await asyncio.gather(*(one(place) for place in range(len(asked))))

    loop = _reward_loop()
    asking = asyncio.run_coroutine_threadsafe(ask(), loop)
    while not concurrent.futures.wait([asking], BEAT_S).done:
        loop.call_soon_threadsafe(beat)
        if time.monotonic() - beat_at_s > limits.timeout_s + 2 * BEAT_S:
            _reward_loop.cache_clear()
            still = f"TimeoutError: rewards stood still for {limits.timeout_s:g} s; one that blocks must be a plain def"
            return [outcome or Outcome(None, still) for outcome in outcomes]
    asking.result()
    return [outcome for outcome in outcomes if outcome is not None]


@functools.lru_cache(maxsize=1)
def _reward_loop() -> asyncio.AbstractEventLoop:
    """An event loop that runs in a thread for as long as the process lives."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop


async def _outcome(reward: Reward, conversation: Conversation, text: str, limits: RewardLimits) -> Outcome:
    failure = ""
    for attempt in range(limits.tries):
        if attempt:
            await asyncio.sleep(limits.pause_s)
        try:
            # The conversation belongs to all samples of its group; a reward may take it apart.
            found = await _within(limits.timeout_s, _called(reward, copy.deepcopy(conversation), text))
        except Exception as error:
            failure = _told(error)
            continue
        number = _number(found)
        if number is None:
            return Outcome(None, f"ValueError: a reward must be a finite number, this one is {found!r:.100}")
        return Outcome(number)
    return Outcome(None, f"{failure} (tries: {limits.tries})")


async def _called(reward: Reward, conversation: Conversation, text: str) -> Any:
    try:
        if inspect.iscoroutinefunction(reward):
            return await reward(conversation, text)
        found = await _in_thread(reward, conversation, text)
        return await found if inspect.isawaitable(found) else found
    except SystemExit as error:  # it would end the loop
        raise RuntimeError(f"SystemExit: {error}") from error


async def _within(timeout_s: float, coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What the coroutine gives. After the time it is cancelled, and nobody waits until it obeys.

    What its programs wait for their turn is not its time: behind many endless programs that may be minutes.
    """
    queueing = Queueing()
    context = contextvars.copy_context()
    context.run(QUEUEING.set, queueing)
    running = asyncio.get_running_loop().create_task(coroutine, context=context)
    begun_s, left_s = time.monotonic(), timeout_s
    while left_s > 0 and not running.done():
        await asyncio.wait({running}, timeout=max(left_s, QUEUE_BEAT_S))
        left_s = begun_s + timeout_s + queueing.seconds() - time.monotonic()
    if not running.done():
        running.cancel()
        running.add_done_callback(lambda future: future.cancelled() or future.exception())
        raise TimeoutError(f"no reward within {timeout_s:g} s")
    if running.cancelled():
        raise RuntimeError("the reward cancelled itself")
    return running.result()


async def _in_thread(call: Callable[..., Any], *args: Any) -> Any:
    """What the call gives, from a thread of its own, which does not keep the process from ending if it hangs."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(found: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(found)
        else:
            future.set_exception(error)

    def run() -> None:
        found, problem = None, None
        try:
            found = call(*args)
        except Exception as error:
            problem = RuntimeError(f"StopIteration: {error}") if isinstance(error, StopIteration) else error
        except SystemExit as error:
            problem = RuntimeError(f"SystemExit: {error}")
        loop.call_soon_threadsafe(settle, found, problem)

    threading.Thread(target=run, name="reward", daemon=True).start()
    return await future


def _number(found: Any) -> float | None:
    if isinstance(found, str | bytes):
        return None
    try:
        number = float(found)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _told(error: BaseException) -> str:
    """Type and text of an error, and the line that raised it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}"[:MAX_FAILURE_CHARS] + place

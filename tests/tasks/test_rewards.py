"""Scoring a unit: what a reward sees, and what becomes of one that fails, hangs, blocks or gives no number."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from nanochat_ray.engine.engine import Engine
from nanochat_ray.messages import Rollout, RolloutPrompt, RolloutUnit, SamplingParams
from nanochat_ray.sandbox import program, run_program_async
from nanochat_ray.tasks import rewards
from nanochat_ray.tasks.rewards import RewardLimits, reward_all, score_unit, tool_calls
from nanochat_ray.tasks.rl_task import RLTask
from nanochat_ray.text.conversation import parse_reply, render
from tests.engine.tiny import Script, byte_tokenizer, scripted_engine

QUICK = RewardLimits(concurrency=4, timeout_s=0.2, tries=2, pause_s=0.0)
TOKENIZER = byte_tokenizer()
CONVERSATION = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], "id": "a"}


def one(reward, text="x", limits=QUICK):
    [outcome] = reward_all(reward, [(CONVERSATION, text)], limits)
    return outcome


def reply(*parts: dict[str, str]) -> list[int]:
    """The tokens of a reply, behind the assistant's start."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": list(parts)}]
    ids, _ = render(TOKENIZER, messages)
    return ids[ids.index(TOKENIZER.encode_special("<|assistant_start|>")) + 1 :]


def rollout(tokens: list[int], mask: list[int] | None = None, ended: bool = True) -> Rollout:
    end = TOKENIZER.encode_special("<|assistant_end|>")
    if tokens and tokens[-1] == end:
        tokens = tokens[:-1]
    return Rollout([1], tokens, mask or [1] * len(tokens), "stop" if ended else "length", end if ended else None,
                   [-0.5] * len(tokens), -0.25 if ended else None)


def unit(*ids: str) -> RolloutUnit:
    prompts = tuple(RolloutPrompt(name, index, (1,), index) for index, name in enumerate(ids))
    return RolloutUnit("train", 3, 0, 3, prompts, SamplingParams(num_samples=2))


def test_groups_come_in_the_order_of_prompts_and_samples():
    prompts = [CONVERSATION | {"id": name, "wanted": name} for name in "ab"]
    seen = []

    async def reward(conversation, completion):
        await asyncio.sleep(0.02 * (completion == "a"))
        seen.append(completion)
        return float(completion == conversation["wanted"])

    texts = [["a", "b"], ["a", "b"]]
    found = [[rollout(reply({"type": "text", "text": text})) for text in group] for group in texts]
    groups = score_unit(RLTask("t", lambda split: prompts, reward), prompts, TOKENIZER, unit("a", "b"), found)
    assert [group.prompt.id for group in groups] == ["a", "b"] and {group.version for group in groups} == {3}
    assert [[r.reward for r in group.rollouts] for group in groups] == [[1, 0], [0, 1]]
    assert [[r.text for r in group.rollouts] for group in groups] == texts
    assert seen == ["b", "b", "a", "a"]  # together, not one after another
    first = groups[0].rollouts[0]
    assert first.token_ids[-1] == TOKENIZER.encode_special("<|assistant_end|>") and first.mask == (1, 1)
    assert first.logprobs == (-0.5, -0.25) and first.tool_calls == () and first.failure is None


def test_the_conversation_of_another_prompt_is_never_graded():
    with pytest.raises(AssertionError, match="prompt 0 is b here, not a"):
        score_unit(RLTask("t", lambda split: [], lambda c, t: 0.0), [CONVERSATION | {"id": "b"}], TOKENIZER, unit("a"),
                   [[rollout([65])]])


def test_a_text_has_its_tool_calls_with_their_markers():
    tokens = reply({"type": "text", "text": "So "}, {"type": "python", "text": "6*7"},
                   {"type": "python_output", "text": "42"}, {"type": "text", "text": "#### 42"})
    script = Script([tokens])
    engine: Engine = scripted_engine(script)
    [[found]] = engine.rollouts([[65]], SamplingParams(temperature=0, max_tokens=100, logprobs=0))
    assert found.mask.count(0) == 4  # the output and its markers
    [group] = score_unit(RLTask("t", lambda split: [], lambda c, text: len(text)), [CONVERSATION], TOKENIZER,
                         unit("a"), [[found]])
    wanted = "So <|python_start|>6*7<|python_end|><|output_start|>42<|output_end|>#### 42"
    assert group.rollouts[0].text == wanted and group.rollouts[0].reward == len(wanted)
    assert group.rollouts[0].tool_calls == (("6*7", "42"),)


@pytest.mark.parametrize(
    ("text", "mask", "calls"),
    [
        ("<p>1+1</p>[2].", "111110001", (("1+1", "2"),)),
        ("<p>x</p>.", "", (("x", ""),)),  # no tool had an answer
        ("<p>x</p>[9].", "", (("x", ""),)),  # an answer that the model made up
        ("<p>1<p>2</p>", "", (("2", ""),)), ("<p>1+1", "", ()), ("</p>[1]", "", ()), ("<p></p>", "", (("", ""),)),
    ],
)  # fmt: skip
def test_tool_calls(text, mask, calls):
    names = {"<p>": "python_start", "</p>": "python_end", "[": "output_start", "]": "output_end"}
    tokens = []
    while text:
        mark = next((mark for mark in names if text.startswith(mark)), text[0])
        tokens.append(TOKENIZER.encode_special(f"<|{names[mark]}|>") if mark in names else ord(mark))
        text = text[len(mark) :]
    assert tool_calls(TOKENIZER, rollout(tokens, [int(m) for m in mask] or None)) == calls


@pytest.mark.parametrize("found", [1, True, 0.5, -2.0, np.float32(0.5), np.array(3)])
def test_numbers_of_all_kinds_are_rewards(found):
    outcome = one(lambda conversation, text: found)
    assert outcome.reward == float(found) and type(outcome.reward) is float and outcome.failure is None


@pytest.mark.parametrize("found", [None, "1", b"1", math.nan, -math.inf, [1.0, 2.0], {}, 10**400])
def test_anything_else_is_the_tasks_mistake_and_is_named(found):
    calls = []
    outcome = one(lambda conversation, text: calls.append(1) or found)
    assert outcome.reward is None and "must be a finite number" in str(outcome.failure) and len(calls) == 1


class Flaky:
    """Fails the first n times."""

    def __init__(self, n: int) -> None:
        self.n, self.calls = n, 0

    async def __call__(self, conversation, text):
        self.calls += 1
        if self.calls <= self.n:
            raise KeyError(f"call {self.calls}")
        return 0.75


def test_a_reward_that_raises_is_asked_again_and_then_given_up():
    assert one(Flaky(1)).reward == 0.75
    outcome = one(Flaky(2))
    assert outcome.reward is None
    assert outcome.failure is not None and outcome.failure.startswith("KeyError: 'call 2' (test_rewards.py, line ")
    assert outcome.failure.endswith("(tries: 2)")


def stop(*_):
    return next(iter([]))


def leave(*_):
    raise SystemExit("bye")


async def leave_async(*_):
    leave()


async def cancel(*_):
    raise asyncio.CancelledError


@pytest.mark.parametrize(
    ("reward", "told"),
    [(stop, "StopIteration"), (leave, "SystemExit: bye"), (leave_async, "SystemExit: bye"), (cancel, "cancelled")],
)
def test_no_way_out_ends_the_loop(reward, told):
    outcome = one(reward)
    assert outcome.reward is None and told in str(outcome.failure)
    assert one(lambda *_: 1.0).reward == 1.0


async def sleep_async(*_):
    await asyncio.sleep(30)


async def will_not_go(*_):
    try:
        await asyncio.sleep(30)
    except asyncio.CancelledError:
        await asyncio.sleep(1)


@pytest.mark.parametrize("reward", [sleep_async, will_not_go, lambda *_: time.sleep(30)])
def test_a_reward_that_hangs_is_given_up(reward):
    begun = time.monotonic()
    outcome = one(reward)
    assert outcome.reward is None and "TimeoutError: no reward within 0.2 s" in str(outcome.failure)
    assert time.monotonic() - begun < 5  # hangs are of 30 s


async def hang_after_a_program(conversation, text):
    programs = [asyncio.ensure_future(run_program_async("pass", unsafe=True)) for _ in range(2)]
    await programs[0]
    programs[1].cancel()  # perhaps before its turn
    await asyncio.sleep(30)


def test_waiting_for_a_programs_turn_is_not_the_rewards_time(monkeypatch):
    monkeypatch.setattr(program, "_threads", lambda pool=ThreadPoolExecutor(1): pool)

    async def reward(conversation, text):
        return float((await run_program_async("while True: pass", 0.15, unsafe=True)).success)

    limits = RewardLimits(timeout_s=0.5, tries=1)
    found = reward_all(reward, [(CONVERSATION, "")] * 6, limits)  # the last waits for 0.75 s at least
    assert [(outcome.reward, outcome.failure) for outcome in found] == [(0.0, None)] * 6
    outcome = one(hang_after_a_program, limits=RewardLimits(timeout_s=0.3, tries=1))
    assert "TimeoutError: no reward within 0.3 s" in str(outcome.failure)


def test_a_reward_that_blocks_the_loop_is_given_up_and_the_next_unit_has_another_loop(monkeypatch):
    monkeypatch.setattr(rewards, "BEAT_S", 0.05)
    go = threading.Event()

    async def block(conversation, text):
        if text != "fine":
            await asyncio.sleep(0.05)
            go.wait(30)
        return 1.0

    limits = RewardLimits(timeout_s=0.1, tries=1)
    found = reward_all(block, [(CONVERSATION, "fine"), (CONVERSATION, "block"), (CONVERSATION, "late")], limits)
    assert [outcome.reward for outcome in found] == [1.0, None, None]
    assert "stood still" in str(found[1].failure)
    assert one(block, "fine").reward == 1.0
    go.set()


def test_at_most_so_many_at_a_time():
    running, most = 0, 0

    async def count(conversation, text):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.005)
        running -= 1
        return 0.0

    assert len(reward_all(count, [(CONVERSATION, "")] * 17, QUICK)) == 17
    assert most == QUICK.concurrency


def test_a_reward_may_take_its_conversation_apart_and_keep_a_client():
    lock = []

    async def reward(conversation, text):
        if not lock:
            lock.append(asyncio.Lock())
        async with lock[0]:
            await asyncio.sleep(0)
            return float(conversation["messages"].pop()["content"] == "!")

    for _ in range(2):  # one loop for all units, or the lock would be another loop's
        assert {o.reward for o in reward_all(reward, [(CONVERSATION, "")] * 6, QUICK)} == {1.0}
    assert len(CONVERSATION["messages"]) == 2


def test_one_of_many_that_fails_costs_the_others_nothing():
    def reward(conversation, text):
        return 1 / int(text)

    found = reward_all(reward, [(CONVERSATION, str(k)) for k in range(5)], QUICK)
    assert [outcome.reward for outcome in found] == [None, 1, 0.5, 1 / 3, 0.25]
    assert "ZeroDivisionError: division by zero" in str(found[0].failure)


def test_no_completions_no_outcomes():
    assert reward_all(leave, []) == []


def test_what_parse_reply_sees_is_what_tool_calls_says():
    tokens = reply({"type": "python", "text": "2+2"}, {"type": "python_output", "text": "4"})
    mask = [1] * 5 + [0] * 3 + [1]
    parts = parse_reply(TOKENIZER, tokens)
    assert tool_calls(TOKENIZER, rollout(tokens[:-1], mask[:-1])) == ((parts[0]["text"], parts[1]["text"]),)

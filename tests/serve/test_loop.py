"""The thread that runs engines for asyncio: order, chunks, cancellation, overload, failures, health, weights."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from nanochat_ray.messages import SamplingParams, TokenEvent
from nanochat_ray.serve.backend import EngineFailed, Overloaded
from nanochat_ray.serve.loop import EngineLoop
from tests.serve.scripted_engine import Clock, ScriptedEngine, served

SFT = served()


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))


@contextlib.asynccontextmanager
async def loop_over(*engines: ScriptedEngine, **options) -> AsyncIterator[EngineLoop]:
    loop = EngineLoop([(served(f"m{k}") if k else SFT, engine) for k, engine in enumerate(engines)], **options)
    try:
        yield loop
    finally:
        for engine in engines:
            engine.gate.set()
        await asyncio.to_thread(loop.close)


async def collect(loop: EngineLoop, first: int, tokens: int = 5, n: int = 1) -> list[list[TokenEvent]]:
    params = SamplingParams(max_tokens=tokens, num_samples=n)
    return [chunk async for chunk in loop.generate(SFT, [first], params)]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def flat(chunks: list[list[TokenEvent]]) -> list[int]:
    return [event.token for chunk in chunks for event in chunk]


def test_every_request_gets_its_own_tokens_in_order():
    async def test() -> None:
        engine = ScriptedEngine(max_rows=3)
        async with loop_over(engine) as loop:
            results = await asyncio.gather(*(collect(loop, 100 * k, tokens=1 + k, n=1 + k % 2) for k in range(20)))
            for k, chunks in enumerate(results):
                for sample in range(1 + k % 2):
                    own = [e for chunk in chunks for e in chunk if e.sample == sample]
                    assert [e.token for e in own] == list(range(100 * k, 100 * k + 1 + k))
                    assert [e.finish_reason for e in own] == [None] * k + ["length"]
            assert loop.stats()["finished"] == 20
        assert engine.threads == {"engines"}

    run(test)


def test_the_first_token_comes_alone_and_the_rest_in_chunks():
    async def test() -> None:
        clock = Clock()
        async with loop_over(ScriptedEngine(step_s=0.001, clock=clock), stream_interval_s=0.05, clock=clock) as loop:
            chunks = await collect(loop, 0, tokens=200)
            assert len(chunks[0]) == 1
            assert {len(chunk) for chunk in chunks[1:-1]} <= {49, 50, 51}
            assert flat(chunks) == list(range(200))
            times = loop.take_times()
            assert len(times.first_token_s) == 1 and len(times.between_tokens_s) == len(chunks) - 1
            assert all(seconds == pytest.approx(0.001) for _, seconds in times.between_tokens_s)
            assert loop.take_times().first_token_s == []

    run(test)


def test_many_requests_get_larger_chunks():
    async def test() -> None:
        clock = Clock()
        engine = ScriptedEngine(max_rows=40, step_s=0.01, clock=clock)
        async with loop_over(engine, stream_interval_s=0.02, clock=clock) as loop:
            engine.gate.clear()
            readers = [asyncio.create_task(collect(loop, 0, tokens=100)) for _ in range(40)]
            await asyncio.sleep(0.02)
            engine.gate.set()
            for chunks in await asyncio.gather(*readers):
                sizes = [len(chunk) for chunk in chunks]
                assert sizes[0] == 1 and sum(sizes) == 100
                assert min(sizes[2:-1]) >= 19, "40 requests at 200 chunks per second: one every 0.2 s"

    run(test)


def test_with_a_slow_engine_every_token_comes_at_once():
    async def test() -> None:
        clock = Clock()
        async with loop_over(ScriptedEngine(step_s=0.03, clock=clock), stream_interval_s=0.01, clock=clock) as loop:
            assert [len(chunk) for chunk in await collect(loop, 0, tokens=5)] == [1] * 5

    run(test)


def test_a_reader_that_leaves_frees_its_request_at_the_next_step():
    async def test() -> None:
        engine = ScriptedEngine(max_rows=2)
        async with loop_over(engine, stream_interval_s=0.0) as loop:
            stream = loop.generate(SFT, [0], SamplingParams(max_tokens=1_000_000))
            await anext(stream)
            other = asyncio.create_task(collect(loop, 500, tokens=60))
            await until(lambda: len(engine.running) == 2)
            engine.gate.clear()
            await until(lambda: engine.at_gate)
            before = len(engine.ran)
            await stream.aclose()
            engine.gate.set()
            assert flat(await other) == list(range(500, 560))
            assert 1 in engine.ran[before] and not any(1 in ran for ran in engine.ran[before + 1 :])
            await until(lambda: loop.stats()["running"] == 0)
            assert loop.stats()["cancelled"] == 1 and not engine.busy

    run(test)


@pytest.mark.parametrize("when", ["before it is submitted", "in the queue"])
def test_a_cancelled_task_frees_its_request(when):
    async def test() -> None:
        engine = ScriptedEngine(max_rows=1)
        async with loop_over(engine) as loop:
            if when == "in the queue":
                engine.gate.clear()
            tasks = [asyncio.create_task(collect(loop, 0, tokens=100_000)) for _ in range(3)]
            await asyncio.sleep(0.02 if when == "in the queue" else 0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            engine.gate.set()
            await until(lambda: not engine.busy and loop.stats()["running"] == 0)
            assert flat(await collect(loop, 7, tokens=2)) == [7, 8]
            assert loop._lanes[SFT.name].live == 0 and not loop._lanes[SFT.name].requests

    run(test)


def test_a_request_that_cannot_be_served_raises_before_any_token():
    async def test() -> None:
        async with loop_over(ScriptedEngine()) as loop:
            with pytest.raises(ValueError, match="empty prompt"):
                await anext(loop.generate(SFT, [], SamplingParams()))
            assert flat(await collect(loop, 1, tokens=1)) == [1]
            assert loop.stats()["cancelled"] == 0

    run(test)


def test_a_full_queue_says_when_to_come_again():
    async def test() -> None:
        engine = ScriptedEngine(max_rows=2)
        async with loop_over(engine, max_queue=3) as loop:
            await collect(loop, 0, tokens=1)
            engine.gate.clear()
            tasks = [asyncio.create_task(collect(loop, 0, tokens=2)) for _ in range(5)]
            await asyncio.sleep(0.02)
            with pytest.raises(Overloaded, match="5 streams run or wait") as refused:
                await anext(loop.generate(SFT, [0], SamplingParams()))
            assert 1 <= refused.value.retry_after_s <= 60
            assert loop.stats()["rejected"] == 1
            engine.gate.set()
            assert len(await asyncio.gather(*tasks)) == 5
            assert flat(await collect(loop, 3, tokens=1)) == [3]

    run(test)


def test_a_step_that_raises_fails_this_engine_only():
    async def test() -> None:
        good, bad = ScriptedEngine(), ScriptedEngine(max_rows=1)
        async with loop_over(good, bad) as loop:
            bad.gate.clear()
            m1 = loop.models[1]
            streams = [loop.generate(m1, [0], SamplingParams()) for _ in range(3)]  # one runs, two wait
            readers = [asyncio.ensure_future(anext(stream)) for stream in streams]
            await asyncio.sleep(0.02)
            bad.broken = RuntimeError("device-side assert")
            bad.gate.set()
            for reader in readers:
                with pytest.raises(EngineFailed, match="device-side assert"):
                    await reader
            with pytest.raises(EngineFailed):
                await anext(loop.generate(m1, [0], SamplingParams()))
            with pytest.raises(EngineFailed, match="device-side assert"):
                loop.check_health()
            with pytest.raises(EngineFailed):
                await loop.update(m1, object())  # type: ignore[arg-type]
            assert not loop.stats()["healthy"]
            assert flat(await collect(loop, 3, tokens=2)) == [3, 4]

    run(test)


def test_a_step_that_hangs_is_noticed():
    async def test() -> None:
        engine = ScriptedEngine()
        async with loop_over(engine, stuck_s=0.05) as loop:
            loop.check_health()
            engine.gate.clear()
            task = asyncio.create_task(collect(loop, 0))
            await asyncio.sleep(0.2)
            with pytest.raises(EngineFailed, match=r"under way for .* s \(limit 0.05 s\)"):
                loop.check_health()
            engine.gate.set()
            await task
            await until(lambda: loop.problem() is None)

    run(test)


def test_closing_ends_every_stream():
    async def test() -> None:
        engine = ScriptedEngine(step_s=0.001)
        async with loop_over(engine) as loop:
            stream = loop.generate(SFT, [0], SamplingParams(max_tokens=100_000))
            await anext(stream)
            await asyncio.to_thread(loop.close)
            with pytest.raises(EngineFailed):
                async for _ in stream:
                    pass
            with pytest.raises(EngineFailed):
                await anext(loop.generate(SFT, [0], SamplingParams()))
            with pytest.raises(EngineFailed):
                loop.check_health()

    run(test)


def test_a_thread_that_dies_leaves_nobody_waiting():
    async def test() -> None:
        engine = ScriptedEngine()
        async with loop_over(engine) as loop:
            engine.stats = None  # type: ignore[assignment, method-assign]
            with pytest.raises(EngineFailed):
                await collect(loop, 0, tokens=100_000)
            with pytest.raises(EngineFailed, match="ended"):
                loop.check_health()

    run(test)


def test_new_weights_are_for_requests_that_come_later():
    async def test() -> None:
        engine = ScriptedEngine(step_s=0.001)
        async with loop_over(engine) as loop:
            stream = loop.generate(SFT, [0], SamplingParams(max_tokens=50))
            await anext(stream)
            assert await loop.update(dataclasses.replace(SFT, lineage={"step": 9}), object()) == 1  # type: ignore[arg-type]
            assert loop.models[0].lineage == {"step": 9}
            assert loop.stats()["models"][SFT.name]["version"] == 1
            with pytest.raises(ValueError, match="no weights"):
                await loop.update(SFT, None)  # type: ignore[arg-type]
            assert loop.models[0].lineage == {"step": 9}
            assert len([event async for chunk in stream for event in chunk]) == 49

    run(test)


def test_an_idle_loop_uses_no_cpu():
    async def test() -> None:
        async with loop_over(ScriptedEngine()) as loop:
            await collect(loop, 0)
            thread_clock = time.pthread_getcpuclockid(loop._thread.ident or 0)
            before = time.clock_gettime(thread_clock)
            await asyncio.sleep(0.5)
            assert time.clock_gettime(thread_clock) - before < 0.05

    run(test)

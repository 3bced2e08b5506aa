"""The rollout log keeps whole units only, whatever happens to its file."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat_ray.messages import FinishedUnit, RolloutGroup, RolloutPrompt, RolloutUnit, SamplingParams, ScoredRollout
from nanochat_ray.run_dir import StaleWriterError
from nanochat_ray.stages.rollout_log import LoggedRollouts, RolloutLog


def done(number: int, n_rollouts: int = 3, reward: float | None = 0.5) -> FinishedUnit:
    """A unit of one prompt that was completed, and one that was set aside."""
    prompts = tuple(RolloutPrompt(f"p{number} {k}", k, (1, 2, 3), seed=k) for k in range(2))
    rollouts = tuple(
        ScoredRollout(k, (4, 5, number), (1, 0, 1), (-0.1, 0.0, -1 / 3), "stop", "text\n\x85\u2028é", (("1+1", "2"),),
                      reward, None if reward is not None else "why")
        for k in range(n_rollouts)
    )  # fmt: skip
    unit = RolloutUnit("train", 7, number, 7, prompts, SamplingParams())
    return FinishedUnit(unit, (RolloutGroup(prompts[0], 7, rollouts), RolloutGroup(prompts[1], 7, (), "it died")))


UNITS = [done(number, 2 + number) for number in range(4)]
GROUPS = {one.unit.number: one.groups for one in UNITS}


@pytest.fixture
def log(tmp_path) -> RolloutLog:
    log = RolloutLog(tmp_path / "log")
    for one in UNITS:
        log.append(one)
    return log


def file_of(log: RolloutLog) -> Path:
    return log.folder / "train_000007.jsonl"


def test_what_is_written_is_read(log):
    assert log.units("train", 7) == GROUPS and log.units("val", 7) == log.units("train", 8) == {}
    again = done(1, 9, None)
    log.append(again)
    assert log.units("train", 7) == GROUPS | {1: again.groups}


def test_cut_anywhere_the_units_before_are_there_and_the_next_is_written_behind_them(log):
    path, data = file_of(log), file_of(log).read_bytes()
    ends = [place + 1 for place in range(len(data)) if data[place : place + 1] == b"\n"]
    for size in {0, *(end + shift for end in ends for shift in (-1, 0, 1))}:
        path.write_bytes(data[:size])
        there = log.units("train", 7)
        assert list(there) == list(GROUPS)[: len(there)] and all(there[number] == GROUPS[number] for number in there)
        RolloutLog(log.folder).append(UNITS[3])
        assert log.units("train", 7) == there | {3: GROUPS[3]}


GARBAGE = [b"", b"\x00" * 40, b"garbage", b"\n\n", b'{"kind": "unit", "unit": 2}\n', b"\r\xff"]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_costs_no_other_unit(log, garbage, caplog):
    """Nothing but what was written counts."""
    path, data = file_of(log), file_of(log).read_bytes()
    starts = [data.index(f'"prompt_id": "p{number} 0"'.encode()) for number in range(4)]
    for number, start in enumerate(starts):
        for place in (start, start + 200):
            path.write_bytes(data[:place] + garbage + data[place + 10 :])
            there = log.units("train", 7)
            lost = GROUPS.keys() - there.keys()
            assert lost == {number} and all(there[k] == GROUPS[k] for k in there)
            assert f"{path}: a unit is not as it was written" in caplog.text
            caplog.clear()
            RolloutLog(log.folder).append(UNITS[number])
            assert log.units("train", 7) == GROUPS


def test_a_changed_number_does_not_count(log):
    path = file_of(log)
    path.write_text(path.read_text().replace('"reward": 0.5', '"reward": 1.5', 1))
    assert log.units("train", 7).keys() == GROUPS.keys() - {0}


@contextlib.contextmanager
def full_at(size_bytes: int) -> Iterator[None]:
    """A disk on which no file gets larger than this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_named_and_costs_nothing(log):
    size, more = file_of(log).stat().st_size, done(4)
    words = r"train step 7 unit 4 not written to .*train_000007\.jsonl"
    for _ in range(2):
        with full_at(size + 100), pytest.raises(OSError, match=words):
            log.append(more)
    assert log.units("train", 7) == GROUPS and file_of(log).stat().st_size > size
    log.append(more)
    assert log.units("train", 7) == GROUPS | {4: more.groups}


def test_without_the_right_to_write_nothing_is_written(log):
    before = file_of(log).read_bytes()

    @contextlib.contextmanager
    def guard() -> Iterator[None]:
        raise StaleWriterError("followed")
        yield

    with pytest.raises(StaleWriterError):
        RolloutLog(log.folder, guard).append(done(4))
    assert file_of(log).read_bytes() == before


def test_replay_is_of_the_same_prompts_and_seeds(log):
    source = LoggedRollouts(log.folder)
    assert [found.groups for found in source.finished([one.unit for one in UNITS])] == list(GROUPS.values())
    other = done(0).unit.__class__(**vars(UNITS[0].unit) | {"prompts": UNITS[1].unit.prompts})
    with pytest.raises(ValueError, match=r"train step 7 unit 0 in the log .* has other prompts or seeds"):
        list(source.finished([other]))

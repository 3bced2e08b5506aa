"""Taking a run whose last job was on another machine: one that is dead is waited for, one that lives is an error."""

from __future__ import annotations

import threading
import time

import _runtime
import pytest

from nanochat_ray import run_dir
from nanochat_ray.run_dir import LEASE_FILE, RunBusyError, RunDir, read_json, write_json


@pytest.fixture
def held(tmp_path, monkeypatch):
    """A run held by a job elsewhere, which died a moment ago."""
    monkeypatch.setattr(_runtime, "LOOK_FOR_LIFE_S", 0.05)
    run = RunDir.of(str(tmp_path), "d2")
    run.open().release()
    record = read_json(run.root / LEASE_FILE) | {"host": "elsewhere|1", "heartbeat": time.time(), "released": False}
    write_json(run.root / LEASE_FILE, record)
    return run, record


def test_a_dead_holder_is_waited_for(held, monkeypatch, caplog):
    run, record = held
    monkeypatch.setattr(run_dir, "HEARTBEAT_STALE_S", 0.5)
    with _runtime.take(run) as lease:
        assert lease.epoch == record["epoch"] + 1
    assert "elsewhere" in caplog.text and "signs of life" in caplog.text


def test_a_living_holder_is_an_error_as_soon_as_it_shows_it(held):
    run, record = held

    def beat() -> None:
        write_json(run.root / LEASE_FILE, record | {"heartbeat": time.time() + 1})

    threading.Timer(0.3, beat).start()
    with pytest.raises(RunBusyError, match="elsewhere"):
        _runtime.take(run)


def test_a_holder_of_this_machine_is_an_error_at_once(held):
    run, record = held
    write_json(run.root / LEASE_FILE, record | {"released": True})
    with run.open(), pytest.raises(RunBusyError):
        _runtime.take(run)


def test_a_clock_that_is_ahead_does_not_hold_it_for_ever(held, monkeypatch):
    run, record = held
    write_json(run.root / LEASE_FILE, record | {"heartbeat": time.time() + 3600})
    monkeypatch.setattr(_runtime, "HEARTBEAT_STALE_S", 0.2)
    monkeypatch.setattr(_runtime, "HEARTBEAT_S", 0.0)
    with pytest.raises(RunBusyError):
        _runtime.take(run)

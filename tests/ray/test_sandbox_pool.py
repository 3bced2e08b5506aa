"""Programs on actors: results in order, actors that die replaced, what the machine fails at named."""

from __future__ import annotations

import os
import threading
import time

import pytest

from nanochat_ray import sandbox
from nanochat_ray.sandbox import ProgramResult, SandboxFailed, SandboxUnavailable
from tests.sandbox.isolated import require

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(autouse=True)
def isolated():
    require(sandbox.usable() or "bwrap")


@pytest.mark.slow
def test_results_come_in_order_though_an_actor_is_killed(monkeypatch):
    import ray

    from nanochat_ray.evals import sandbox_pool

    started = []
    start = sandbox_pool.start_actor
    monkeypatch.setattr(sandbox_pool, "start_actor", lambda: started.append(start()) or started[-1])
    killer = threading.Thread(target=lambda: (time.sleep(0.3), ray.kill(started[0])))

    def kill_when_busy() -> None:
        ray.get(started[0].ready.remote(False))  # behind what it has been given so far
        killer.start()

    watcher = threading.Thread(target=lambda: (wait_for(lambda: started), kill_when_busy()))
    watcher.start()
    codes = [f"import time; time.sleep({0.2 * (k < 4)}); print({k}); assert {k} != 5" for k in range(12)]
    found = sandbox_pool.run_programs(codes, actors=2)
    watcher.join()
    killer.join()
    assert [result.stdout for result in found if isinstance(result, ProgramResult)] == [f"{k}\n" for k in range(12)]
    assert [result.outcome for result in found] == ["passed"] * 5 + ["failed"] + ["passed"] * 6
    assert len(started) == 3


def wait_for(what) -> None:
    deadline = time.monotonic() + 60
    while not what() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_actors_are_small_and_see_no_gpu(monkeypatch):
    from nanochat_ray.evals import sandbox_pool

    class Asked(sandbox_pool.SandboxActor):
        def run(self, code, unsafe):
            import sys

            loaded = sorted({"torch", "nanochat_ray.stages"} & set(sys.modules))
            return ProgramResult(True, f"{loaded} {os.environ['CUDA_VISIBLE_DEVICES']!r}", "", None)

    monkeypatch.setattr(sandbox_pool, "SandboxActor", Asked)
    (result,) = sandbox_pool.run_programs(["pass"], actors=1)
    assert result.stdout == "[] ''"


def test_a_program_whose_actors_die_is_given_up_and_the_others_are_not(monkeypatch):
    from nanochat_ray.evals import sandbox_pool

    class Poisoned(sandbox_pool.SandboxActor):
        def run(self, code, unsafe):
            return os._exit(1) if "poison" in code else super().run(code, unsafe)

    monkeypatch.setattr(sandbox_pool, "SandboxActor", Poisoned)
    monkeypatch.setattr(sandbox_pool, "MAX_TRIES", 2)
    good, bad, other = sandbox_pool.run_programs(["pass", "'poison'", "assert False"], actors=2)
    assert (good.success, other.success) == (True, False)
    assert isinstance(bad, SandboxFailed) and "2 actors died while it ran" in str(bad)


def test_a_cluster_without_isolation_says_so(monkeypatch):
    from nanochat_ray.evals import sandbox_pool

    class Bare(sandbox_pool.SandboxActor):
        def ready(self, unsafe):
            if not unsafe:
                raise SandboxUnavailable("install something")

    monkeypatch.setattr(sandbox_pool, "SandboxActor", Bare)
    with pytest.raises(SandboxUnavailable, match="install something"):
        sandbox_pool.require_isolation()
    with pytest.raises(SandboxUnavailable, match="install something"):
        sandbox_pool.run_programs(["pass"], actors=1)
    assert sandbox_pool.run_programs(["pass"], actors=1, unsafe=True)[0].success
    assert sandbox_pool.run_programs([], actors=2) == []


def test_no_room_is_said_and_given_up(monkeypatch, caplog):
    from nanochat_ray.evals import sandbox_pool
    from nanochat_ray.messages import ClusterError

    monkeypatch.setattr(sandbox_pool, "ACTOR_CPUS", 1000)
    monkeypatch.setattr(sandbox_pool, "SPEAK_EVERY_S", 0.1)
    monkeypatch.setattr(sandbox_pool, "START_TIMEOUT_S", 0.5)
    with pytest.raises(ClusterError, match="no sandbox actor could be placed"):
        sandbox_pool.run_programs(["pass"], actors=1)
    assert "waiting for a sandbox actor" in caplog.text
    with pytest.raises(ClusterError, match="no sandbox actor could be placed"):
        sandbox_pool.require_isolation()

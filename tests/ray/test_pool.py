"""Evaluation actors: named for people, replaced when they die, plain about what a checkpoint or a unit raises."""

from __future__ import annotations

import threading
import time

import pytest

from nanochat_ray.evals.hf import run_units_here
from nanochat_ray.model.checkpoint import MODEL_FILE, CorruptCheckpointError, step_folder
from nanochat_ray.run_dir import CHECKPOINTS
from nanochat_ray.stages.evaluation import BpbUnit, CoreUnit, EvalSpec
from tests.stages.tiny import STEPS, Recorder, make_run, run_pretrain

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def spec(tmp_path_factory, shards):
    job, rows = make_run(tmp_path_factory.mktemp("run") / "d1", shards)
    run_pretrain(job, rows, Recorder(job.stage_folder))
    return EvalSpec(job.stage_folder / CHECKPOINTS, STEPS, job.tokenizer_folder, "cpu", "float32",
                    manifest=job.manifest)  # fmt: skip


@pytest.mark.slow
def test_an_actor_that_is_killed_is_replaced_and_has_a_readable_name(spec, monkeypatch):
    import ray

    from nanochat_ray.evals.pool import run_units

    names: list[str] = []

    def kill_one() -> None:
        deadline = time.monotonic() + 60
        while not names and time.monotonic() < deadline:
            names.extend(name for name in ray.util.list_named_actors() if name.startswith("evaluate "))
            time.sleep(0.02)
        ray.kill(ray.get_actor(names[0]))

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    units = [BpbUnit("val", 12, start, start + 2) for start in range(0, 12, 2)]
    found = run_units(spec, units, actors=2)
    killer.join()
    assert found == run_units_here(spec, units)
    assert names[0].startswith(f"evaluate {spec.checkpoints.parent.parent.name} pretrain step {STEPS} #")
    assert found == run_units(spec, units, actors=1)  # names of the first pool are in nobody's way


def test_what_a_unit_or_a_checkpoint_raises_arrives_as_it_is(spec, tmp_path):
    import shutil
    from dataclasses import replace

    from nanochat_ray.evals.pool import run_units

    with pytest.raises(AssertionError):
        run_units(spec, [CoreUnit("nothing", (0,), None)], actors=1)  # without a bundle
    shutil.copytree(spec.checkpoints, tmp_path / "checkpoints")
    weights = step_folder(tmp_path / "checkpoints", STEPS) / MODEL_FILE
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpointError, match="manifest"):
        run_units(replace(spec, checkpoints=tmp_path / "checkpoints"), [BpbUnit("val", 12, 0, 2)], actors=1)


def test_what_gets_no_place_says_so_and_gives_up(spec, monkeypatch, caplog):
    from nanochat_ray.evals import pool
    from nanochat_ray.messages import ClusterError

    monkeypatch.setattr(pool, "SPEAK_EVERY_S", 0.2)
    monkeypatch.setattr(pool, "START_TIMEOUT_S", 1.0)
    gpu = EvalSpec(spec.checkpoints, STEPS, spec.tokenizer_folder, "cuda:0")  # of which the cluster has none
    with pytest.raises(ClusterError, match=r"no evaluation actor could be placed and loaded.*free: . CPU"):
        pool.run_units(gpu, [BpbUnit("val", 12, 0, 2)], actors=1)
    assert "waiting for an evaluation actor" in caplog.text


def test_a_unit_that_hangs_is_given_up(spec, monkeypatch):
    from nanochat_ray.evals import pool
    from nanochat_ray.messages import ClusterError

    class Hangs(pool.EvalActor):
        def run(self, unit):
            time.sleep(600)

    monkeypatch.setattr(pool, "EvalActor", Hangs)
    monkeypatch.setattr(pool, "SPEAK_EVERY_S", 0.2)
    monkeypatch.setattr(pool, "UNIT_TIMEOUT_S", 0.5)
    monkeypatch.setattr(pool, "MAX_TRIES", 2)
    with pytest.raises(ClusterError, match="2 evaluation actors died one after another"):
        pool.run_units(spec, [BpbUnit("val", 12, 0, 2)], actors=1)

"""Without vLLM: one clear line, before anything is started. Where there is one, these say nothing and are skipped."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import rl
from pydantic import ValidationError

from nanochat_ray.config import RLSettings, RunSettings
from nanochat_ray.interchange import vllm_plugin
from nanochat_ray.presets import Machine
from nanochat_ray.rollout import vllm
from nanochat_ray.serve.app_settings import ServeSettings
from tests.jobs.rl_run import prepare
from tests.jobs.test_rl_job import flags, inside

without = pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("storage")
    prepare(folder)
    return folder


@without
def test_rl_says_what_to_install_and_starts_nothing(storage):
    import ray

    before = ray.is_initialized()
    code, said = inside(flags(storage, "--rollout-engine", "vllm"))
    assert code == 1 and said.startswith("error: vLLM is not installed: ") and said.count("\n") == 1
    assert ray.is_initialized() == before and not (storage / "m" / "rl").exists()


@without
def test_a_server_says_what_to_install():
    from nanochat_ray.serve.app import build

    with pytest.raises(ValueError, match="vLLM is not installed: "):
        build(ServeSettings(engine="vllm"))


@pytest.mark.parametrize("more", [("--no-ray",), ("--rollout-workers", "0")], ids=lambda more: more[0])
def test_sampling_in_turns_with_training_is_refused_by_name(storage, more):
    code, said = inside(flags(storage, "--rollout-engine", "vllm", *more))
    assert code == 1 and said.startswith("error: rollout_engine vllm: ") and "--rollout-workers 1" in said


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"models": [{"source": "sft"}, {"source": "base"}]}, "one model of vLLM, not 2"),
        ({"device": "mps"}, "no device mps"),
    ],
)
def test_what_vllm_cannot_serve_is_refused(args, said):
    with pytest.raises(ValidationError, match=said):
        ServeSettings.model_validate({"engine": "vllm"} | args)


@pytest.mark.parametrize(
    ("machine", "rollout_workers", "refused"),
    [
        (Machine(2, "H100"), None, True),
        (Machine(3, "H100"), None, False),
        (Machine(2, "H100"), 1, False),
        (Machine(0, where="in the cluster"), None, False),
        (Machine(0), None, False),
    ],
)
def test_no_gpu_beside_training_is_said_before_training(monkeypatch, machine, rollout_workers, refused):
    devices: list[str | None] = []
    monkeypatch.setattr(vllm_plugin, "check_vllm", devices.append)
    asked = RunSettings(workers="1:2"), RLSettings(rollout_engine="vllm", rollout_workers=rollout_workers), machine
    if refused:
        with pytest.raises(ValueError, match="no GPU beside"):
            rl.check_engine(*asked)
    else:
        rl.check_engine(*asked)
        unknown = machine.where == "in the cluster"
        assert devices == [None if unknown else "cuda" if machine.gpus else "cpu"]


def test_why_vllm_failed_reaches_the_pool():
    """As an error that is no ValueError, after which the pool takes another actor."""
    sampler = object.__new__(vllm.VllmSampler)
    engine = sampler.engine = SimpleNamespace(failed=False, forget=lambda: None)  # type: ignore[assignment]
    sampler.version = 1

    def rollouts(*_) -> None:
        engine.failed = True
        raise ValueError("no memory for\na page")

    engine.rollouts = rollouts
    unit = SimpleNamespace(version=1, prompts=(), params=None)
    with pytest.raises(RuntimeError, match="vLLM failed: ValueError: no memory"):
        sampler.sample(unit)  # type: ignore[arg-type]

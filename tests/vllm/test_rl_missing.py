"""Without vLLM: one clear line, before anything is started. Where there is one, these say nothing and are skipped."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

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


def test_an_actor_whose_vllm_failed_ends(monkeypatch):
    """The pool then starts another one; in the same process there is no new engine."""
    from nanochat_ray.rollout import vllm

    ended: list[int] = []
    monkeypatch.setattr(vllm.os, "_exit", ended.append)
    sampler = object.__new__(vllm.VllmSampler)
    for failed in (False, True):
        sampler.engine = SimpleNamespace(failed=failed)
        sampler.rest()
        assert ended == [1] * failed

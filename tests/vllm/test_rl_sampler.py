"""What an actor of vLLM samples is a function of the unit, the weights and the spec."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from nanochat_ray.engine.calculator import calculate
from nanochat_ray.engine.engine import Engine
from nanochat_ray.messages import Rollout, RolloutPrompt, RolloutUnit, SamplingParams
from nanochat_ray.model.flat_weights import flatten
from nanochat_ray.rollout import vllm
from nanochat_ray.rollout.vllm import VllmSampler
from nanochat_ray.stages.rollouts import RolloutSpec
from tests.engine.tiny import random_prompt
from tests.stages.rl_tiny import LowLetters
from tests.vllm.test_rl_engine import CONFIG, TOKENIZER, noisy

PROMPTS = tuple(RolloutPrompt(f"p{k}", k, tuple(random_prompt(20 + 9 * k, k)), 100 + k) for k in range(6))
UNIT = RolloutUnit("train", 0, 0, 3, PROMPTS, SamplingParams(max_tokens=24, num_samples=3, logprobs=0))


@pytest.fixture
def spec(tmp_path: Path) -> RolloutSpec:
    TOKENIZER.save(tmp_path)
    return RolloutSpec("m", LowLetters(), tmp_path, CONFIG, "cpu", "float32", max_rows=4, max_len=96)


def test_a_cache_that_does_not_fit_is_refused_by_name(spec: RolloutSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "free_bytes", lambda device: 10**5)
    with pytest.raises(ValueError, match=r"4 rows of 96 tokens takes .* GB, and 0\.0 GB are free on cpu"):
        VllmSampler(spec)


@pytest.mark.vllm
def test_two_engines_of_a_spec_sample_the_same(spec: RolloutSpec, vllm_environment: None) -> None:
    """Each begins without weights; memory that others took or left does not count."""
    found: list[list[list[Rollout]]] = []
    blocks = []
    model, other = noisy(1), noisy(2)
    for _ in range(2):
        sampler = VllmSampler(spec)
        sampler.load(flatten(other, 2))
        sampler.load(flatten(model, 3))
        found.append(sampler.sample(UNIT))
        blocks.append(sampler.engine.stats().blocks_total)
        if len(found) == 2:
            assert sampler.sample(UNIT) == found[0]  # and once more in the same one
            greedy = dataclasses.replace(UNIT.params, temperature=0.0, num_samples=1)
            want = Engine(model, TOKENIZER, 4, tools=(calculate,)).rollouts([p.token_ids for p in PROMPTS], greedy)
            said = sampler.sample(dataclasses.replace(UNIT, params=greedy))
            assert [[r.token_ids for r in group] for group in said] == [[r.token_ids for r in g] for g in want]
        sampler.engine.close()
    assert found[0] == found[1] and blocks[0] == blocks[1] > 4 * 96 / 32
    assert len({tuple(rollout.token_ids) for group in found[0] for rollout in group}) > 12

"""Decoding on a GPU through CUDA graphs."""

from __future__ import annotations

import logging

import pytest
import torch

from nanochat_ray.engine.engine import Engine
from nanochat_ray.messages import SamplingParams
from tests.engine.test_engine import naive_until_end
from tests.engine.tiny import byte_tokenizer, random_prompt, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_graphs_give_the_tokens_of_full_forward_passes(caplog: pytest.LogCaptureFixture) -> None:
    """Rows of many lengths that leave and join, weights that change, in double precision."""
    first, second = (tiny_model("SL", n_layer=layers).cuda() for layers in (3, 3))
    with torch.no_grad():
        second.lm_head.weight.mul_(-1)
    params = SamplingParams(temperature=0.0, max_tokens=20, use_tools=False)
    prompts = [random_prompt(length, length) for length in (1, 3, 130, 40, 150, 9)]
    engine = Engine(first, byte_tokenizer(), max_rows=4)
    with caplog.at_level(logging.WARNING):
        for model in (first, second):
            if model is second:
                engine.update(second)
            found = engine.rollouts(prompts, params)
            for prompt, [rollout] in zip(prompts, found, strict=True):
                wanted = naive_until_end(engine, prompt, 20)
                assert [*rollout.token_ids, *[t for t in [rollout.terminal_token] if t is not None]] == wanted
    assert not caplog.records, "graphs were given up"

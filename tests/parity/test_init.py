"""Initial weights against the golden statistics."""

from __future__ import annotations

import math

import pytest
import torch

from nanochat_ray.config import ModelConfig
from nanochat_ray.model.gpt import GPT
from tests.parity.goldens import load_json

STATS = load_json("init_stats")
NAMES = {
    "resid_scale": "resid_lambdas",
    "embed_skip": "x0_lambdas",
    "smear.scale": "smear_lambda",
    "smear.gate": "smear_gate.weight",
    "backout.scale": "backout_lambda",
    "tok_embed": "transformer.wte.weight",
    "out_head": "lm_head.weight",
}
PARTS = {
    "attn.q": "attn.c_q",
    "attn.k": "attn.c_k",
    "attn.v": "attn.c_v",
    "attn.out": "attn.c_proj",
    "attn.value_gate": "attn.ve_gate",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


def stored_name(neutral: str) -> str:
    if neutral in NAMES:
        return NAMES[neutral]
    kind, layer, *part = neutral.split(".")
    if kind == "value_embed":
        return f"value_embeds.{layer}.weight"
    return f"transformer.h.{layer}.{PARTS['.'.join(part)]}.weight"


@pytest.fixture(scope="module")
def parameters() -> dict[str, torch.Tensor]:
    model = GPT.build(ModelConfig(**STATS["config"]), seed=STATS["seed"])
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def test_every_parameter_has_a_golden(parameters):
    assert {stored_name(neutral) for neutral in STATS["params"]} == parameters.keys()


@pytest.mark.parametrize("neutral", STATS["params"])
def test_law(neutral, parameters):
    expected, tensor = STATS["params"][neutral], parameters[stored_name(neutral)]
    assert list(tensor.shape) == expected["shape"]
    law, *arguments = expected["law"]
    n, values = tensor.numel(), tensor.double()
    if law == "constant":
        torch.testing.assert_close(tensor, torch.full_like(tensor, arguments[0]), atol=1e-6, rtol=0)
    elif law == "uniform":
        low, high = arguments
        assert low <= tensor.min().item() and tensor.max().item() <= high
        if n > 1000:
            margin = 6 / math.sqrt(n) * (high - low)
            assert values.mean().item() == pytest.approx((low + high) / 2, abs=margin)
            assert values.std(correction=0).item() == pytest.approx((high - low) / math.sqrt(12), abs=margin)
    elif law == "normal":
        mean, std = arguments
        margin = 6 / math.sqrt(n) * std
        assert values.mean().item() == pytest.approx(mean, abs=margin)
        assert values.std(correction=0).item() == pytest.approx(std, abs=margin)
    else:
        assert law == "exact"
        expected_values = torch.tensor(expected["values"]).view_as(tensor)
        torch.testing.assert_close(tensor, expected_values, atol=1e-6, rtol=0)


def test_draws_come_in_the_order_of_the_reference(parameters):
    """Same generator, same order of drawing, so the very same numbers."""
    for neutral, expected in STATS["params"].items():
        first = parameters[stored_name(neutral)].flatten()[: len(expected["seed42_first"])]
        torch.testing.assert_close(first, torch.tensor(expected["seed42_first"]), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("depth", STATS["lambdas_by_depth"])
def test_lambdas_by_depth(depth):
    config = ModelConfig(sequence_len=16, vocab_size=64, n_layer=int(depth), n_head=1, n_kv_head=1, n_embd=32)
    model, expected = GPT.build(config), STATS["lambdas_by_depth"][depth]
    for ours, neutral in (
        (model.resid_lambdas, "resid_scale"),
        (model.x0_lambdas, "embed_skip"),
        (model.smear_lambda, "smear_scale"),
        (model.backout_lambda, "backout_scale"),
    ):
        torch.testing.assert_close(ours.detach(), torch.tensor(expected[neutral]), atol=1e-6, rtol=0)

"""AdamW and Muon on given gradients against recorded parameters and states."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nanochat_ray.model.optim import MuonAdamW, ParamGroup
from tests.parity.goldens import load_json, load_tensors

GOLDEN = load_json("optimizer")
TENSORS = load_tensors("optimizer")
TOLERANCE, SQUARE_TOLERANCE, BF16_TOLERANCE = 2e-6, 5e-5, 3e-2


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return (found.detach() - expected).abs().max().item()


@pytest.mark.parametrize("name", GOLDEN["adamw"])
def test_adamw(name):
    case = GOLDEN["adamw"][name]
    param = nn.Parameter(TENSORS[f"adamw.{name}.init"].clone())
    assert list(param.shape) == case["shape"]
    group = ParamGroup("adamw", ["p"], [param], 0.0, case["weight_decay"], tuple(case["betas"]), case["eps"])
    optimizer = MuonAdamW([group])
    for step, lr in enumerate(case["lr"]):
        group.lr = lr
        param.grad = TENSORS[f"adamw.{name}.grad{step}"].clone()
        optimizer.step()
        assert distance(param, TENSORS[f"new.adamw.{name}.after{step}"]) <= TOLERANCE
    state = optimizer.state_by_name()
    assert state["p.step"] == GOLDEN["steps"]
    assert distance(state["p.exp_avg"], TENSORS[f"new.adamw.{name}.state.m"]) <= TOLERANCE
    assert distance(state["p.exp_avg_sq"], TENSORS[f"new.adamw.{name}.state.v"]) <= TOLERANCE


@pytest.mark.parametrize("version", ["new", "old_fp32", "old_bf16"])
@pytest.mark.parametrize("name", GOLDEN["muon"]["groups"])
def test_muon(name, version):
    case = GOLDEN["muon"]
    init = TENSORS[f"muon.{name}.init"]
    expected = case["groups"][name]
    assert list(init.shape) == [expected["count"], *expected["shape"]]
    params = [nn.Parameter(matrix.clone()) for matrix in init]
    names = [str(i) for i in range(len(params))]
    group = ParamGroup("muon", names, params, 0.0, 0.0, beta2=case["beta2"], ns_steps=case["ns_steps"])
    dtype = torch.bfloat16 if version == "old_bf16" else torch.float32
    both = version == "new"
    optimizer = MuonAdamW([group], muon_eq=both, muon_plus=both, orthogonalize_dtype=dtype)
    tolerance = BF16_TOLERANCE if version == "old_bf16" else SQUARE_TOLERANCE if name == "square" else TOLERANCE
    for step in range(GOLDEN["steps"]):
        group.lr = case["lr"][step]
        group.momentum, group.weight_decay = case["momentum"][step], case["weight_decay"][step]
        for param, grad in zip(params, TENSORS[f"muon.{name}.grad{step}"], strict=True):
            param.grad = grad.clone()
        optimizer.step()
        assert distance(torch.stack(params), TENSORS[f"{version}.muon.{name}.after{step}"]) <= tolerance
    state = optimizer.state_by_name()
    momentum = torch.stack([state[f"{i}.momentum_buffer"] for i in names])
    assert distance(momentum, TENSORS[f"new.muon.{name}.state.momentum"]) <= TOLERANCE
    second = torch.stack([state[f"{i}.second_momentum_buffer"] for i in names])
    assert distance(second, TENSORS[f"{version}.muon.{name}.state.second_moment"]) <= tolerance

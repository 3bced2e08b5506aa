"""Schedules against recorded values."""

from __future__ import annotations

import pytest

from nanochat_ray.model.schedule import (
    lr_multiplier,
    muon_momentum,
    muon_weight_decay,
    rl_lr_multiplier,
    sft_lr_multiplier,
    sft_muon_momentum,
)
from tests.parity.goldens import load_json

GOLDEN = load_json("schedules")
exactly = {"abs": 1e-12, "rel": 0}


@pytest.mark.parametrize("case", GOLDEN["base"], ids=lambda case: f"N{case['num_iterations']}")
def test_pretraining(case):
    N, ratio = case["num_iterations"], case["warmdown_ratio"]
    steps = case["steps"]
    lr = [lr_multiplier(i, N, case["warmup_steps"], ratio, case["final_lr_frac"]) for i in steps]
    assert lr == pytest.approx(case["lr"], **exactly)
    assert [muon_momentum(i, N, ratio) for i in steps] == pytest.approx(case["muon_momentum"], **exactly)
    decay = [muon_weight_decay(i, N, case["weight_decay"]) for i in steps]
    assert decay == pytest.approx(case["weight_decay_at"], **exactly)


@pytest.mark.parametrize("case", GOLDEN["sft"], ids=lambda case: f"{case['warmup_ratio']}-{case['warmdown_ratio']}")
def test_sft(case):
    final = case["final_lr_frac"]
    # Past the end the reference goes below the final fraction and turns negative; here it stays.
    expected = [lr if p <= 1 else final for p, lr in zip(case["progress"], case["lr"], strict=True)]
    assert any(p > 1 for p in case["progress"])
    found = [sft_lr_multiplier(p, case["warmup_ratio"], case["warmdown_ratio"], final) for p in case["progress"]]
    assert found == pytest.approx(expected, **exactly)


def test_sft_momentum():
    case = GOLDEN["sft_muon_momentum"]
    assert [sft_muon_momentum(i) for i in case["steps"]] == pytest.approx(case["muon_momentum"], **exactly)


@pytest.mark.parametrize("case", GOLDEN["rl"], ids=lambda case: f"N{case['num_steps']}")
def test_rl(case):
    assert [rl_lr_multiplier(i, case["num_steps"]) for i in case["steps"]] == pytest.approx(case["lr"], **exactly)


@pytest.mark.parametrize(
    ("N", "decay", "step", "lr", "momentum", "weight_decay"),
    [
        (2520, 0.28, 0, 0.025, 0.85, 0.28),
        (2520, 0.28, 883, 0.999420, 0.969957, 0.203403),
        (2520, 0.28, 2519, 0.050580, 0.900043, 1.1e-7),
        (5568, 0.059738, 1949, 1, 0.97, 0.043426),
        (5568, 0.059738, 5567, 0.050263, 0.900019, 0),
        (528, 1.889903, 399, 0.407289, 0.969700, None),
        (528, 1.889903, 400, 0.404519, 0.926122, None),
    ],
)
def test_worked_values(N, decay, step, lr, momentum, weight_decay):
    assert lr_multiplier(step, N, 40, 0.65, 0.05) == pytest.approx(lr, abs=1e-6)
    assert muon_momentum(step, N, 0.65) == pytest.approx(momentum, abs=1e-6)
    if weight_decay is not None:
        assert muon_weight_decay(step, N, decay) == pytest.approx(weight_decay, abs=1e-6)


def test_corners():
    assert lr_multiplier(19, 20, 40, 0.65, 0.05) == 0.5  # shorter than the warmup, which wins
    assert [lr_multiplier(i, 10, 0, 0.0, 0.05) for i in (0, 9, 10)] == [1, 1, 1]  # no warmup, no warmdown
    assert muon_momentum(500, 500, 0.0) == 0.97
    assert sft_lr_multiplier(-0.5, 0.0, 0.5, 0.0) == 1
    assert sft_lr_multiplier(1.0, 0.0, 0.0, 0.0) == 1

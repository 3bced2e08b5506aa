"""Scaling rules: the published worked values, the speedrun's plan, corner cases of the horizon, device peaks."""

from __future__ import annotations

import math

import pytest

from nanochat_ray.config import ModelConfig, PretrainSettings
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.scaling import (
    flops_per_token,
    model_config_for,
    param_counts,
    peak_flops,
    plan_training,
    scaling_params,
)

VOCAB = 32768
SMEAR_FLOPS = 144  # the worked values were made without the smear gate's 24 weights


def plan_of(depth: int, **changes):
    return plan_training(PretrainSettings(depth=depth, **changes), VOCAB)


def test_speedrun():
    plan = plan_of(24, target_param_data_ratio=8, device_batch_size=16)
    assert plan.total_batch_size == 1_048_576
    assert plan.num_iterations == 5_568
    assert plan.grad_accum_steps(device_batch_size=16, world_size=8) == 4
    assert plan.target_tokens == 5_838_484_992
    assert plan.total_tokens == 5_838_471_168
    assert plan.total_flops == pytest.approx(2.788e19, rel=1e-3)
    assert plan.weight_decay == pytest.approx(0.059738, abs=1e-6)


@pytest.mark.parametrize(
    ("depth", "n_embd", "total", "scaling", "flops", "batch", "steps", "decay"),
    [
        (4, 256, 36_700_242, 11_534_384, 80_216_352, 262_144, (528, 462, 352), 1.889903),
        (6, 384, 73_531_538, 23_199_852, 167_510_664, 262_144, (1_062, 929, 708), 0.939612),
        (12, 768, 286_261_730, 110_100_912, 759_695_904, 524_288, (2_520, 2_205, 1_680), 0.28),
        (20, 1280, 896_533_746, 435_160_240, 2_886_212_640, 1_048_576, (4_980, 4_357, 3_320), 0.100188),
        (24, 1536, 1_384_122_122, 729_810_624, 4_775_225_472, 1_048_576, (8_352, 7_308, 5_568), 0.059738),
        (26, 1664, 1_681_786_938, 918_423_532, 5_991_051_144, 1_048_576, (10_510, 9_196, 7_007), 0.047470),
    ],
)
def test_worked_values(depth, n_embd, total, scaling, flops, batch, steps, decay):
    config = model_config_for(PretrainSettings(depth=depth), VOCAB)
    assert config.n_embd == n_embd
    assert param_counts(config)["total"] == total
    assert scaling_params(config) == scaling
    assert flops_per_token(config) == flops + SMEAR_FLOPS
    plans = [plan_of(depth, target_param_data_ratio=ratio) for ratio in (12, 10.5, 8)]
    assert tuple(plan.num_iterations for plan in plans) == steps
    for plan in plans:  # the ratio decides neither batch nor decay
        assert plan.total_batch_size == batch
        assert plan.weight_decay == pytest.approx(decay, abs=1e-6)


@pytest.mark.parametrize(("depth", "exponent"), [(2, 17), (8, 18), (16, 19), (18, 20), (26, 20), (32, 21)])
def test_batch_by_depth(depth, exponent):
    assert plan_of(depth).total_batch_size == 2**exponent


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(n_layer=1, n_head=2, n_kv_head=1, n_embd=48, vocab_size=100, sequence_len=32),
        ModelConfig(n_layer=4, n_head=4, n_kv_head=2, n_embd=64, vocab_size=512, sequence_len=32),
        ModelConfig(n_layer=5, n_head=3, n_kv_head=3, n_embd=96, vocab_size=65, sequence_len=32),
    ],
)
def test_counts_equal_a_built_model(config):
    model = GPT(config)
    counted = {"wte": 0, "value_embeds": 0, "lm_head": 0, "transformer_matrices": 0, "scalars": 0}
    kinds = {"transformer.wte": "wte", "value_embeds": "value_embeds", "lm_head": "lm_head"}
    for name, p in model.named_parameters():
        kind = "transformer_matrices" if name.startswith("transformer.h.") else "scalars"
        kind = next((k for prefix, k in kinds.items() if name.startswith(prefix)), kind)
        counted[kind] += p.numel()
    assert param_counts(config) == counted | {"total": sum(p.numel() for p in model.parameters())}


def test_horizons_in_order():
    by_ratio = plan_of(4)
    by_flops = plan_of(4, target_flops=1e15)
    assert by_flops.num_iterations == round(1e15 / (by_ratio.flops_per_token * by_ratio.total_batch_size))
    assert plan_of(4, target_flops=1e15, num_iterations=7).num_iterations == 7
    # The shorter horizons leave batch and decay as the ratio has them.
    for plan in (by_flops, plan_of(4, num_iterations=7)):
        assert (plan.total_batch_size, plan.weight_decay) == (by_ratio.total_batch_size, by_ratio.weight_decay)


@pytest.mark.parametrize("horizon", [{"target_flops": 1e15}, {"num_iterations": 7}])
def test_without_a_ratio_the_default_one_is_the_reference(horizon):
    assert plan_of(4, target_param_data_ratio=None, **horizon) == plan_of(4, **horizon)


def test_ratio_zero_or_negative_is_refused():
    for ratio in (0, -1):
        with pytest.raises(ValueError, match="greater than 0"):
            PretrainSettings(target_param_data_ratio=ratio)
    with pytest.raises(ValueError, match="no horizon"):
        PretrainSettings(target_param_data_ratio=None)


def test_a_horizon_below_one_step_is_refused():
    with pytest.raises(ValueError, match=r"target_flops.*less than one step"):
        plan_of(4, target_flops=1e9)
    with pytest.raises(ValueError, match=r"target_param_data_ratio.*less than one step"):
        plan_of(1, total_batch_size=2**27)


def test_the_batch_is_whole_rows():
    with pytest.raises(ValueError, match=r"524288 is not a multiple .* 2000; the nearest that is: 524000"):
        plan_of(4, max_seq_len=2000, total_batch_size=524_288)
    plan = plan_of(4, max_seq_len=2000)
    assert plan.total_batch_size % 2000 == 0
    assert abs(plan.total_batch_size - 2**18) <= 1000
    assert plan_of(4, total_batch_size=2048).rows_per_step == 1


def test_micro_steps_cover_the_fullest_rank():
    plan = plan_of(4, max_seq_len=512, total_batch_size=512 * 10)
    assert plan.grad_accum_steps(device_batch_size=4, world_size=1) == 3
    assert plan.grad_accum_steps(device_batch_size=4, world_size=3) == 1  # 4, 3, 3 rows
    assert plan.grad_accum_steps(device_batch_size=3, world_size=3) == 2


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA H200 NVL", 836e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H800", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A40", 149.7e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("AMD Instinct MI300X", 1.3074e15),
        ("AMD Instinct MI250X", 383e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 3090 Ti", 71e12),
        ("NVIDIA RTX A4000", math.inf),
        ("NVIDIA L40", math.inf),
        ("cpu", math.inf),
        ("mps", math.inf),
    ],
)
def test_peak_flops(name, flops):
    assert peak_flops(name) == flops

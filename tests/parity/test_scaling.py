"""Scaling rules against recorded values: integers exact, floats to 1e-12 relative."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from nanochat_ray.config import ModelConfig, PretrainSettings
from nanochat_ray.model.attention import windows_of
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.optim import build_optimizer
from nanochat_ray.model.scaling import (
    decode_flops,
    flops_per_token,
    kv_bytes_per_token,
    kv_read_bytes,
    matmul_params,
    model_config_for,
    param_counts,
    plan_training,
    prefill_flops,
)
from tests.parity.goldens import load_json

GOLDEN = load_json("scaling")
exactly = {"rel": 1e-12, "abs": 0}


def settings_of(row) -> PretrainSettings:
    def given(value):
        return None if value == -1 else value

    return PretrainSettings(
        depth=row["depth"],
        aspect_ratio=row["aspect_ratio"],
        head_dim=row["head_dim"],
        max_seq_len=row["seq_len"],
        window_pattern=row["window_pattern"],
        target_param_data_ratio=row["ratio"],
        total_batch_size=given(row["total_batch_size_arg"]),
        num_iterations=given(row["num_iterations_arg"]),
        target_flops=given(row["target_flops_arg"]),
        weight_decay=row["weight_decay_arg"],
    )


@pytest.mark.parametrize("row", GOLDEN["table"], ids=lambda row: f"d{row['depth']}-{row['ratio']}")
def test_table(row):
    settings = settings_of(row)
    plan = plan_training(settings, row["vocab"])
    config = plan.config
    assert (config.n_embd, config.n_head, config.n_kv_head) == (row["n_embd"], row["n_head"], row["n_head"])
    assert windows_of(config) == row["windows"]
    assert plan.param_counts == row["params"]
    assert matmul_params(config) == row["matmul_params"]
    for name in ("flops_per_token", "scaling_params", "target_tokens", "total_batch_size", "num_iterations"):
        assert getattr(plan, name) == row[name], name
    assert plan.batch_lr_scale == pytest.approx(row["batch_lr_scale"], **exactly)
    assert plan.weight_decay == pytest.approx(row["weight_decay_scaled"], **exactly)

    with torch.device("meta"):
        model = GPT(config)
    optimizer = build_optimizer(
        model,
        unembedding_lr=settings.unembedding_lr,
        embedding_lr=settings.embedding_lr,
        matrix_lr=settings.matrix_lr,
        scalar_lr=settings.scalar_lr,
        weight_decay=plan.weight_decay,
        batch_lr_scale=plan.batch_lr_scale,
    )
    assert len(optimizer.groups) == len(row["groups"])
    for group, expected in zip(optimizer.groups, row["groups"], strict=True):
        assert group.kind == expected["kind"]
        assert len(group.params) == expected["n_tensors"]
        assert sum(p.numel() for p in group.params) == expected["n_params"]
        assert group.lr == pytest.approx(expected["lr"], **exactly)


def test_windows():
    for n_layer, pattern, length, expected in GOLDEN["windows"]:
        config = ModelConfig(n_layer=n_layer, window_pattern=pattern, sequence_len=length)
        assert windows_of(config) == expected, (n_layer, pattern, length)
    assert GOLDEN["bad_window_pattern"]["error"]
    with pytest.raises(ValidationError, match="S and L"):
        ModelConfig(window_pattern="SXL")


@pytest.mark.parametrize("row", GOLDEN["inference"], ids=lambda row: f"d{row['depth']}")
def test_inference(row):
    config = model_config_for(PretrainSettings(depth=row["depth"]), 32768)
    config = ModelConfig(**{**config.model_dump(), "n_kv_head": row["n_kv_head"]})
    assert param_counts(config) == row["params"]
    assert flops_per_token(config) == row["flops_per_token"]
    assert {n: decode_flops(config, int(n)) for n in row["decode_flops"]} == row["decode_flops"]
    assert {n: prefill_flops(config, int(n)) for n in row["prefill_flops"]} == row["prefill_flops"]
    assert kv_bytes_per_token(config, 4) == row["kv_bytes_per_token"]
    assert {n: kv_read_bytes(config, int(n), 4) for n in row["kv_read_bytes"]} == row["kv_read_bytes"]


def test_padded_vocab():
    for n, expected in GOLDEN["padded_vocab"].items():
        assert ModelConfig(vocab_size=int(n)).padded_vocab_size == expected

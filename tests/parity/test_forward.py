"""The network against the golden forward and backward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nanochat_ray.model.attention import rotary_tables
from nanochat_ray.model.gpt import GPT, has_value_embed
from tests.engine.incremental import Incremental
from tests.parity.goldens import (
    config_of,
    load_json,
    load_tensors,
    model_from_golden,
    probe_error,
    stored_names,
)

TOLERANCE = 1e-4
FORWARD = load_json("forward")
KEYS = sorted(FORWARD["cases"])


@pytest.fixture(scope="module", params=KEYS)
def case(request) -> tuple[str, dict[str, Any], dict[str, torch.Tensor], GPT]:
    key = request.param
    return key, FORWARD["cases"][key], load_tensors(f"forward_{key}"), model_from_golden(key)


def inputs(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return tensors["input_ids"].long(), tensors["targets"].long()


def test_config(case):
    key, expected, _, model = case
    assert [[left, 0] for left in model.windows()] == expected["windows"]
    assert model.config.padded_vocab_size == expected["padded_vocab"]
    layers = range(model.config.n_layer)
    assert [i for i in layers if has_value_embed(model.config, i)] == expected["value_embed_layers"]
    assert model.config.n_layer // 2 == expected["backout_after_layer"]
    names = FORWARD["names"][key]
    state = model.state_dict()
    assert {entry["stored_as"]: tuple(entry["shape"]) for entry in names.values()} == {
        name: tuple(tensor.shape) for name, tensor in state.items()
    }


def test_names_of_d():
    state = model_from_golden("d").state_dict()
    assert {entry["stored_as"]: entry["shape"] for entry in FORWARD["names"]["d"].values()} == {
        name: list(tensor.shape) for name, tensor in state.items()
    }


def test_logits(case):
    _, expected, tensors, model = case
    with torch.no_grad():
        logits = model(inputs(tensors)[0])  # (B, T, V)
    at = tensors["logit_positions"].long()
    torch.testing.assert_close(logits[:, at], tensors["logits"], atol=TOLERANCE, rtol=0)
    assert logits.argmax(-1).tolist() == expected["argmax"]
    assert probe_error(logits, expected["logits_probe"]) < TOLERANCE
    assert logits.shape[-1] == model.config.vocab_size


def test_losses(case):
    _, expected, tensors, model = case
    idx, targets = inputs(tensors)
    with torch.no_grad():
        losses = model(idx, targets, reduction="none")
        total = model(idx, targets, reduction="sum")
        mean = model(idx, targets)
    torch.testing.assert_close(losses, tensors["losses"], atol=TOLERANCE, rtol=0)
    assert int((targets >= 0).sum()) == expected["n_targets"]
    assert mean.item() == pytest.approx(expected["loss_mean"], abs=TOLERANCE)
    assert total.item() == pytest.approx(expected["loss_sum"], abs=TOLERANCE * expected["n_targets"])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients(case, reduction):
    key, expected, tensors, model = case
    idx, targets = inputs(tensors)
    model.zero_grad()
    loss = model(idx, targets, reduction=reduction)
    (loss if reduction == "mean" else loss.sum() / expected["n_targets"]).backward()
    names = stored_names(key)
    grads = {neutral: model.get_parameter(name).grad for neutral, name in names.items()}
    checked = 0
    for neutral, grad in grads.items():
        if neutral in expected["noise_only_grads"]:
            continue
        assert probe_error(grad, expected["grads"][neutral]) < TOLERANCE, neutral
        norm = grad.norm().item()
        if f"grad.{neutral}" in tensors:
            assert (grad - tensors[f"grad.{neutral}"]).norm().item() < TOLERANCE * norm, neutral
            checked += 1
        if f"grad_rows.{neutral}" in tensors:
            rows = grad[tensors["grad_rows_ids"].long()]
            assert (rows - tensors[f"grad_rows.{neutral}"]).norm().item() < TOLERANCE * norm, neutral
            checked += 1
    assert checked == sum(name.startswith("grad") for name in tensors) - ("grad_rows_ids" in tensors) - len(
        expected["noise_only_grads"]
    )


def test_activations(case):
    """Every recorded value inside the network, in the order of computing, so that the first to differ is named."""
    _, expected, tensors, model = case
    seen: dict[str, torch.Tensor] = {}
    handles = []

    def record(module: torch.nn.Module, name: str, of_input: bool = False) -> None:
        def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
            seen[name] = args[0] if of_input else output

        handles.append(module.register_forward_hook(hook))

    for i, block in enumerate(model.blocks):
        if i == 0:
            record(block, "blocks.0.input", of_input=True)
        record(block, f"blocks.{i}")
        record(block.attn, f"blocks.{i}.attn")
        record(block.mlp, f"blocks.{i}.mlp")
    record(model.lm_head, "final_norm", of_input=True)
    with torch.no_grad():
        model(inputs(tensors)[0])
    for handle in handles:
        handle.remove()
    assert seen.keys() == expected["activations"].keys()
    for name, activation in expected["activations"].items():
        assert probe_error(seen[name], activation) < TOLERANCE, name


def test_float32_noise_is_small_beside_the_tolerance(case):
    """Our fp32 pass is about as far from a pass in double precision as the reference's is from its own."""
    key, expected, tensors, model = case
    double = model_from_golden(key, torch.float64)
    with torch.no_grad():
        distance = (model(inputs(tensors)[0]) - double(inputs(tensors)[0])).abs().max().item()
    assert distance < TOLERANCE / 4
    assert expected["float32_noise"]["logits_max_abs"] < TOLERANCE / 4


def test_rotary_tables():
    rotary = FORWARD["rotary"]
    config = config_of("a")
    assert config.head_dim == rotary["head_dim"]
    cos, sin = rotary_tables(config, torch.device("cpu"))
    assert len(cos) == len(sin) == rotary["table_length"]
    for position, row in rotary["rows"].items():
        torch.testing.assert_close(cos[int(position)], torch.tensor(row["cos"]), atol=1e-5, rtol=0)
        torch.testing.assert_close(sin[int(position)], torch.tensor(row["sin"]), atol=1e-5, rtol=0)


CHUNKED = load_json("engine")["sliding"]


@pytest.mark.parametrize("number", range(len(CHUNKED["chunked"])))
def test_chunks_through_the_cache_equal_one_forward(number):
    """Where the reference forgets to smear at a border (`positions_off`), ours equals the whole forward instead."""
    expected = CHUNKED["chunked"][number]
    chunks = [150] + [1] * 50 if expected["chunks"] == "150, then 50 times 1" else expected["chunks"]
    model = model_from_golden("c")
    ids = torch.tensor([CHUNKED["chunk_ids"][: expected["total"]]])
    rows = Incremental(model, 1, sum(chunks))
    with torch.inference_mode():
        whole = model(ids)
        parts = torch.cat([rows(part) for part in ids.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(parts, whole, atol=TOLERANCE, rtol=0)
    if not expected["positions_off"]:
        assert probe_error(parts[0, -1], expected["last_logits_probe"]) < TOLERANCE
    else:
        assert probe_error(parts[0, -1], expected["last_logits_probe"]) > TOLERANCE

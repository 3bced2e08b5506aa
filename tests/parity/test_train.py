"""Whole training steps, network and optimizer together, against recorded runs."""

from __future__ import annotations

import pytest
import torch

from nanochat_ray.model.optim import build_optimizer
from nanochat_ray.model.schedule import lr_multiplier, muon_momentum, muon_weight_decay
from tests.parity.goldens import load_json, model_from_golden, probe_error, stored_names

LOSS_TOLERANCE, PARAM_TOLERANCE, GRAD_NORM_TOLERANCE = 1e-4, 1e-4, 1e-3


def run_of(key: str):
    golden = load_json(f"train_{key}")
    model = model_from_golden(key)
    assert {name: getattr(model.config, name) for name in golden["config"]} == golden["config"]
    optimizer = build_optimizer(model, **golden["base"])
    return golden, model, optimizer, stored_names(key)


@pytest.mark.parametrize("key", ["a", "b"])
def test_groups(key):
    golden, model, optimizer, names = run_of(key)
    params = dict(model.named_parameters())
    assert len(optimizer.groups) == len(golden["groups"])
    for group, expected in zip(optimizer.groups, golden["groups"], strict=True):
        assert group.kind == expected["kind"]
        assert group.names == [names[neutral] for neutral in expected["params"]]
        assert all(param is params[name] for name, param in zip(group.names, group.params, strict=True))
        assert [list(param.shape) for param in group.params] == expected["shapes"]
        for field in ("lr", "initial_lr", "weight_decay"):
            assert getattr(group, field) == pytest.approx(expected[field], rel=1e-12), field
        if group.kind == "adamw":
            assert (list(group.betas), group.eps) == (expected["betas"], expected["eps"])
        else:
            found = (group.momentum, group.ns_steps, group.beta2)
            assert found == (expected["momentum"], expected["ns_steps"], expected["beta2"])


@pytest.mark.parametrize("key", ["a", "b"])
def test_steps(key):
    golden, model, optimizer, names = run_of(key)
    params = {neutral: dict(model.named_parameters())[name] for neutral, name in names.items()}
    N, ratio = golden["num_iterations"], golden["warmdown_ratio"]
    ids = torch.tensor(golden["ids"])  # (steps + 1, micro-batches, B, T+1)

    def loss_of(micro_batch):
        return model(micro_batch[:, :-1], micro_batch[:, 1:])

    for record, micro_batches in zip(golden["steps"], ids[:-1], strict=True):
        step = record["step"]
        for micro_batch, expected in zip(micro_batches, record["micro_losses"], strict=True):
            loss = loss_of(micro_batch)
            assert abs(loss.item() - expected) <= LOSS_TOLERANCE
            (loss / golden["grad_accum"]).backward()
        for neutral, expected in record["grad_norms"].items():
            if neutral not in golden["noise_only"]:
                assert params[neutral].grad.norm().item() == pytest.approx(expected, rel=GRAD_NORM_TOLERANCE), neutral

        lr = lr_multiplier(step, N, golden["warmup_steps"], ratio, golden["final_lr_frac"])
        momentum = muon_momentum(step, N, ratio)
        decay = muon_weight_decay(step, N, golden["base"]["weight_decay"])
        expected = (record["lr_multiplier"], record["muon_momentum"], record["muon_weight_decay"])
        assert (lr, momentum, decay) == pytest.approx(expected, abs=1e-12)
        optimizer.set_schedule(lr, momentum, decay)
        optimizer.step()
        optimizer.zero_grad()
        for neutral, expected in record["params"].items():
            if neutral not in golden["noise_only"]:
                assert probe_error(params[neutral], expected) <= PARAM_TOLERANCE, (step, neutral)

    assert abs(loss_of(ids[-1, 0]).item() - golden["loss_after"]) <= LOSS_TOLERANCE
    for neutral, expected in golden["small_params_after"].items():
        if neutral not in golden["noise_only"]:
            found = params[neutral].detach()
            assert (found - torch.tensor(expected)).norm() <= PARAM_TOLERANCE * found.norm(), neutral

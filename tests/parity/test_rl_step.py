"""One RL step, batch, losses and gradients, against a recorded one."""

from __future__ import annotations

import pytest
import torch

from nanochat_ray.stages.losses import group_advantages, policy_gradient_loss, rollout_batch
from tests.parity.goldens import load_json, model_from_golden, probe_error, stored_names

GOLDEN = load_json("rl_step")
LOSS_TOLERANCE, GRAD_TOLERANCE = 1e-5, 1e-4


def recorded_batch():
    inputs, targets = rollout_batch(GOLDEN["sequences"], GOLDEN["masks"], GOLDEN["pad_id"])
    return inputs, targets, group_advantages(torch.tensor(GOLDEN["rewards"]))


def test_batch():
    assert all(sequence[: len(GOLDEN["prompt"])] == GOLDEN["prompt"] for sequence in GOLDEN["sequences"])
    inputs, targets, advantages = recorded_batch()
    assert inputs.tolist() == GOLDEN["inputs"]
    assert targets.tolist() == GOLDEN["targets"]
    assert advantages.tolist() == GOLDEN["advantages"]


def test_losses_and_gradients():
    model = model_from_golden("b")
    assert {name: getattr(model.config, name) for name in GOLDEN["config"]} == GOLDEN["config"]
    rows = GOLDEN["device_batch_size"]
    chunks = list(zip(*(t.split(rows) for t in recorded_batch()), strict=True))
    losses = []
    for inputs, targets, advantages in chunks:
        # The recorded run normalises each pass by its own targets, then averages over passes and examples.
        n_targets = int((targets >= 0).sum()) * len(chunks) * GOLDEN["examples_per_rank"]
        loss = policy_gradient_loss(-model(inputs, targets, reduction="none"), advantages, targets, n_targets)
        loss.backward()
        losses.append(loss.item())
    assert losses == pytest.approx(GOLDEN["pass_losses"], abs=LOSS_TOLERANCE)
    params = dict(model.named_parameters())
    names = stored_names("b")
    assert GOLDEN["grads"].keys() == names.keys()
    for neutral, expected in GOLDEN["grads"].items():
        assert probe_error(params[names[neutral]].grad, expected) <= GRAD_TOLERANCE, neutral


def test_the_step_does_not_depend_on_how_it_is_cut():
    model = model_from_golden("b")
    batch = recorded_batch()
    n_targets = int((batch[1] >= 0).sum())

    def gradient(rows: int) -> torch.Tensor:
        model.zero_grad()
        for inputs, targets, advantages in zip(*(t.split(rows) for t in batch), strict=True):
            logprobs = -model(inputs, targets, reduction="none")
            policy_gradient_loss(logprobs, advantages, targets, n_targets).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = gradient(4)
    for rows in (1, 2, 3):
        assert (gradient(rows) - whole).norm() <= 1e-5 * whole.norm()


def test_equal_rewards_give_no_gradient():
    inputs, targets, _ = recorded_batch()
    advantages = group_advantages(torch.ones(len(inputs)))
    logprobs = torch.randn(targets.shape, requires_grad=True)
    policy_gradient_loss(logprobs, advantages, targets, n_targets=10).backward()
    assert logprobs.grad is not None
    assert logprobs.grad.abs().max() == 0

"""Laws of the policy-gradient losses, and of the log-probabilities that they compare."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from nanochat_ray.config import RLSettings
from nanochat_ray.engine.calculator import calculate
from nanochat_ray.messages import RolloutGroup, RolloutPrompt, ScoredRollout
from nanochat_ray.stages.losses import group_advantages, learning_step, micro_batch, policy_gradient_loss
from nanochat_ray.stages.rl_desk import Plan
from nanochat_ray.stages.rollouts import UnitSampler, UnitScorer
from nanochat_ray.tasks.rl_task import RLTask, RLTaskSpec
from tests.engine.tiny import byte_tokenizer
from tests.stages.rl_tiny import LowLetters, make_rl

TARGETS = torch.tensor([[5, 2, -1, 7], [3, -1, -1, -1]])  # (B, T)
ADVANTAGES = torch.tensor([0.5, -2.0])  # (B,)
PROMPT = (1, 2, 3)


def log_ratios(*values: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, T) of the policy, with a gradient, and of the behaviour: these far apart."""
    behaviour = torch.tensor([[-1.0, -2.0, -3.0, -0.5], [-0.1, -1.0, -1.0, -1.0]], dtype=torch.float64)
    policy = (behaviour + torch.tensor(values, dtype=torch.float64)).requires_grad_()
    return policy, behaviour


def gradient(policy: Tensor, behaviour: Tensor, **options: float) -> Tensor:
    [found] = torch.autograd.grad(
        policy_gradient_loss(policy, ADVANTAGES.double(), TARGETS, 4, behaviour=behaviour, **options), [policy]
    )
    return found


def reinforce_gradient() -> Tensor:
    return -torch.where(TARGETS >= 0, ADVANTAGES.double()[:, None], 0.0) / 4


@pytest.mark.parametrize("options", [{}, {"ppo_clip": 0.2}, {"ratio_cap": 2.0}])
def test_all_are_reinforce_where_the_policy_is_the_behaviour(options):
    found = gradient(*log_ratios([0.0] * 4, [0.0] * 4), **options)
    assert torch.allclose(found, reinforce_gradient(), atol=1e-15)


def test_ppo_gives_no_gradient_beyond_its_clip():
    """A token that is already more likely by the width is pushed no further up; pulling it back is never clipped."""
    up, down = math.log(1.3), math.log(0.7)
    policy, behaviour = log_ratios([up, down, up, 0.1], [up, 0, 0, 0])
    found = gradient(policy, behaviour, ppo_clip=0.2)
    ratio = (policy - behaviour).exp()
    expected = reinforce_gradient() * ratio.detach()
    expected[0, 0] = 0.0  # to be made likelier, and 1.3 times as likely already
    assert torch.allclose(found, expected, atol=1e-15)
    policy, behaviour = log_ratios([0, 0, 0, 0], [down, 0, 0, 0])
    assert gradient(policy, behaviour, ppo_clip=0.2)[1, 0] == 0.0  # to be made less likely, and is already


def test_the_ratio_is_capped_and_has_no_gradient_of_its_own():
    """Truncated importance sampling by hand: the sum of min(cap, p / q) * advantage over the targets."""
    policy, behaviour = log_ratios([1.5, -0.4, 9.0, 200.0], [0.2, 0.0, 0.0, 0.0])
    weights = torch.tensor([[2.0, math.exp(-0.4), 0.0, 2.0], [math.exp(0.2), 0.0, 0.0, 0.0]], dtype=torch.float64)
    found = gradient(policy, behaviour, ratio_cap=2.0)
    assert torch.allclose(found, reinforce_gradient() * weights, atol=1e-14)
    by_hand = -sum(
        float(weights[row, place]) * float(ADVANTAGES[row]) * policy[row, place].item()
        for row, place in ((0, 0), (0, 1), (0, 3), (1, 0))
    )
    loss = policy_gradient_loss(policy, ADVANTAGES.double(), TARGETS, 1, behaviour=behaviour, ratio_cap=2.0)
    assert loss.item() == pytest.approx(by_hand, rel=1e-12)


def test_stale_samples_weighed_by_their_ratio_estimate_the_policy_gradient():
    """Over all outcomes of a choice among four: E_q[w A grad log p] = E_p[A grad log p] while no ratio is capped."""
    logits = torch.tensor([0.3, -0.2, 0.9, 0.0], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    gains = torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.float64)

    def expected_gradient(sampled_from: Tensor, cap: float) -> Tensor:
        total = torch.zeros(4, dtype=torch.float64)
        for outcome in range(4):
            logp = logits.log_softmax(0)[outcome].reshape(1, 1)
            loss = policy_gradient_loss(
                logp, gains[outcome : outcome + 1], torch.tensor([[outcome]]), 1,
                behaviour=sampled_from.log()[outcome].reshape(1, 1), ratio_cap=cap,
            )  # fmt: skip
            total += sampled_from[outcome] * torch.autograd.grad(loss, [logits])[0]
        return total

    p = logits.softmax(0).detach()
    on_policy = expected_gradient(p, 100.0)
    assert torch.allclose(expected_gradient(q, 100.0), on_policy, atol=1e-15)
    assert (p / q).max() > 1.5 and not torch.allclose(expected_gradient(q, 1.5), on_policy, atol=1e-3)


def test_advantages():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
    plain, scaled = group_advantages(rewards), group_advantages(rewards, zscore=True)
    assert plain[0].tolist() == [0.75, -0.25, -0.25, -0.25]
    assert scaled[0].std(correction=0).item() == pytest.approx(1.0, abs=1e-5)
    assert not plain[1].any() and not scaled[1].any()


def group(*rewards: float | None, tool: bool = False) -> RolloutGroup:
    """Rollouts of four tokens, the second put there by a tool if `tool`."""
    mask = (1, 0, 1, 1) if tool else (1, 1, 1, 1)
    rollouts = tuple(
        ScoredRollout(k, (10 + k, 11, 12, 0), mask, (-0.5, -0.6, -0.7, -0.8), "stop", "", (), reward)
        for k, reward in enumerate(rewards)
    )
    return RolloutGroup(RolloutPrompt("p", 0, PROMPT, 0), 0, rollouts)


def test_a_missing_reward_changes_neither_mean_nor_denominator():
    found, without = learning_step([group(1.0, None, 0.0, 0.5)]), learning_step([group(1.0, 0.0, 0.5)])
    assert [row.advantage for row in found.rows] == [row.advantage for row in without.rows] == [0.5, -0.5]
    assert found.n_targets == without.n_targets == 12
    assert learning_step([group(1.0, None)]).rows == [] and learning_step([group(1.0, None)]).n_targets == 0
    assert learning_step([RolloutGroup(RolloutPrompt("p", 0, PROMPT, 0), 0, (), "died")]).n_targets == 0


@pytest.mark.parametrize("zscore", [False, True])
@pytest.mark.parametrize("reward", [0.0, 1.0, 1 / 3, 0.1, -7.7])
def test_a_group_of_equal_rewards_teaches_nothing_but_counts(reward, zscore):
    taught = learning_step([group(1.0, 0.0)], zscore)
    both = learning_step([group(1.0, 0.0), group(*[reward] * 7)], zscore)
    assert both.rows == taught.rows
    assert both.n_targets == taught.n_targets + 28


def test_forced_tokens_get_no_gradient_and_the_last_one_does():
    step = learning_step([group(1.0, 0.0, tool=True)])
    assert step.n_targets == 6
    inputs, targets, objective = micro_batch(step.rows, 99, "cpu", RLSettings(async_steps=1))
    assert inputs.tolist() == [[1, 2, 3, 10, 11, 12], [1, 2, 3, 11, 11, 12]]
    assert targets.tolist() == [[-1, -1, 10, -1, 12, 0], [-1, -1, 11, -1, 12, 0]]
    assert objective.behaviour[0].tolist() == pytest.approx([0, 0, -0.5, -0.6, -0.7, -0.8])
    losses = torch.full(targets.shape, 0.5, requires_grad=True)
    objective(losses).backward()
    assert losses.grad is not None
    assert (losses.grad != 0).tolist() == [[False, False, True, False, True, True]] * 2


class WithTool(LowLetters):
    """Every block of Python gets an answer."""

    def open(self) -> RLTask:
        task = super().open()
        return RLTask(task.name, task.prompts, task.reward, (calculate, lambda expression: "7"))


@pytest.mark.parametrize("task", [LowLetters(), WithTool()])
def test_behaviour_is_the_training_pass_at_the_same_weights(tmp_path, task: RLTaskSpec):
    """The log-probabilities that a unit keeps are those of the training pass, tool output and terminal included."""
    job = make_rl(tmp_path / "run", task, max_new_tokens=24, num_samples=8)
    tokenizer = byte_tokenizer()
    sampler = UnitSampler(job.rollout_spec("cpu"))
    generator = torch.Generator().manual_seed(5)
    likely = [tokenizer.encode_special(f"<|{name}|>") for name in ("python_start", "python_end", "assistant_end")]
    with torch.no_grad():
        for parameter in sampler.model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3, generator=generator)
        sampler.model.lm_head.weight[likely] *= 3.0
    sampler.version = 0
    plan = Plan(job.settings, task.open(), tokenizer, 64)
    unit = plan.train_units(0, 0)[0]
    groups = UnitScorer(task, job.tokenizer_folder).score(unit, sampler.sample(unit))
    rollouts = [rollout for found in groups for rollout in found.rollouts]
    if isinstance(task, WithTool):
        assert any(0 in rollout.mask for rollout in rollouts), "no tool was ever used"
    assert any(rollout.finish_reason == "stop" for rollout in rollouts)
    step = learning_step(groups)
    assert step.rows
    inputs, targets, objective = micro_batch(step.rows, 0, "cpu", job.settings)
    with torch.inference_mode():
        losses = sampler.model(inputs, targets, reduction="none")
    far = (-losses - objective.behaviour).abs()[targets >= 0]
    assert far.max() <= 1e-4 and objective.behaviour[targets >= 0].min() < -1.0

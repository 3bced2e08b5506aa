"""The optimizer on one rank: AdamW against torch, Muon against its formulas in double precision, state, bad input."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from nanochat_ray.config import ModelConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.muon import POLAR_EXPRESS, orthogonalize
from nanochat_ray.model.optim import MuonAdamW, ParamGroup, build_optimizer

CONFIG = ModelConfig(sequence_len=32, vocab_size=100, n_layer=3, n_head=4, n_kv_head=2, n_embd=64)
LRS = {"unembedding_lr": 0.008, "embedding_lr": 0.3, "matrix_lr": 0.02, "scalar_lr": 0.5, "weight_decay": 0.2}


def fresh(compute_dtype: torch.dtype = torch.float32, **changes) -> tuple[GPT, MuonAdamW]:
    model = GPT.build(CONFIG, compute_dtype=compute_dtype, seed=1)
    return model, build_optimizer(model, **{**LRS, **changes})


def set_random_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def test_adamw_equals_torch():
    torch.manual_seed(0)
    shapes = [(40, 30), (5,), (1,)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    names = [str(i) for i in range(len(shapes))]
    group = ParamGroup("adamw", names, ours, lr=0.1, weight_decay=0.3, betas=(0.8, 0.96), eps=1e-8)
    optimizer = MuonAdamW([group])
    reference = torch.optim.AdamW(theirs, lr=0.1, betas=(0.8, 0.96), eps=1e-8, weight_decay=0.3, foreach=False)
    for step in range(5):
        group.lr = reference.param_groups[0]["lr"] = 0.1 / (step + 1)
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_adamw_computes_in_fp32_and_stores_bf16():
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(64, 64).bfloat16())
    group = ParamGroup("adamw", ["p"], [param], lr=0.01, weight_decay=0.1, betas=(0.8, 0.995))
    optimizer = MuonAdamW([group])
    p, m, v = param.detach().clone(), torch.zeros(64, 64).bfloat16(), torch.zeros(64, 64).bfloat16()
    for step in range(1, 6):
        param.grad = torch.randn(64, 64).bfloat16()
        g = param.grad.float()
        optimizer.step()
        m32 = torch.lerp(m.float(), g, 1 - 0.8)
        v32 = torch.lerp(v.float(), g * g, 1 - 0.995)
        update = (m32 / (1 - 0.8**step)) / ((v32 / (1 - 0.995**step)).sqrt() + 1e-10)
        p = (p.float() * (1 - 0.01 * 0.1) - 0.01 * update).bfloat16()
        m, v = m32.bfloat16(), v32.bfloat16()
        state = optimizer.state_by_name()
        assert state["p.exp_avg"].dtype == param.dtype == torch.bfloat16
        for found, expected in ((param, p), (state["p.exp_avg"], m), (state["p.exp_avg_sq"], v)):
            # Sums in another order may round the other way, once in a while and by one unit of bf16.
            assert (found != expected).float().mean() < 0.01
            torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-6)


def muon_by_formula(
    grads: list[Tensor], weight: Tensor, lr: float, momentum: float, decay: float, muon_eq: bool, muon_plus: bool
) -> Tensor:
    """The Muon rule for one matrix, one formula after another."""
    m, n = weight.shape
    M, S = torch.zeros_like(weight), 0.0
    for G in grads:
        M = momentum * M + (1 - momentum) * G
        X = (1 - momentum) * G + momentum * M
        if muon_eq:
            X = X * (X.norm() / math.sqrt(m)) / X.norm(dim=1, keepdim=True).clamp(min=1e-6)
        X = X / (1.01 * X.norm() + 1e-6)
        for a, b, c in POLAR_EXPRESS:
            A = X @ X.T
            X = a * X + (b * A + c * A @ A) @ X
        if muon_plus:
            X = X * math.sqrt(min(m, n)) / X.norm().clamp(min=1e-6)
        dim, count = (1, n) if m >= n else (0, m)
        u = (X**2).mean(dim=dim, keepdim=True)
        S = 0.9 * S + 0.1 * u
        t = S.clamp(min=1e-10) ** -0.5
        X = X * t * (count * u.sum()).sqrt() / (count * u * t**2).sum().sqrt().clamp(min=1e-10)
        step = lr * max(1, m / n) ** 0.5
        weight = weight - step * X - step * decay * weight * (X * weight >= 0)
    return weight


@pytest.mark.parametrize(("muon_eq", "muon_plus"), list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (24, 24), (20, 16), (2, 12), (64, 16)])
def test_muon_equals_its_formulas(shape, muon_eq, muon_plus):
    torch.manual_seed(0)
    init = torch.randn(3, *shape, dtype=torch.float64)
    grads = torch.randn(3, 4, *shape, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 100.0])[:, None, None, None]
    params = [nn.Parameter(w.float()) for w in init]
    group = ParamGroup("muon", ["a", "b", "c"], params, lr=0.02, weight_decay=0.1, momentum=0.9)
    optimizer = MuonAdamW([group], muon_eq=muon_eq, muon_plus=muon_plus)
    for step in range(4):
        for param, grad in zip(params, grads[:, step], strict=True):
            param.grad = grad.float()
        optimizer.step()
    for i, param in enumerate(params):
        expected = muon_by_formula(list(grads[i]), init[i], 0.02, 0.9, 0.1, muon_eq, muon_plus)
        assert (param - expected).abs().max() < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 96), (64, 256), (256, 64), (60, 100), (13, 12)])
def test_orthogonalize(shape, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, *shape)
    x = x / (1.01 * torch.linalg.matrix_norm(x)[:, None, None])
    q = orthogonalize(x.to(dtype), 5).float()
    values = torch.linalg.svdvals(q)
    # The polynomials map a value of 0.01 to about 1; a square random matrix has smaller ones.
    good = torch.linalg.svdvals(x) > 0.01
    assert values[:, 0].max() < 1.3
    assert (values[good] - 1).abs().max() < 0.3
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    overlap = (u.mT @ q @ vh.mT).diagonal(dim1=-2, dim2=-1)[good]
    assert (overlap - 1).abs().max() < 0.3  # the directions stay


@pytest.mark.parametrize("ns_steps", range(6))
@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (2, 12)])
def test_rounds_on_the_short_side_agree(shape, ns_steps):
    """fp32 on a CPU takes the short way for long matrices, double precision never does."""
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(3, *shape, dtype=torch.float64), full_matrices=False)
    x = u * torch.logspace(-0.5, -6, min(shape), dtype=torch.float64) @ vh
    x = x / (1.01 * torch.linalg.matrix_norm(x)[:, None, None])
    expected = orthogonalize(x, ns_steps)
    assert (orthogonalize(x.float(), ns_steps) - expected).norm() < 5e-4 * expected.norm()


def test_no_gradient_keeps_a_muon_matrix_finite():
    param = nn.Parameter(torch.randn(8, 8))
    before = param.detach().clone()
    group = ParamGroup("muon", ["p"], [param], lr=0.02, weight_decay=0.0)
    MuonAdamW([group]).step()
    assert torch.equal(param, before)


def test_cautious_decay_pulls_only_with_the_step():
    torch.manual_seed(0)
    init = torch.randn(16, 16)
    grad = torch.randn(16, 16)

    def after(decay: float) -> Tensor:
        param = nn.Parameter(init.clone())
        param.grad = grad.clone()
        MuonAdamW([ParamGroup("muon", ["p"], [param], lr=0.1, weight_decay=decay)]).step()
        return param.detach()

    step = init - after(0.0)
    expected = torch.where(step * init >= 0, 0.1 * 0.5 * init, 0.0)
    torch.testing.assert_close(after(0.0) - after(0.5), expected, rtol=1e-4, atol=1e-6)


def test_a_missing_gradient_counts_as_zero():
    (with_zeros, a), (without, b) = fresh(), fresh()
    left_out = ["lm_head.weight", "smear_lambda", "transformer.h.1.mlp.c_fc.weight", "transformer.h.2.attn.c_q.weight"]
    for step in range(3):
        for model in (with_zeros, without):
            set_random_gradients(model, step)
        for name in left_out if step else []:  # the first step gives every moment something to remember
            with_zeros.get_parameter(name).grad.zero_()
            without.get_parameter(name).grad = None
        a.step()
        b.step()
    for p, q in zip(with_zeros.parameters(), without.parameters(), strict=True):
        assert torch.equal(p, q)


def test_zero_grad_drops_gradients():
    model, optimizer = fresh()
    set_random_gradients(model, 0)
    optimizer.zero_grad()
    assert all(param.grad is None for param in model.parameters())


def test_state_round_trip_continues_exactly():
    model, optimizer = fresh()
    for step in range(2):
        set_random_gradients(model, step)
        optimizer.step()
    state = optimizer.state_by_name()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    other, loaded = fresh()
    other.load_state_dict(model.state_dict())
    loaded.load_state_by_name(state)
    for m, o in ((model, optimizer), (other, loaded)):
        set_random_gradients(m, 2)
        o.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    assert all(torch.equal(state[name], kept[name]) for name in kept)  # a copy, not the live state
    assert state["lm_head.weight.step"] == 2
    assert state["transformer.wte.weight.exp_avg"].shape == model.transformer.wte.weight.shape
    assert state["transformer.h.0.mlp.c_fc.weight.second_momentum_buffer"].shape == (256, 1)


def test_loading_leaves_hyper_parameters_alone():
    _, pretrained = fresh()
    pretrained.set_schedule(0.05, 0.9, 0.0)
    _, optimizer = fresh(matrix_lr=0.5, embedding_lr=0.7)
    before = [(g.lr, g.initial_lr, g.betas, g.momentum, g.weight_decay) for g in optimizer.groups]
    optimizer.load_state_by_name(pretrained.state_by_name())
    assert [(g.lr, g.initial_lr, g.betas, g.momentum, g.weight_decay) for g in optimizer.groups] == before


def test_state_that_does_not_fit_is_refused():
    _, optimizer = fresh()
    state = optimizer.state_by_name()
    name = "transformer.wte.weight.exp_avg"
    with pytest.raises(ValueError, match=r"1 missing .*wte"):
        optimizer.load_state_by_name({k: v for k, v in state.items() if k != name})
    with pytest.raises(ValueError, match=r"1 unknown .*extra"):
        optimizer.load_state_by_name({**state, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"wte.* has shape \(3, 3\), the model needs \(128, 64\)"):
        optimizer.load_state_by_name({**state, name: torch.zeros(3, 3)})


def test_schedule_and_scale():
    _, optimizer = fresh()
    initial = [group.initial_lr for group in optimizer.groups]
    optimizer.scale_initial_lr(0.8)
    optimizer.set_schedule(0.5, 0.91, 0.03)
    for group, lr in zip(optimizer.groups, initial, strict=True):
        assert group.initial_lr == pytest.approx(0.8 * lr)
        assert group.lr == pytest.approx(0.4 * lr)
        if group.kind == "muon":
            assert (group.momentum, group.weight_decay) == (0.91, 0.03)
    assert optimizer.groups[0].weight_decay == 0.01  # AdamW's stay


def test_a_bf16_network():
    model, optimizer = fresh(compute_dtype=torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    set_random_gradients(model, 0)
    optimizer.step()
    state = optimizer.state_by_name()
    for name, param in model.named_parameters():
        table = name.startswith(("transformer.wte", "value_embeds"))
        dtype = torch.bfloat16 if table else torch.float32
        assert param.dtype == dtype
        slots = [key for key in state if key.rpartition(".")[0] == name and not key.endswith(".step")]
        assert len(slots) == 2
        assert all(state[key].dtype == dtype for key in slots)
        assert torch.isfinite(param).all()
        assert not torch.equal(param, before[name])

    exact, reference = fresh()
    set_random_gradients(exact, 0)
    reference.step()
    name = "transformer.h.0.mlp.c_fc.weight"
    step, expected = model.get_parameter(name) - before[name], exact.get_parameter(name) - before[name]
    assert 1e-6 * expected.norm() < (step - expected).norm() < 0.05 * expected.norm()  # products in bf16


def test_bad_arguments():
    with pytest.raises(ValueError, match="'sgd'; there are adamw and muon"):
        ParamGroup("sgd", [], [], 0.1, 0.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ns_steps 6"):
        orthogonalize(torch.zeros(1, 2, 2), 6)

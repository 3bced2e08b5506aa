"""fp8 products against plain arithmetic, and what training with them must leave as it was."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanochat_ray.config import ModelConfig
from nanochat_ray.metrics.bits_per_byte import evaluate_bpb
from nanochat_ray.model.fp8 import (
    E4M3,
    E5M2,
    Matrix,
    check_fp8,
    check_numbers,
    enable_fp8,
    fp8_linear,
    product,
    quantise,
)
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.ops import cross_entropy
from nanochat_ray.model.optim import build_optimizer
from nanochat_ray.model.scaling import matmul_params, param_counts

RECIPES = ["tensorwise", "rowwise"]
both_recipes = pytest.mark.parametrize("recipe", RECIPES)


def config(**changes) -> ModelConfig:
    values = dict(sequence_len=64, vocab_size=150, n_layer=2, n_head=2, n_kv_head=2, n_embd=128, window_pattern="SL")
    return ModelConfig(**{**values, **changes})


def model_of(recipe: str | None = None, dtype: torch.dtype = torch.bfloat16, **changes) -> GPT:
    model = GPT.build(config(**changes), compute_dtype=dtype, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # what starts at zero lets no gradient through
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    if recipe is not None:
        enable_fp8(model, recipe)
    return model


def ids(rows: int, length: int, seed: int = 4) -> Tensor:
    return torch.randint(0, 150, (rows, length), generator=torch.Generator().manual_seed(seed))


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(x: Tensor, dtype: torch.dtype, recipe: str) -> Tensor:
    """What is left of x (rows, n) after quantisation, by plain arithmetic in fp64."""
    limit = torch.finfo(dtype).max
    amax = x.abs().amax() if recipe == "tensorwise" else x.abs().amax(dim=1, keepdim=True)
    scale = (limit / amax.double().clamp(min=1e-12)).float()
    return (x * scale).clamp(-limit, limit).to(dtype).double() / scale.double()


def distance(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def linear_products(x: Tensor, weight: Tensor, dy: Tensor, recipe: str) -> tuple[Tensor, Tensor, Tensor]:
    """Output and the gradients of input and weight."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = fp8_linear(x, weight, recipe)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


@both_recipes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_three_products_equal_plain_arithmetic_on_rounded_numbers(recipe, dtype):
    x, weight, dy = random(48, 160).to(dtype), random(128, 160, seed=1), random(48, 128, seed=2, scale=1e-5).to(dtype)
    y, dx, dweight = linear_products(x, weight, dy, recipe)
    assert (y.dtype, dx.dtype, dweight.dtype) == (dtype, dtype, torch.float32)
    x, dy = x.float(), dy.float()
    references = (
        rounded(x, E4M3, recipe) @ rounded(weight, E4M3, recipe).t(),
        rounded(dy, E5M2, recipe) @ rounded(weight.t(), E4M3, recipe).t(),
        rounded(dy.t(), E5M2, recipe) @ rounded(x.t(), E4M3, recipe).t(),
    )
    for found, wanted in zip((y, dx, dweight), references, strict=True):
        assert distance(found, wanted) < (1e-6 if dtype == torch.float32 else 3e-3)


@settings(deadline=None)
@given(st.lists(st.floats(2**-39, 2**40, width=32), min_size=1, max_size=50))
def test_scales_are_those_of_double_precision(magnitudes):
    """nanochat's rule divides in fp64 and rounds to fp32, which equals a division in fp32."""
    amax = torch.tensor(magnitudes)
    wanted = (448 / amax.double()).float()
    torch.testing.assert_close(quantise(amax[:, None], E4M3, "rowwise").factor[:, 0], 1 / wanted, rtol=0, atol=0)


@both_recipes
def test_products_are_near_the_exact_ones(recipe):
    """e4m3 keeps 3 bits behind the leading one, e5m2 keeps 2; errors of single numbers partly cancel in a sum."""
    x, weight, dy = random(256, 256), random(256, 256, seed=1), random(256, 256, seed=2)
    y, dx, dweight = linear_products(x, weight, dy, recipe)
    assert distance(y, x @ weight.t()) < 0.04
    assert distance(dx, dy @ weight) < 0.07
    assert distance(dweight, dy.t() @ x) < 0.07


def test_rowwise_keeps_the_small_rows_beside_an_outlier():
    x, weight, dy = random(64, 128), random(128, 128, seed=1), random(64, 128, seed=2)
    outlier, others = x.clone(), [row for row in range(64) if row != 3]
    outlier[3] *= 1e6
    dy[3] *= 1e11  # e5m2 reaches further down
    errors = {}
    for recipe in RECIPES:
        y, dx, dweight = linear_products(outlier, weight, dy, recipe)
        errors[recipe] = distance(y[others], (x @ weight.t())[others]), distance(dx[others], (dy @ weight)[others])
        assert distance(dweight, dy.t() @ outlier) < 0.1
    assert errors["rowwise"][0] < 0.04 and errors["rowwise"][1] < 0.07
    assert min(errors["tensorwise"]) > 0.9  # nearly all flushed to zero


@both_recipes
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_quantisation_of_extremes(recipe, dtype):
    limit = torch.finfo(dtype).max
    zeros = quantise(torch.zeros(16, 32), dtype, recipe)
    assert not zeros.values.float().any() and zeros.factor.isfinite().all()
    assert (product(zeros, zeros, torch.float32) == 0).all()
    for magnitude in (1e-30, 1e-10, 1.0, 1e10, 3e38):
        x = magnitude * torch.linspace(-1, 1, 512).reshape(16, 32)
        x8 = quantise(x, dtype, recipe)
        assert x8.values.float().isfinite().all() and x8.values.float().abs().max() <= limit
        if magnitude > 1e-11:  # below, the scale has its bound
            torch.testing.assert_close(x8.values.float().mul(x8.factor).abs().max(), x.abs().max(), rtol=1e-6, atol=0)
    mixed = random(16, 32)
    mixed[5] = 0
    x8 = quantise(mixed, dtype, recipe)
    assert x8.values.float().isfinite().all() and not x8.values[5].float().any()
    assert x8.values.is_contiguous() and quantise(mixed.t(), dtype, recipe).values.is_contiguous()


@both_recipes
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(recipe, bad):
    x = random(16, 128)
    x[2, 7] = bad
    y = fp8_linear(x, random(128, 128, seed=1), recipe)
    assert y[2].isnan().all()
    assert y.isfinite().any() == (recipe == "rowwise")


@both_recipes
@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("vocab", [128, 125])
@pytest.mark.parametrize("chunk", [1, 128 * 40, 2**21])  # logits at a time: the least (16 rows), 32 rows, all
def test_cross_entropy_in_fp8(recipe, summed, vocab, chunk, monkeypatch):
    monkeypatch.setattr("nanochat_ray.model.ops.CHUNK_LOGITS_CPU", chunk)
    x, weight = random(80, 128).requires_grad_(), random(128, 128, seed=1, scale=0.1).requires_grad_()
    targets = torch.arange(80) % vocab
    targets[::7] = -1
    upstream = torch.rand(() if summed else 80)
    found = cross_entropy(x, weight, targets, vocab, 15.0, summed, recipe)
    grads = torch.autograd.grad(found, (x, weight), upstream)

    def reference(rounding: bool) -> tuple[Tensor, ...]:
        """The logits by rounded or exact operands, the loss and its gradient in full precision."""
        plain = (rounded(t.detach(), E4M3, recipe).float() if rounding else t.detach() for t in (x, weight))
        a, b = (t.requires_grad_() for t in plain)
        logits = 15 * torch.tanh(a @ b[:vocab].t() / 15)
        loss = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum" if summed else "none")
        return loss.detach(), *torch.autograd.grad(loss, (a, b), upstream)

    loss, *_ = reference(rounding=True)
    torch.testing.assert_close(found.detach(), loss, rtol=1e-5, atol=1e-5)
    loss, dx, dweight = reference(rounding=False)
    assert distance(found, loss) < 0.02
    assert distance(grads[0], dx) < 0.1 and distance(grads[1], dweight) < 0.1
    assert not grads[0][::7].any() and not grads[1][vocab:].any()


@both_recipes
def test_which_matrices_are_converted(recipe):
    with torch.device("meta"):
        d24 = GPT(ModelConfig(vocab_size=32768, n_layer=24, n_head=12, n_kv_head=12, n_embd=1536))
    before = {name: id(parameter) for name, parameter in d24.named_parameters()}
    modules = {name: id(module) for name, module in d24.named_modules()}
    assert enable_fp8(d24, recipe) == (145, 13)
    assert {name: id(parameter) for name, parameter in d24.named_parameters()} == before
    assert {name: id(module) for name, module in d24.named_modules()} == modules
    assert sum(parameter.numel() for parameter in d24.parameters()) == param_counts(d24.config)["total"]
    counted = sum(module.weight.numel() for module in d24.modules() if isinstance(module, Matrix))
    assert matmul_params(d24.config) == counted
    assert d24.smear_gate.fp8 is None and d24.lm_head.fp8 == recipe
    with torch.device("meta"):
        narrow = GPT(config(n_embd=96))
        odd = GPT(config(n_embd=136, n_head=1, n_kv_head=1))
    assert enable_fp8(narrow, recipe)[0] == enable_fp8(odd, recipe)[0] == 0


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match="'blockwise'; choose from tensorwise, rowwise"):
        enable_fp8(model_of(), "blockwise")


@both_recipes
def test_evaluation_equals_that_of_a_model_never_converted(recipe):
    converted, plain = model_of(recipe), model_of()
    idx = ids(3, 33)
    batches, token_bytes = [(idx[:, :-1], idx[:, 1:])], torch.ones(150, dtype=torch.int64)
    assert evaluate_bpb(converted, batches, token_bytes) == evaluate_bpb(plain, batches, token_bytes)
    with torch.inference_mode():
        odd = ids(1, 7)
        assert torch.equal(converted(odd), plain(odd))
        assert torch.equal(converted(idx, idx, reduction="none"), plain(idx, idx, reduction="none"))
    idx = ids(2, 32)
    assert not torch.equal(converted(idx, idx), plain(idx, idx))  # with gradients it is another arithmetic


@both_recipes
def test_evaluation_after_an_update_that_moves_no_version(recipe):
    """Fused optimizers write without telling; the kept cast of the weights must not outlive a training pass."""
    model, idx = model_of(recipe), ids(2, 32)
    with torch.inference_mode():
        before = model(idx)
    model(idx, idx).backward()
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
        parameter.grad = None
    fresh = GPT.build(model.config, compute_dtype=torch.bfloat16)
    fresh.load_state_dict(model.state_dict())
    with torch.inference_mode():
        assert torch.equal(model(idx), fresh(idx)) and not torch.equal(model(idx), before)


@both_recipes
def test_gradients_of_the_network_are_near_the_exact_ones(recipe):
    idx, exact = ids(2, 64), model_of(dtype=torch.float32)
    model = model_of(recipe, torch.float32)
    losses = [m(idx, idx.roll(-1, 1)) for m in (model, exact)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=2e-3)
    wanted = dict(exact.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        if parameter.dim() == 2:
            assert F.cosine_similarity(parameter.grad.flatten(), wanted[name].grad.flatten(), dim=0) > 0.95, name


def train(model: GPT, steps: int = 20) -> list[float]:
    optimizer = build_optimizer(
        model, unembedding_lr=0.008, embedding_lr=0.3, matrix_lr=0.02, scalar_lr=0.1, weight_decay=0.0
    )
    losses = []
    for step in range(steps):
        idx = ids(4, 65, seed=step % 4) % 40
        loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@both_recipes
def test_training_follows_bfloat16(recipe):
    # Of two layers the last is also the middle one, and the backout of 20 steps can take all of it away.
    wanted, found = train(model_of(n_layer=3)), train(model_of(recipe, n_layer=3))
    for a, b in zip(found, wanted, strict=True):
        assert a == pytest.approx(b, rel=0.06)
    assert found[-1] < 0.5 * found[0]


@both_recipes
def test_training_twice_gives_the_same_bits(recipe):
    assert train(model_of(recipe), 3) == train(model_of(recipe), 3)


@both_recipes
def test_capture_as_one_graph(recipe):
    """torch.compile sees the whole fp8 training pass without a break (captured only; nothing is compiled here)."""
    model, idx = model_of(recipe, n_layer=1), ids(2, 32)
    wanted = model(idx, idx)
    wanted.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(idx, idx)
    loss.backward()
    torch.testing.assert_close(loss, wanted)
    for name, parameter in model.named_parameters():
        assert distance(parameter.grad, grads[name]) < 0.05, name
    with torch.inference_mode():
        torch.testing.assert_close(compiled(idx, idx), model(idx, idx))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++), which torch.compile needs on a CPU")
@both_recipes
def test_compiled_products(recipe):
    """Generated code, not only the captured graph: a linear layer and the loss."""

    def loss_of(x: Tensor, weight: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(fp8_linear(x, weight, recipe), head, targets, 125, 15.0, True, recipe)

    tensors = [random(*shape, seed=k).requires_grad_() for k, shape in enumerate([(64, 160), (128, 160), (128, 128)])]
    targets = torch.arange(64)
    wanted = loss_of(*tensors, targets)
    wanted_grads = torch.autograd.grad(wanted, tensors)
    found = torch.compile(loss_of, dynamic=False, fullgraph=True)(*tensors, targets)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)
    for ours, theirs in zip(torch.autograd.grad(found, tensors), wanted_grads, strict=True):
        assert distance(ours, theirs) < 0.02


@both_recipes
def test_a_micro_batch_must_be_a_multiple_of_16_tokens(recipe):
    with pytest.raises(ValueError, match="30 tokens in a micro-batch; fp8 needs a multiple of 16"):
        model_of(recipe)(ids(2, 15), ids(2, 15))
    model_of(recipe)(ids(1, 16), ids(1, 16)).backward()
    x = random(8, 128).requires_grad_()
    with pytest.raises(ValueError, match="8 tokens"):
        cross_entropy(x, random(128, 128), torch.zeros(8, dtype=torch.int64), 128, 15.0, True, recipe)


@pytest.mark.parametrize(
    "capability, words",
    [((8, 0), "Old GPU has 8.0"), ((7, 5), "compute capability 8.9 or later"), ((9, 0), "no fp8 product for recipe")],
)
def test_hardware_that_cannot_is_refused_with_the_reason(capability, words, monkeypatch):
    """The last case: new enough, but the product itself fails (here for want of a GPU)."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Old GPU")

    def fail(*args: object) -> None:
        raise RuntimeError("kernel missing\nand a long story")

    monkeypatch.setattr("nanochat_ray.model.fp8.try_products", fail)
    with pytest.raises(ValueError, match=words) as error:
        check_fp8("cuda", torch.bfloat16, 2048, "rowwise")
    assert "--no-fp8" in str(error.value) and "long story" not in str(error.value)


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_jobs_without_nvidia_are_refused(device):
    with pytest.raises(ValueError, match=f"NVIDIA GPU; on {device} turn fp8 off"):
        check_fp8(device, torch.bfloat16, 2048)


def test_numbers_that_do_not_fit_are_refused():
    check_numbers(torch.bfloat16, 48)
    with pytest.raises(ValueError, match="float16: set --dtype bfloat16"):
        check_numbers(torch.float16, 48)
    with pytest.raises(ValueError, match=r"rows of 1000 tokens.*--max-seq-len that does: 992"):
        check_numbers(torch.bfloat16, 1000)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@both_recipes
def test_a_gpu_agrees_with_the_cpu(recipe):
    check_fp8("cuda", torch.bfloat16, 2048, recipe)
    x, weight, dy = random(4096, 768).bfloat16(), random(3072, 768, seed=1), random(4096, 3072, seed=2).bfloat16()
    wanted = linear_products(x, weight, dy, recipe)
    found = linear_products(x.cuda(), weight.cuda(), dy.cuda(), recipe)
    for ours, theirs in zip(found, wanted, strict=True):
        assert distance(ours.cpu(), theirs) < 0.01
    model, idx = model_of(recipe).cuda(), ids(2, 64).cuda()
    model(idx, idx).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

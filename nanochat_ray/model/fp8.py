"""Products of large matrices in 8-bit floats, for training (arXiv:2209.05433).

Every number is divided among the fp8 values by a scale taken from the largest magnitude of what is quantised, anew for
each product, with no memory of earlier steps and no word between ranks. Recipe "tensorwise": one scale per matrix.
"rowwise": one per row, and a row always runs along the dimension that the product sums over, so an operand that takes
part in two products is quantised twice. Activations and weights are e4m3, gradients of outputs e5m2; sums are wide.
Everything here is plain torch that torch.compile sees through: it fuses quantisation into few passes over memory.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Recipe = Literal["tensorwise", "rowwise"]

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SMALLEST_AMAX = 1e-12  # of what is quantised: a matrix of zeros gets a finite scale
MULTIPLE = 16  # every dimension of a product, which the kernels ask for
NARROWEST = 128  # below this a matrix is not worth it
LEAST_CAPABILITY = (8, 9)  # of CUDA devices: Ada, Hopper, Blackwell
TURN_OFF = "turn fp8 off (--no-fp8, in the main job --pretrain.no-fp8)"


class Quantised(NamedTuple):
    """A matrix of fp8 values and the fp32 factor that gives their magnitude back: () or, rowwise, (rows, 1)."""

    values: Tensor  # (rows, n) with the rows contiguous; products sum over n
    factor: Tensor


def quantise(x: Tensor, dtype: torch.dtype, recipe: Recipe) -> Quantised:
    """x (rows, n) in fp8. Not-a-number and infinity anywhere stay visible: what shares their scale becomes NaN."""
    limit = torch.finfo(dtype).max
    over = {} if recipe == "tensorwise" else {"dim": 1, "keepdim": True}
    amax = torch.linalg.vector_norm(x, torch.inf, **over).float().clamp(min=SMALLEST_AMAX)
    scale = torch.full_like(amax, limit) / amax  # a number divided by a tensor is rounded twice
    values = (x.float() * scale).clamp(-limit, limit).to(dtype)
    return Quantised(values.contiguous(), scale.reciprocal())


def transposed(x8: Quantised, x: Tensor, dtype: torch.dtype, recipe: Recipe) -> Quantised:
    """x^T in fp8, given x and its own quantisation x8: tensorwise the same numbers, rowwise with scales of its own."""
    if recipe == "tensorwise":
        return Quantised(x8.values.t().contiguous(), x8.factor)
    return quantise(x.t(), dtype, recipe)


def product(a: Quantised, b: Quantised, dtype: torch.dtype, fast: bool = False) -> Tensor:
    """a b^T in a dtype: (rows of a, rows of b). `fast` allows the tensor cores' own, narrower sums."""
    return torch._scaled_mm(
        a.values, b.values.t(), scale_a=a.factor, scale_b=b.factor.t(), out_dtype=dtype, use_fast_accum=fast
    )


class Fp8Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
        ctx.recipe, ctx.weight_dtype = recipe, weight.dtype
        x8, weight8 = quantise(x, E4M3, recipe), quantise(weight, E4M3, recipe)
        if recipe == "tensorwise":
            ctx.save_for_backward(*x8, *weight8)
        else:
            ctx.save_for_backward(x, weight)
        return product(x8, weight8, x.dtype, fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        recipe: Recipe = ctx.recipe
        dy8 = quantise(dy, E5M2, recipe)
        dy8_t = transposed(dy8, dy, E5M2, recipe)
        if recipe == "tensorwise":
            x_values, x_factor, weight_values, weight_factor = ctx.saved_tensors
            x8_t = Quantised(x_values.t().contiguous(), x_factor)
            weight8_t = Quantised(weight_values.t().contiguous(), weight_factor)
        else:
            x, weight = ctx.saved_tensors
            x8_t, weight8_t = quantise(x.t(), E4M3, recipe), quantise(weight.t(), E4M3, recipe)
        return product(dy8, weight8_t, dy.dtype), product(dy8_t, x8_t, dy.dtype).to(ctx.weight_dtype), None


def check_tokens(n_tokens: int) -> None:
    """Raise ValueError unless a micro-batch of so many tokens can be trained on: weight gradients sum over them."""
    if n_tokens % MULTIPLE:
        raise ValueError(f"{n_tokens} tokens in a micro-batch; fp8 needs a multiple of {MULTIPLE}")


def fp8_linear(x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
    """x W^T and its gradients by fp8 products: x (..., n_in), weight (n_out, n_in), the result in the dtype of x.

    Raises ValueError unless the number of tokens in x is a multiple of 16.
    """
    n_tokens = x.shape[:-1].numel()
    check_tokens(n_tokens)
    y = Fp8Linear.apply(x.reshape(n_tokens, x.size(-1)), weight, recipe)
    return y.view(*x.shape[:-1], weight.size(0))


class Matrix(nn.Module):
    """A module around one weight (out, in) whose products are in fp8 while gradients are enabled, if `fp8` is set.

    So evaluation, which runs without gradients, computes in the compute dtype as if there were no fp8.
    """

    weight: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        self.fp8: Recipe | None = None

    def recipe(self) -> Recipe | None:
        """The recipe of the pass that is running, None for products in the compute dtype."""
        return self.fp8 if torch.is_grad_enabled() else None


def fits_fp8(weight: Tensor) -> bool:
    return all(size % MULTIPLE == 0 and size >= NARROWEST for size in weight.shape)


def enable_fp8(model: nn.Module, recipe: Recipe) -> tuple[int, int]:
    """Train with fp8 products where they fit: both dimensions of the weight multiples of 16 and at least 128.

    Only a setting of the modules changes, neither modules nor weights, so names, counts and checkpoints stay as they
    are. Returns how many matrices were converted and how many stay. Call it before torch.compile.
    """
    if recipe not in get_args(Recipe):
        raise ValueError(f"fp8 recipe {recipe!r}; choose from {', '.join(get_args(Recipe))}")
    matrices = [module for module in model.modules() if isinstance(module, Matrix)]
    fitting = [matrix for matrix in matrices if fits_fp8(matrix.weight)]
    for matrix in fitting:
        matrix.fp8 = recipe
    return len(fitting), len(matrices) - len(fitting)


def check_fp8(
    device: str, compute_dtype: torch.dtype, sequence_len: int, recipe: Recipe = "tensorwise"
) -> None:
    """Raise ValueError with the reason where training in fp8 cannot work or cannot pay. Tries the products once.

    Which kernels torch brings for which device and recipe changes from release to release (rowwise most of all), so
    the last word has a product of each kind on the device itself.
    """
    kind = torch.device(device).type
    if kind != "cuda" or torch.version.hip:
        raise ValueError(f"fp8 needs an NVIDIA GPU; on {'ROCm' if torch.version.hip else kind} {TURN_OFF}")
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        raise ValueError(
            f"fp8 needs CUDA compute capability 8.9 or later; {torch.cuda.get_device_name(device)} has "
            f"{capability[0]}.{capability[1]}: {TURN_OFF}"
        )
    check_numbers(compute_dtype, sequence_len)
    try:
        try_products(device, compute_dtype, recipe)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} with torch {torch.__version__} has no fp8 product for recipe "
            f"{recipe!r} ({reason}): take the other recipe or {TURN_OFF}"
        ) from error


def check_numbers(compute_dtype: torch.dtype, sequence_len: int) -> None:
    """The part of `check_fp8` that needs no device: raises ValueError."""
    if compute_dtype != torch.bfloat16:
        name = str(compute_dtype).removeprefix("torch.")
        raise ValueError(f"fp8 products give bfloat16, the compute dtype is {name}: set --dtype bfloat16")
    if sequence_len % MULTIPLE:
        nearest = max(MULTIPLE, round(sequence_len / MULTIPLE) * MULTIPLE)
        raise ValueError(
            f"fp8 needs micro-batches of a multiple of {MULTIPLE} tokens, and rows of {sequence_len} tokens do not "
            f"give that for every number of rows; the nearest --max-seq-len that does: {nearest}"
        )


def try_products(device: str, compute_dtype: torch.dtype, recipe: Recipe) -> None:
    """One small linear layer forward and backward."""
    with torch.enable_grad():
        x, weight = (
            torch.ones(NARROWEST, NARROWEST, device=device, dtype=dtype, requires_grad=True)
            for dtype in (compute_dtype, torch.float32)
        )
        fp8_linear(x, weight, recipe).sum().backward()
        assert weight.grad is not None
        weight.grad.sum().item()  # waits for the device

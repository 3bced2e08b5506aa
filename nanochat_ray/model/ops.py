"""The network's element-wise steps and its loss, each with a hand-written gradient.

Plain autograd would keep an fp32 copy of nearly every operand and walk over memory once per arithmetic sign; on a CPU
that costs more than the matrix products. All arithmetic here is in fp32 (fp64 for fp64 input), the results are in the
dtype of the input.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nanochat_ray.model.fp8 import E4M3, E5M2, MULTIPLE, Quantised, Recipe, check_tokens, product, quantise, transposed

# Logits alive at a time in the loss.
CHUNK_LOGITS_CPU = 2**21  # 8 MiB of fp32, which stay in the cache
CHUNK_LOGITS_GPU = 2**26


def wide(x: Tensor) -> Tensor:
    """x in the dtype of the arithmetic: fp64 stays, everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, kept with size 1."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()


class RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        wide_x = wide(x)
        r = inverse_rms(wide_x, eps)
        y = (wide_x * r).to(x.dtype)
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        y, r = ctx.saved_tensors
        return _across(wide(dy), wide(y), 1.0).mul_(r).to(y.dtype), None


def _across(dy: Tensor, y: Tensor, rms: float) -> Tensor:
    """What of dy is at right angles to y, whose root mean square is `rms`: a norm lets nothing else through."""
    along = (dy * y).sum(dim=-1, keepdim=True).div_(-(rms**2) * y.size(-1))
    return torch.addcmul(dy, y, along)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x over its root mean square along the last dimension, without a weight (arXiv:1910.07467)."""
    return RMSNorm.apply(x, eps)


class RotateAndNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, scale: float, eps: float) -> Tensor:
        wide_x, swapped = wide(x), x.roll(x.size(-1) // 2, dims=-1)
        r = inverse_rms(wide_x, eps).mul_(scale)  # a rotation keeps the length, so the norm may be taken before it
        y = (wide_x * cos).addcmul_(wide(swapped), sin).mul_(r).to(x.dtype)
        ctx.save_for_backward(y, r, cos, sin)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
        y, r, cos, sin = ctx.saved_tensors
        turned = _across(wide(dy), wide(y), ctx.scale)
        swapped = turned.roll(turned.size(-1) // 2, dims=-1)
        return turned.mul_(cos).addcmul_(swapped, sin, value=-1).mul_(r).to(y.dtype), None, None, None, None


def rotate_and_norm(x: Tensor, cos: Tensor, sin: Tensor, scale: float, eps: float) -> Tensor:
    """Rotary position, then norm per head, then times `scale`: x (B, T, heads, D); cos, sin (B or 1, T, 1, D) fp32.

    With the halves (x1, x2) of a head the rotation gives (x1 cos + x2 sin, x2 cos - x1 sin); the tables hold (cos, cos)
    and (sin, -sin). RoPE: arXiv:2104.09864. Norm of queries and keys: arXiv:2010.04245.
    """
    return RotateAndNorm.apply(x, cos, sin, scale, eps)


class SquaredReLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = x.clamp(min=0)
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (dy * positive).mul_(2)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2 (arXiv:2109.08668)."""
    return SquaredReLU.apply(x)


class Mix(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, y, a, b)
        return (wide(x) * a).addcmul_(wide(y), b).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        x, y, a, b = ctx.saved_tensors
        dz = wide(dz)
        flat = dz.flatten()
        da = flat.dot(wide(x).flatten()).view_as(a) if ctx.needs_input_grad[2] else None
        db = flat.dot(wide(y).flatten()).view_as(b) if ctx.needs_input_grad[3] else None
        return (dz * a).to(x.dtype), (dz * b).to(y.dtype), da, db


def mix(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a x + b y for fp32 tensors a and b of one element."""
    if torch.compiler.is_compiling():  # which fuses this itself, and cannot trace the Function where x is y
        return (wide(x) * a + wide(y) * b).to(x.dtype)
    return Mix.apply(x, y, a, b)


def softcap(z: Tensor, cap: float) -> Tensor:
    """cap tanh(z / cap), in fp32: arXiv:2408.00118. As a sigmoid, which is much the faster one on a CPU."""
    return torch.sigmoid(wide(z) * (2 / cap)).mul_(2 * cap).sub_(cap)


def cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, vocab: int, cap: float, summed: bool, recipe: Recipe | None = None
) -> Tensor:
    """Cross-entropy in nats of the soft-capped logits x W^T, never more than a chunk of them alive.

    x (N, C) and weight (V_p, C) in one dtype; the first `vocab` rows of weight count; targets (N,), -1 ignored. With an
    fp8 recipe the weight is the fp32 one and N must be a multiple of 16, else ValueError.
    Returns the losses (N,), 0 where ignored, or with `summed` their sum, which is the faster one to train on.
    """
    return SoftcapCrossEntropy.apply(x, weight, targets, vocab, cap, summed, recipe)


class SoftcapCrossEntropy(Function):
    """For the sum, the gradient of each chunk is known while its logits are still there, so it is computed at once;
    for single losses the logits are computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, vocab: int, cap: float, summed: bool,
        recipe: Recipe | None,
    ) -> Tensor:
        ctx.vocab, ctx.cap, ctx.summed, ctx.recipe, ctx.weight_dtype = vocab, cap, summed, recipe, weight.dtype
        at_once = summed and any(ctx.needs_input_grad)
        head = _head(x, weight, vocab, recipe)
        losses = torch.empty(len(x), dtype=wide_dtype(x.dtype), device=x.device)
        dx, dweight = _empty_gradients(x, weight) if at_once else (None, None)
        for rows in _row_chunks(x, vocab, recipe):
            p, s, at, valid = _probabilities(head.logits(rows), targets[rows], cap)
            # The cap bounds the logits, so the target's probability cannot underflow.
            losses[rows] = p.gather(1, at)[:, 0].log_().neg_().mul_(valid)
            if dx is not None and dweight is not None:
                head.gradients(_logit_gradient(p, s, at, valid), rows, dx, dweight)
        if at_once:
            ctx.save_for_backward(dx, dweight)
        else:
            ctx.save_for_backward(x, weight, targets)
        return losses.sum() if summed else losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None, None, None, None]:
        nothing = (None,) * 5
        if ctx.summed:
            dx, dweight = ctx.saved_tensors
            return (wide(dx) * upstream).to(dx.dtype), (dweight * upstream).to(ctx.weight_dtype), *nothing
        x, weight, targets = ctx.saved_tensors
        head = _head(x, weight, ctx.vocab, ctx.recipe)
        dx, dweight = _empty_gradients(x, weight)
        for rows in _row_chunks(x, ctx.vocab, ctx.recipe):
            p, s, at, valid = _probabilities(head.logits(rows), targets[rows], ctx.cap)
            head.gradients(_logit_gradient(p, s, at, valid * upstream[rows]), rows, dx, dweight)
        return dx, dweight.to(weight.dtype), *nothing


class Head:
    """The products of the output layer, a chunk of rows at a time, in the dtype of x."""

    def __init__(self, x: Tensor, weight: Tensor, vocab: int) -> None:
        self.x, self.weight, self.vocab = x, weight[:vocab], vocab

    def logits(self, rows: slice) -> Tensor:
        """(n, V), before the cap."""
        return self.x[rows] @ self.weight.t()

    def gradients(self, dz: Tensor, rows: slice, dx: Tensor, dweight: Tensor) -> None:
        """Given that of the logits (n, V), set the gradient of x in these rows and add to that of the weight."""
        dz = dz.to(self.x.dtype)
        torch.mm(dz, self.weight, out=dx[rows])
        dweight[: self.vocab] += dz.t() @ self.x[rows]


class Fp8Head:
    """The same in fp8. The gradient of the logits has its scales from its chunk; padded tokens take part as zeros."""

    def __init__(self, x: Tensor, weight: Tensor, vocab: int, recipe: Recipe) -> None:
        check_tokens(len(x))
        self.x, self.vocab, self.n_padding, self.recipe = x, vocab, len(weight) - vocab, recipe
        self.x8, self.weight8 = quantise(x, E4M3, recipe), quantise(weight, E4M3, recipe)
        self.weight8_t = transposed(self.weight8, weight, E4M3, recipe)

    def x8_rows(self, rows: slice) -> Quantised:
        return Quantised(self.x8.values[rows], self.x8.factor[rows] if self.x8.factor.dim() else self.x8.factor)

    def logits(self, rows: slice) -> Tensor:
        return product(self.x8_rows(rows), self.weight8, self.x.dtype, fast=True)[:, : self.vocab]

    def gradients(self, dz: Tensor, rows: slice, dx: Tensor, dweight: Tensor) -> None:
        if self.n_padding:
            dz = F.pad(dz, (0, self.n_padding))  # (n, V_p)
        dz8 = quantise(dz, E5M2, self.recipe)
        dz8_t = transposed(dz8, dz, E5M2, self.recipe)
        x8_t = transposed(self.x8_rows(rows), self.x[rows], E4M3, self.recipe)
        dx[rows] = product(dz8, self.weight8_t, dx.dtype)
        dweight += product(dz8_t, x8_t, self.x.dtype)


def _head(x: Tensor, weight: Tensor, vocab: int, recipe: Recipe | None) -> Head | Fp8Head:
    return Head(x, weight, vocab) if recipe is None else Fp8Head(x, weight, vocab, recipe)


def _empty_gradients(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the gradient of x, and zeros to add up that of the weight in."""
    return torch.empty_like(x), torch.zeros_like(weight, dtype=wide_dtype(weight.dtype))


def _row_chunks(x: Tensor, vocab: int, recipe: Recipe | None) -> Iterator[slice]:
    size = max(1, (CHUNK_LOGITS_CPU if x.device.type == "cpu" else CHUNK_LOGITS_GPU) // vocab)
    if recipe is not None:
        size = max(MULTIPLE, size - size % MULTIPLE)
    for first in range(0, len(x), size):
        yield slice(first, min(first + size, len(x)))


def _probabilities(z: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities and the sigmoids that the cap is made of (n, V); target ids (n, 1); 1 if there is one (n,).

    z (n, V): the logits before the cap.
    """
    s = torch.sigmoid(wide(z).mul_(2 / cap))  # cap tanh(z / cap) = 2 cap sigmoid(2 z / cap) - cap
    p = torch.softmax(s * (2 * cap), dim=-1)  # a constant taken off all logits changes nothing
    return p, s, targets.clamp(min=0)[:, None], (targets >= 0).to(p.dtype)


def _logit_gradient(p: Tensor, s: Tensor, at: Tensor, upstream: Tensor) -> Tensor:
    """Gradient of the logits before the cap (n, V), given that of the losses (n,). Overwrites p."""
    p.scatter_add_(1, at, torch.full_like(at, -1, dtype=p.dtype))
    p.mul_(4 * upstream[:, None])  # d cap tanh(z / cap) / dz = 1 - tanh^2 = 4 s (1 - s)
    return torch.ops.aten.sigmoid_backward(p, s)

"""Muon for a stack of equally shaped matrices: momentum, orthogonalisation, variance reduction, cautious decay.

Muon (kellerjordan.github.io/posts/muon) with the polynomials of Polar Express (arXiv:2505.16932), rows equalised before
(MuonEq, arXiv:2603.28254) and the norm reset after (Muon+, arXiv:2602.21545), neuron-wise variance reduction (NorMuon,
arXiv:2510.05491) and cautious weight decay (arXiv:2510.12402).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Round by round (a, b, c) of x <- a x + b x^3 + c x^5 on the singular values, for values that start in (0, 1].
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
NORM_MARGIN = 1.01  # rounding must not push a singular value above 1
NORM_EPS = 1e-6
VARIANCE_EPS = 1e-10


def second_moment_shape(m: int, n: int) -> tuple[int, int]:
    """Shape of the variance statistic of an (m, n) matrix: a value per row if it is tall or square, else per column."""
    return (m, 1) if m >= n else (1, n)


def muon_direction(
    grads: Tensor,
    momentum_buffer: Tensor,
    second_moment: Tensor,
    *,
    momentum: float,
    beta2: float,
    ns_steps: int,
    muon_eq: bool,
    muon_plus: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The step to take per unit of learning rate, (k, m, n) fp32; updates both states and overwrites `grads`.

    grads and momentum_buffer (k, m, n) fp32; second_moment (k, m, 1) or (k, 1, n) fp32. `dtype` is the number format of
    the matrix products, and of nothing else.
    """
    m, n = grads.shape[-2:]
    momentum_buffer.lerp_(grads, 1 - momentum)
    x = grads.lerp_(momentum_buffer, momentum)  # Nesterov: looks one step ahead
    x = x.mul_(_input_scale(x, muon_eq)).to(dtype)
    g = orthogonalize(x, ns_steps).float()

    dim, n_reduced = (-1, n) if m >= n else (-2, m)
    variance = g.square().mean(dim=dim, keepdim=True)  # (k, m, 1) or (k, 1, n)
    scale = torch.ones_like(variance[:, :1, :1])
    if muon_plus:
        norm = (n_reduced * variance.sum((-2, -1), keepdim=True)).sqrt()
        scale = min(m, n) ** 0.5 / norm.clamp(min=NORM_EPS)  # (k, 1, 1)
        variance = variance * scale.square()
    second_moment.lerp_(variance, 1 - beta2)
    inverse = second_moment.clamp(min=VARIANCE_EPS).rsqrt()
    before = (n_reduced * variance.sum((-2, -1), keepdim=True)).sqrt()
    after = (n_reduced * (variance * inverse.square()).sum((-2, -1), keepdim=True)).sqrt()
    return g.mul_(scale * inverse * (before / after.clamp(min=VARIANCE_EPS)))


def _input_scale(x: Tensor, muon_eq: bool) -> Tensor:
    """Factor (k, m or 1, 1) that brings all singular values of x below 1, with rows of equal norm if `muon_eq`."""
    rows = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # (k, m, 1)
    norm = torch.linalg.vector_norm(rows, dim=-2, keepdim=True)  # (k, 1, 1)
    if not muon_eq:
        return 1 / (NORM_MARGIN * norm + NORM_EPS)
    equalizer = norm / x.size(-2) ** 0.5 / rows.clamp(min=NORM_EPS)
    norm = torch.linalg.vector_norm(rows * equalizer, dim=-2, keepdim=True)
    return equalizer / (NORM_MARGIN * norm + NORM_EPS)


def orthogonalize(x: Tensor, ns_steps: int) -> Tensor:
    """Nearest semi-orthogonal matrices to x (k, m, n), roughly: singular values end near 1, directions stay.

    Frobenius norms must be at most 1. Raises ValueError for more rounds than there are coefficients.
    """
    if not 0 <= ns_steps <= len(POLAR_EXPRESS):
        raise ValueError(f"ns_steps {ns_steps}: there are coefficients for 0 to {len(POLAR_EXPRESS)} rounds")
    rounds = POLAR_EXPRESS[:ns_steps]
    short, long = sorted(x.shape[-2:])
    if x.device.type == "cpu" and x.dtype == torch.float32 and long >= 2 * short:
        # A third fewer operations for the matrices of the MLP. In stretches of three and two rounds: rounding loses
        # small singular values in a stretch of five, and in any stretch in bf16 or TF32.
        return _short_side_rounds(_short_side_rounds(x, rounds[:3]), rounds[3:])
    tall = x.size(-2) > x.size(-1)
    for a, b, c in rounds:
        gram = x.mT @ x if tall else x @ x.mT  # (k, s, s), s the shorter side
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, poly, beta=a) if tall else torch.baddbmm(x, poly, x, beta=a)
    return x


def _short_side_rounds(x: Tensor, rounds: Sequence[tuple[float, float, float]]) -> Tensor:
    """The same rounds with products of the shorter side only, but for one before and one after (arXiv:2505.16932, F).

    Everything but x is a polynomial in one Gram matrix, so the products commute and the Gram matrix of the next round
    follows without its x.
    """
    if not rounds:
        return x
    tall = x.size(-2) > x.size(-1)
    gram = x.mT @ x if tall else x @ x.mT  # (k, s, s)
    factor = poly = _polynomial(gram, *rounds[0])
    for coefficients in rounds[1:]:
        gram = poly @ gram @ poly
        poly = _polynomial(gram, *coefficients)
        factor = poly @ factor
    return x @ factor if tall else factor @ x


def _polynomial(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """a + b gram + c gram^2, the factor that one round puts on x."""
    poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    poly.diagonal(dim1=-2, dim2=-1).add_(a)
    return poly


def apply_update(params: Sequence[Tensor], direction: Tensor, lr: float, weight_decay: float) -> None:
    """Take the step, in place: params[i] (m, n) goes against direction[i] of (k, m, n).

    Weight decay acts only where step and parameter agree in sign, so it never works against the step.
    """
    m, n = direction.shape[-2:]
    lr = lr * max(1.0, m / n) ** 0.5
    weights, steps = list(params), list(direction.unbind(0))
    if weight_decay != 0:
        agree = torch._foreach_mul(steps, weights)
        torch._foreach_sign_(agree)  # -1, 0, 1
        torch._foreach_add_(agree, 1)
        torch._foreach_clamp_max_(agree, 1)  # 0 where the signs differ, else 1
        torch._foreach_addcmul_(weights, agree, weights, -lr * weight_decay)
    torch._foreach_add_(weights, steps, alpha=-lr)

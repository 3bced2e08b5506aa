"""Laws of attention: windows, groups, the cache, and the hand-written gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nanochat_ray.config import ModelConfig
from nanochat_ray.model.attention import QUERY_BLOCK, attend, attend_stored, hide, sdpa_attention, windows_of
from nanochat_ray.model.ops import cross_entropy, mix, rms_norm, rotate_and_norm, softcap, squared_relu

EPS = 2.0**-23


def heads(B: int, T: int, H: int, K: int, D: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(B, T, n, D, generator=generator, dtype=dtype).requires_grad_() for n in (H, K, K)]


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, left: int) -> torch.Tensor:
    """The definition, one dense matrix of scores."""
    T, group = q.size(1), q.size(2) // k.size(2)
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.size(-1) ** 0.5
    distance = torch.arange(T)[:, None] - torch.arange(T)
    visible = (distance >= 0) & ((distance <= left) | (left < 0))
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


SHAPES = [  # B, T, H, K, D, left
    (2, 20, 2, 2, 8, -1),
    (1, QUERY_BLOCK, 1, 1, 4, 5),
    (2, QUERY_BLOCK + 1, 4, 2, 4, QUERY_BLOCK),
    (1, 2 * QUERY_BLOCK + 40, 4, 1, 4, 7),
    (2, 2 * QUERY_BLOCK + 40, 2, 2, 4, QUERY_BLOCK + 3),
    (1, 2 * QUERY_BLOCK + 40, 2, 1, 4, -1),
    (3, 1, 2, 1, 4, 2),
]


@pytest.mark.parametrize("back_end", [attend, sdpa_attention])
@pytest.mark.parametrize("B, T, H, K, D, left", SHAPES)
def test_attention_and_its_gradients_equal_the_definition(back_end, B, T, H, K, D, left):
    q, k, v = heads(B, T, H, K, D)
    weight = torch.randn(B, T, H, D, dtype=torch.float64)
    ours, wanted = back_end(q, k, v, left), plain_attention(q, k, v, left)
    torch.testing.assert_close(ours, wanted)
    ours_grads = torch.autograd.grad((ours * weight).sum(), (q, k, v))
    torch.testing.assert_close(ours_grads, torch.autograd.grad((wanted * weight).sum(), (q, k, v)))


def test_attention_in_bfloat16_is_near_double_precision():
    q, k, v = heads(2, 200, 4, 2, 64)
    low = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), 100)
    torch.testing.assert_close(low.double(), attend(q, k, v, 100), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("H, K", [(2, 2), (4, 1), (4, 2)])
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("starts", [[9, 9], [4, 11]])
@pytest.mark.parametrize("left", [-1, 5])
def test_stored_attention_equals_whole_rows(dtype, H, K, T, starts, left):
    q, k, v = (x.detach() for x in heads(2, max(starts) + T, H, K, 16))
    at = torch.tensor(starts)[:, None] + torch.arange(T)  # (2, T)
    stored = [torch.cat([x, torch.full_like(x[:, :3], 9.0)], dim=1).transpose(1, 2).to(dtype) for x in (k, v)]
    mask = hide(at[:, :, None] - torch.arange(max(starts) + T + 3), left, dtype)[:, None]  # (2, 1, T, S)
    ours = attend_stored(q[torch.arange(2)[:, None], at].to(dtype), *(x.contiguous() for x in stored), mask)
    wanted = plain_attention(q, k, v, left)[torch.arange(2)[:, None], at]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(ours.double(), wanted, atol=tolerance, rtol=tolerance)


def test_windows():
    def config(length: int, pattern: str, layers: int = 5) -> ModelConfig:
        return ModelConfig(sequence_len=length, window_pattern=pattern, n_layer=layers)

    assert windows_of(config(2048, "SSSL")) == [512, 512, 512, 2048, 2048]
    assert windows_of(config(512, "sl", 4)) == [128, 512, 128, 512]
    assert windows_of(config(1024, "S", 1)) == [1024]
    assert windows_of(config(1030, "S", 2)) == [384, 1030]
    assert windows_of(config(100, "S", 2)) == [128, 100]


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_gradients_of_the_norms():
    angles = torch.rand(1, 5, 1, 3, dtype=torch.float64)
    cos, sin = torch.cat([angles.cos(), angles.cos()], -1), torch.cat([angles.sin(), -angles.sin()], -1)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, 1e-3), double(4, 7))
    assert torch.autograd.gradcheck(lambda x: rotate_and_norm(x, cos, sin, 1.2, 1e-3), double(2, 5, 2, 6))


def test_norms_equal_their_definition():
    x = torch.randn(2, 5, 3, 6, dtype=torch.float64)
    normed = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    torch.testing.assert_close(rms_norm(x, EPS), normed)
    angle = torch.rand(1, 5, 1, 3, dtype=torch.float64)
    cos, sin = angle.cos(), angle.sin()
    x1, x2 = x.chunk(2, dim=-1)
    rotated = torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)
    wanted = 1.2 * rotated / (rotated.square().mean(-1, keepdim=True) + EPS).sqrt()
    ours = rotate_and_norm(x, torch.cat([cos, cos], -1), torch.cat([sin, -sin], -1), 1.2, EPS)
    torch.testing.assert_close(ours, wanted)


def test_gradients_of_mix_and_squared_relu():
    assert torch.autograd.gradcheck(mix, (double(3, 4), double(3, 4), double(1), double(1)[0]))
    assert torch.autograd.gradcheck(squared_relu, double(5, 6))


@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("chunk", [10, 2**21])  # logits at a time: one row, all rows
def test_cross_entropy_equals_the_definition(summed, chunk, monkeypatch):
    monkeypatch.setattr("nanochat_ray.model.ops.CHUNK_LOGITS_CPU", chunk)
    cap, vocab = 2.0, 9
    x, weight = double(7, 5), double(12, 5)
    targets = torch.tensor([0, 8, -1, 3, 3, -1, 5])
    ours = cross_entropy(x, weight, targets, vocab, cap, summed)
    logits = cap * torch.tanh(x @ weight[:vocab].t() / cap)
    torch.testing.assert_close(softcap(x @ weight[:vocab].t(), cap), logits)
    wanted = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum" if summed else "none")
    torch.testing.assert_close(ours, wanted)
    upstream = torch.rand_like(ours)
    ours_grads = torch.autograd.grad(ours, (x, weight), upstream)
    torch.testing.assert_close(ours_grads, torch.autograd.grad(wanted, (x, weight), upstream))


def test_cross_entropy_stays_finite_at_the_cap():
    """The least likely token possible: its logit at one end of the cap, all others at the other."""
    x, weight = torch.ones(1, 1), torch.full((4096, 1), 1e4)
    weight[7] = -1e4
    loss = cross_entropy(x, weight, torch.tensor([7]), 4096, 15.0, True)
    assert loss.item() == pytest.approx(30 + torch.log(torch.tensor(4095.0)).item(), abs=1e-4)

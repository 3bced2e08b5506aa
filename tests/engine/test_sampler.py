"""The draw of a token."""

from __future__ import annotations

import pytest
import torch

from nanochat_ray.engine.sampler import row_generator, sample


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.7, 0), (1.5, 5), (1.0, 100)])
def test_draws_follow_the_distribution(temperature: float, top_k: int | None) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 1.5
    kept = logits.clone()
    if top_k == 5:
        kept[logits < logits.topk(5).values[-1]] = -torch.inf
    wanted = torch.softmax(kept / temperature, dim=0)
    n = 20_000
    generators = [row_generator(seed, sample) for seed in range(4) for sample in range(n // 4)]
    drawn = sample(logits.expand(n, -1), temperature, top_k, generators)
    found = torch.bincount(drawn, minlength=12) / n
    assert ((found - wanted).abs() <= 5 * (wanted * (1 - wanted) / n).sqrt()).all()  # 0 stays 0


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.full((4, 1000), -torch.inf)
    logits[:, 3] = 0.0
    for value in (0.0, 1 - 2**-24):  # the ends of what torch.rand gives
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand", lambda n, generator, value=value: torch.full((n,), value))
            assert sample(logits, 1.0, None, [torch.Generator()] * 4).tolist() == [3] * 4


def test_generators_are_kept_apart() -> None:
    firsts = [torch.rand(1, generator=row_generator(seed, k)).item() for seed in range(20) for k in range(50)]
    assert len(set(firsts)) == 1000
    again = [torch.rand(1, generator=row_generator(3, k)).item() for k in range(50)]
    assert again == firsts[150:200]

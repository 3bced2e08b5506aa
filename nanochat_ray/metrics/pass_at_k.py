"""pass@k: how often at least one of k samples of a prompt is right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

RIGHT = 1.0  # the least reward that counts as right


@dataclass(frozen=True)
class PassAtK:
    """Shares of prompts, for one k."""

    k: int
    n_prompts: int  # with k samples or more
    first: float  # any of the first k is right: nanochat's
    unbiased: float  # k of the samples drawn at random, without replacement, on average (arXiv:2107.03374)


def pass_at_k(groups: Sequence[Sequence[float | None]]) -> list[PassAtK]:
    """For k = 1 up to the most samples of any prompt, given the rewards of each prompt's samples in order.

    Samples without a reward (None) are left out, and a prompt with fewer than k others does not count for that k.
    """
    rights = [[reward >= RIGHT for reward in group if reward is not None] for group in groups]
    found = []
    for k in range(1, max(map(len, rights), default=0) + 1):
        having = [right for right in rights if len(right) >= k]
        first = fmean(any(right[:k]) for right in having)
        unbiased = fmean(chance_of_any(len(right), sum(right), k) for right in having)
        found.append(PassAtK(k, len(having), first, unbiased))
    return found


def chance_of_any(n: int, n_right: int, k: int) -> float:
    """1 - C(n - n_right, k) / C(n, k): the chance that k of n samples, n_right of them right, hold a right one.

    In whole numbers up to the one division, so it is exact to the last digit for any n.
    """
    assert 0 <= n_right <= n and 1 <= k <= n, (n, n_right, k)
    ways = math.comb(n, k)
    return (ways - math.comb(n - n_right, k)) / ways


def pass_metrics(groups: Sequence[Sequence[float | None]]) -> dict[str, float]:
    """`pass@k` and `unbiased_pass@k` of all k, by the names that trackers get."""
    found = pass_at_k(groups)
    first = {f"pass@{each.k}": each.first for each in found}
    return first | {f"unbiased_pass@{each.k}": each.unbiased for each in found}

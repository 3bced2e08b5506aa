"""pass@k: the two estimators against each other, and against counting all subsets."""

from __future__ import annotations

import itertools
import random
from statistics import fmean

import pytest

from nanochat_ray.metrics.pass_at_k import chance_of_any, pass_at_k, pass_metrics


@pytest.mark.parametrize("n", range(1, 7))
def test_the_unbiased_one_is_the_share_of_all_subsets(n):
    for n_right in range(n + 1):
        samples = [True] * n_right + [False] * (n - n_right)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(samples, k))
            assert chance_of_any(n, n_right, k) == pytest.approx(fmean(any(s) for s in subsets), abs=1e-15)


def test_it_stays_exact_where_numbers_are_large():
    assert chance_of_any(100_000, 1, 10) == pytest.approx(1e-4, rel=1e-14)
    assert chance_of_any(4000, 2000, 2000) == 1.0 and chance_of_any(4000, 0, 2000) == 0.0
    assert chance_of_any(10**6, 1, 1) == 1e-6


def test_known_numbers():
    groups = [[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]]
    found = pass_at_k(groups)
    assert [each.first for each in found] == [0.25, 0.5, 0.5, 0.75]
    assert [each.unbiased for each in found] == pytest.approx(
        [(0.5 + 0 + 1 + 0.25) / 4, (5 / 6 + 0 + 1 + 0.5) / 4, (1 + 0 + 1 + 0.75) / 4, 0.75]
    )
    assert {each.n_prompts for each in found} == {4}


def test_the_first_k_are_unbiased_on_average_over_the_orders():
    rng = random.Random(1)
    group = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    wanted = [each.unbiased for each in pass_at_k([group])]
    orders = [pass_at_k([rng.sample(group, len(group))]) for _ in range(3000)]
    for k, value in enumerate(wanted):
        assert fmean(order[k].first for order in orders) == pytest.approx(value, abs=0.04)


def test_samples_without_a_reward_are_left_out():
    found = pass_at_k([[None, 1.0, 0.0], [0.0, 0.0, 0.0], [None, None, None], []])
    assert [(each.k, each.n_prompts) for each in found] == [(1, 2), (2, 2), (3, 1)]
    assert [each.first for each in found] == [0.5, 0.5, 0.0]  # the first that has a reward
    assert [each.unbiased for each in found] == [0.25, 0.5, 0.0]
    assert pass_at_k([]) == pass_at_k([[], [None]]) == []


def test_only_a_whole_reward_is_right():
    assert [each.first for each in pass_at_k([[0.99, -3.0, 1.0, 2.0]])] == [0, 0, 1, 1]


def test_names():
    assert pass_metrics([[0.0, 1.0]]) == {"pass@1": 0, "pass@2": 1, "unbiased_pass@1": 0.5, "unbiased_pass@2": 1}

"""The draw of a token, against its definition."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_ray.engine.sampler import RowSampler, Sampled, check_sampling, row_generator, sample_rows
from nanochat_ray.messages import SamplingParams

TOP = 1 - 2**-24  # the largest random number
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]
laws = settings(max_examples=150, deadline=None, derandomize=True)


class Fixed(RowSampler):
    """Draws what it is told."""

    def __init__(self, uniform: float, params: SamplingParams) -> None:
        super().__init__(params)
        self.uniform = uniform

    def draw(self) -> float:
        return self.uniform


def definition(logits: torch.Tensor, params: SamplingParams) -> dict[int, float]:
    """Probabilities of the tokens that can be drawn, for one row of logits (V,), the slow and plain way."""
    values = logits.double().tolist()
    order = sorted(range(len(values)), key=lambda token: (-values[token], token))
    if params.temperature == 0:
        return {order[0]: 1.0}
    order = order[: params.top_k or None]
    weights = [math.exp((values[token] - values[order[0]]) / params.temperature) for token in order]
    wanted = params.top_p * math.fsum(weights)
    kept = next((n for n, sum_ in enumerate(itertools.accumulate(weights), 1) if sum_ >= wanted), len(order))
    total = math.fsum(weights[:kept])
    return {token: weight / total for token, weight in zip(order[:kept], weights, strict=False) if weight > 0}


def random_logits(n_rows: int, n_vocab: int, seed: int, kind: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    logits = torch.randn(n_rows, n_vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    if kind == "ties":
        logits = logits.round()
    elif kind == "bf16":
        logits = logits.bfloat16()
    elif kind == "equal":
        logits = torch.zeros_like(logits)
    elif kind == "holes":
        logits = logits.masked_fill(logits < 0, -torch.inf)
        logits[:, 0] = 0.0
    return logits.to(dtype)


kinds = st.sampled_from(["plain", "ties", "bf16", "equal", "holes"])
params_of_rows = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.2, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([None, 0, 1, 2, 5, 50, 300, 10**6]),
    top_p=st.sampled_from([1e-9, 0.31, 0.83, 0.97, 1.0]),
    seed=st.integers(0, 99),
    logprobs=st.sampled_from([None, None, 0, 1, 4, 400]),
)
sizes = st.one_of(st.integers(2, 40), st.integers(200, 400), st.just(3000))


@pytest.mark.parametrize("device", DEVICES)
@laws
@given(st.lists(params_of_rows, min_size=1, max_size=6), sizes, st.integers(0, 999), kinds, st.randoms())
def test_a_row_is_the_same_alone_and_in_company(device, rows, n_vocab, seed, kind, random) -> None:
    logits = random_logits(len(rows), n_vocab, seed, kind).to(device)
    together = sample_rows(logits, [RowSampler(params, k) for k, params in enumerate(rows)])
    for k, params in enumerate(rows):
        assert sample_rows(logits[k : k + 1], [RowSampler(params, k)]) == [together[k]]
    order = list(range(len(rows)))
    random.shuffle(order)
    shuffled = sample_rows(logits[order], [RowSampler(rows[k], k) for k in order])
    assert shuffled == [together[k] for k in order]


@laws
@given(st.lists(params_of_rows, min_size=1, max_size=6), sizes, st.integers(0, 999), kinds, st.data())
def test_a_number_picks_the_token_whose_share_it_falls_in(rows, n_vocab, seed, kind, data) -> None:
    uniforms = [data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999, TOP])) for _ in rows]
    logits = random_logits(len(rows), n_vocab, seed, kind)
    drawn = sample_rows(logits, [Fixed(u, params) for u, params in zip(uniforms, rows, strict=True)])
    for k, (params, uniform) in enumerate(zip(rows, uniforms, strict=True)):
        shares = definition(logits[k], params)
        if (params.top_k or n_vocab) >= n_vocab and params.top_p == 1:
            shares = dict(sorted(shares.items()))  # without a cut the tokens lie in the order of their ids
        bounds = dict(zip(shares, itertools.accumulate(shares.values()), strict=True))
        token = drawn[k].token
        assert token in shares, "only what the cuts leave is drawn"
        assert bounds[token] - shares[token] - 1e-6 <= uniform <= bounds[token] + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 5},
        {"top_k": 100},
        {"top_p": 0.8},
        {"temperature": 1.3, "top_k": 6, "top_p": 0.9},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(changes: dict, dtype: torch.dtype) -> None:
    params = SamplingParams(**changes)
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=dtype) * 1.5
    n, row = 20_000, RowSampler(params)
    drawn = [sampled.token for _ in range(n // 500) for sampled in sample_rows(logits.expand(500, -1), [row] * 500)]
    found = torch.bincount(torch.tensor(drawn), minlength=12).double()
    shares = definition(logits, params)
    wanted = torch.tensor([n * shares.get(token, 0.0) for token in range(12)], dtype=torch.float64)
    assert found[wanted == 0].sum() == 0
    inside = wanted > 0
    chi_square = ((found - wanted)[inside] ** 2 / wanted[inside]).sum().item()
    freedom = int(inside.sum()) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_rows_of_one_seed_are_independent() -> None:
    """200 samples of one request over two tokens: neither their first nor their second draws go together."""
    rows = [RowSampler(SamplingParams(seed=7), k) for k in range(400)]
    steps = [[sampled.token for sampled in sample_rows(torch.zeros(400, 2), rows)] for _ in range(2)]
    assert all(abs(sum(step) - 200) < 50 for step in steps)
    assert abs(sum(a == b for a, b in zip(*steps, strict=True)) - 200) < 50


@pytest.mark.parametrize("top_k", [1, 3, 7, 50, 999])
def test_of_equally_likely_tokens_the_lowest_ids_stay(top_k: int) -> None:
    row = RowSampler(SamplingParams(top_k=top_k))
    drawn = [sampled.token for _ in range(5) for sampled in sample_rows(torch.zeros(200, 1000), [row] * 200)]
    assert max(drawn) < top_k and (top_k > 7 or set(drawn) == set(range(top_k)))
    logits = torch.tensor([[0.0, 2.0, 2.0, 5.0, 2.0, 2.0]])
    drawn = [sample_rows(logits, [Fixed(u / 64, SamplingParams(temperature=9.0, top_k=3))])[0].token for u in range(64)]
    assert drawn == sorted(drawn, key=[3, 1, 2].index) and set(drawn) == {1, 2, 3}


@pytest.mark.parametrize("kind", ["plain", "ties", "bf16", "equal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_coldest_settings_are_greedy(kind: str, dtype: torch.dtype) -> None:
    logits = random_logits(7, 700, 3, kind, dtype)
    greedy = [sampled.token for sampled in sample_rows(logits, [RowSampler(SamplingParams(temperature=0.0))] * 7)]
    assert greedy == [definition(row, SamplingParams(temperature=0.0)).popitem()[0] for row in logits]
    tiny = {"top_p": 1e-6}
    for changes in ({"top_k": 1}, tiny, {"temperature": 1e-300, **tiny}, {"top_k": 40, **tiny}):
        rows = [Fixed(TOP, SamplingParams(**changes)), *[Fixed(0.3, SamplingParams(**changes))] * 6]
        assert [sampled.token for sampled in sample_rows(logits, rows)] == greedy
    if kind == "plain":
        cold = [Fixed(0.5, SamplingParams(temperature=1e-300))] * 7
        assert [sampled.token for sampled in sample_rows(logits, cold)] == greedy


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0}, {"top_k": 1}, {"top_k": 9}, {"top_p": 0.5}], ids=str)
def test_every_token_costs_one_number(changes: dict) -> None:
    params = SamplingParams(seed=5, **changes)
    row, generator = RowSampler(params, 3), row_generator(5, 3)
    numbers = [torch.rand(1, generator=generator).item() for _ in range(100)]
    for _ in range(45):
        sample_rows(torch.zeros(1, 500), [row])
    assert [row.draw() for _ in range(10)] == numbers[45:55]


@pytest.mark.parametrize("changes", [{}, {"top_k": 5}, {"top_p": 0.5}, {"top_k": 600}, {"temperature": 1e-30}], ids=str)
@pytest.mark.parametrize("uniform", [0.0, TOP])
def test_a_token_without_probability_is_never_drawn(uniform: float, changes: dict) -> None:
    for at in (0, 3, 999):
        logits = torch.full((4, 1000), -torch.inf)
        logits[:, at] = -7.0
        drawn = sample_rows(logits, [Fixed(uniform, SamplingParams(**changes))] * 4)
        assert drawn == [Sampled(at)] * 4


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("whole_row", [True, False])
def test_a_broken_row_harms_no_other(value: float, whole_row: bool) -> None:
    rows = [
        SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, logprobs=2)
        for temperature, top_k, top_p in itertools.product([0.0, 1.0], [None, 5], [0.7, 1.0])
    ]
    logits = random_logits(len(rows), 600, 1, "plain")
    wanted = sample_rows(logits, [RowSampler(params) for params in rows])
    for broken in range(len(rows)):
        ill = logits.clone()
        ill[broken] = torch.full((600,), value) if whole_row else ill[broken].index_fill(0, torch.tensor([9]), value)
        found = sample_rows(ill, [RowSampler(params) for params in rows])
        assert [s for k, s in enumerate(found) if k != broken] == [s for k, s in enumerate(wanted) if k != broken]
        assert 0 <= found[broken].token < 600
    everything = sample_rows(torch.full((8, 600), value), [RowSampler(params) for params in rows])
    assert all(0 <= sampled.token < 600 for sampled in everything)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["plain", "ties", "equal"])
def test_logprobs_are_those_of_the_whole_vocabulary(kind: str, dtype: torch.dtype) -> None:
    logits = random_logits(6, 300, 2, kind, dtype)
    wanted = torch.log_softmax(logits.double(), dim=-1)
    asked = [None, 0, 1, 20, 300, 999]
    rows = [SamplingParams(temperature=0.5, top_k=4, top_p=0.9, logprobs=n) for n in asked]
    for k, (n, sampled) in enumerate(zip(asked, sample_rows(logits, [RowSampler(p) for p in rows]), strict=True)):
        assert len(sampled.top) == min(n or 0, 300)
        order = sorted(range(300), key=lambda token, k=k: (-logits[k, token].item(), token))
        assert [token for token, _ in sampled.top] == order[: len(sampled.top)]
        for token, logprob in [*sampled.top, *([] if n is None else [(sampled.token, sampled.logprob)])]:
            assert abs(logprob - wanted[k, token].item()) < (1e-5 if dtype == torch.float32 else 1e-12)
        assert (sampled.logprob is None) == (n is None)


@pytest.mark.parametrize(("n_rows", "n_vocab"), [(1, 2), (512, 2), (512, 265), (3, 65_536)])
def test_sizes(n_rows: int, n_vocab: int) -> None:
    logits = random_logits(n_rows, n_vocab, 0, "plain", torch.float32)
    kinds = [SamplingParams(**c) for c in ({}, {"top_k": 50}, {"top_p": 0.9}, {"temperature": 0.0}, {"top_k": 2})]
    params = [kinds[k % len(kinds)] for k in range(n_rows)]
    drawn = sample_rows(logits, [RowSampler(p, k) for k, p in enumerate(params)])
    for k in {0, 1, 2, n_rows - 1} & set(range(n_rows)):
        wide = dataclasses.replace(params[k], top_p=min(1, params[k].top_p + 1e-4))  # the edge of a share in fp32
        assert drawn[k].token in definition(logits[k], wide)
    assert sample_rows(logits[:0], []) == []


def test_bad_parameters_are_refused() -> None:
    for changes, words in [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"top_p": math.nan}, "top_p nan"),
        ({"logprobs": -1}, "logprobs -1"),
        ({"stop": ("a", "")}, "empty"),
    ]:
        with pytest.raises(ValueError, match=words):
            check_sampling(SamplingParams(**changes))
        with pytest.raises(ValueError, match=words):
            RowSampler(SamplingParams(**changes))


def test_generators_are_kept_apart() -> None:
    firsts = [torch.rand(1, generator=row_generator(seed, k)).item() for seed in range(20) for k in range(50)]
    assert len(set(firsts)) == 1000
    again = [torch.rand(1, generator=row_generator(3, k)).item() for k in range(50)]
    assert again == firsts[150:200]

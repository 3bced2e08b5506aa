"""From logits to the next tokens: each row with its own temperature, cuts and random numbers.

A row's token is a function of its logits, its parameters and its next random number, never of the rows beside it. So
likelihoods are added up as whole numbers: such sums are exact, in any order and with any padding.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanochat_ray.messages import SamplingParams

COLDEST = 1e-5  # lower temperatures count as this one: fp32 logits divided by it are still finite
_DRAWS_AHEAD = 32  # one call for so many random numbers costs hardly more than for one
_SUM = 2.0**30  # of the weights of a vocabulary: steps finer than a random number's, and a sum that fits 32 bits
_WEIGHT = 2.0**36  # in lists, of the most likely token: sums of 65,536 are exact as doubles too
_MARGIN = 8  # most likely tokens listed beyond the last that is needed, to see whether it ties with them
_NUCLEUS = 256  # most likely tokens listed at first where only top_p cuts
_GROWTH = 8  # how much longer the next list is where one was too short


@dataclass(frozen=True)
class Sampled:
    """What came out for one row."""

    token: int
    logprob: float | None = None  # of the token, natural, at temperature 1 over the whole vocabulary, if asked for
    top: tuple[tuple[int, float], ...] = ()  # the most likely tokens with theirs, in falling order, ties by id


class RowSampler:
    """The sampling parameters of one stream and its random numbers; number n belongs to its token n.

    So every token costs one number, also of a greedy row and where a tool's token takes the place of the sampled one.
    """

    def __init__(self, params: SamplingParams, sample: int = 0) -> None:
        """`sample` numbers the streams of one request. Raises what `check_sampling` raises."""
        check_sampling(params)
        self.greedy = params.temperature == 0 or params.top_k == 1
        self.temperature = 1.0 if self.greedy else max(params.temperature, COLDEST)
        self.top_k = 1 if self.greedy else params.top_k or None
        self.top_p = 1.0 if self.greedy else params.top_p
        self.logprobs = params.logprobs
        self._generator = row_generator(params.seed, sample)
        self._ahead: list[float] = []  # drawn and not used, the next one last

    def draw(self) -> float:
        """The next number, in [0, 1), of 24 bits."""
        if not self._ahead:
            self._ahead = torch.rand(_DRAWS_AHEAD, generator=self._generator).tolist()[::-1]
        return self._ahead.pop()


def check_sampling(params: SamplingParams) -> None:
    """ValueError for a temperature, top_k, top_p, logprobs or stop text without meaning."""
    if not 0 <= params.temperature < math.inf or (params.top_k or 0) < 0:
        raise ValueError(f"temperature {params.temperature} and top_k {params.top_k} must not be negative")
    if not 0 < params.top_p <= 1:
        raise ValueError(f"top_p {params.top_p} must be above 0 and at most 1, which keeps every token")
    if (params.logprobs or 0) < 0:
        raise ValueError(f"logprobs {params.logprobs} must not be negative; 0 gives those of the sampled tokens only")
    if not all(params.stop):
        raise ValueError(f"stop texts {list(params.stop)!r}: an empty one would end every stream at once; leave it out")


def row_generator(seed: int, sample: int) -> torch.Generator:
    """The random numbers of one sample of a request, on the CPU.

    They depend on nothing else, so a sample comes out the same alone and in company. Two samples of one seed never
    share a state, although torch uses only 32 bits of it.
    """
    base = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=4).digest(), "little")
    return torch.Generator().manual_seed((base + sample * 0x9E3779B9) % 2**32)  # an odd factor keeps samples apart


@torch.inference_mode()
def sample_rows(logits: Tensor, rows: Sequence[RowSampler]) -> list[Sampled]:
    """The next token of each row of logits (R, V), fp32 or fp64. Every row draws one number.

    Of the softmax at the row's temperature the `top_k` most likely tokens stay, of equally likely ones those with the
    lowest ids; of these the smallest set of the most likely ones that holds the share `top_p`, at least one. A greedy
    row takes the largest logit, of equal ones that with the lowest id. A row with NaN among its logits gets a valid id.

    Results come from the device in one transfer; log-probabilities, where a row asks for them, in a second one.
    """
    assert len(logits) == len(rows), f"{len(logits)} rows of logits for {len(rows)} samplers"
    uniforms = [row.draw() for row in rows]
    if all(row.greedy for row in rows):
        tokens = logits.argmax(dim=-1).tolist()
    else:
        tokens = _draw(logits, rows, uniforms)
    out = [Sampled(token) for token in tokens]
    asked = [at for at, row in enumerate(rows) if row.logprobs is not None]
    if asked:
        n_top = [rows[at].logprobs or 0 for at in asked]
        found = _with_logprobs(_take(logits, asked), [tokens[at] for at in asked], n_top)
        for at, sampled in zip(asked, found, strict=True):
            out[at] = sampled
    return out


def _draw(logits: Tensor, rows: Sequence[RowSampler], uniforms: list[float]) -> list[int]:
    """Rows that cut nothing off draw on the device; for the others lists of the most likely tokens come to the host."""
    n_vocab = logits.size(1)
    cut = [(row.top_k or n_vocab) < n_vocab or row.top_p < 1 for row in rows]
    whole = [at for at, is_cut in enumerate(cut) if not is_cut]
    left = [at for at, is_cut in enumerate(cut) if is_cut]
    size = min(n_vocab, max((k + _MARGIN if (k := rows[at].top_k) else _NUCLEUS for at in left), default=0))
    tokens = [0] * len(rows)
    work: list[Tensor] = []
    if whole:
        work.append(_draw_whole(_take(logits, whole), [rows[at] for at in whole], [uniforms[at] for at in whole]))
    if left:
        work += _weighed_list(_take(logits, left), [rows[at] for at in left], size)
    arrays = _to_host(work)
    if whole:
        for at, token in zip(whole, arrays.pop(0).tolist(), strict=True):
            tokens[at] = int(token)
    while left:
        picked, sure = _pick(arrays, [rows[at] for at in left], [uniforms[at] for at in left], size == n_vocab)
        for at, token in zip(left, picked, strict=True):
            tokens[at] = int(token)
        left = [at for at, is_sure in zip(left, sure, strict=True) if not is_sure]
        if left:
            size = min(n_vocab, size * _GROWTH)
            arrays = _to_host(_weighed_list(_take(logits, left), [rows[at] for at in left], size))
    return tokens


def _draw_whole(logits: Tensor, rows: list[RowSampler], uniforms: list[float]) -> Tensor:
    """Tokens (R,) drawn from the whole vocabulary."""
    numbers = torch.tensor([[row.temperature for row in rows], uniforms], dtype=torch.float64).to(logits.device)
    temperature, uniform = numbers[..., None]  # (R, 1) each
    weights = torch.softmax(logits / temperature.to(logits.dtype), dim=-1).mul_(_SUM).round_().to(torch.int32)  # (R, V)
    cumulated = weights.cumsum(dim=-1, dtype=torch.int32)
    target = (uniform * cumulated[:, -1:]).to(torch.int32)  # (R, 1), below the sum
    return torch.searchsorted(cumulated, target, right=True).squeeze(-1).clamp_(0, logits.size(1) - 1)


def _most_likely(logits: Tensor, size: int) -> list[Tensor]:
    """Values and ids (R, size) of the largest logits in falling order. Ties come in any order if `size` is not V."""
    if size < logits.size(1):
        return list(logits.topk(size, dim=-1))
    return list(logits.sort(dim=-1, descending=True, stable=True))


def _weighed_list(logits: Tensor, rows: list[RowSampler], size: int) -> list[Tensor]:
    """The most likely tokens and, where a row needs it, the probability (R, 1) of the first in the whole vocabulary."""
    values, ids = _most_likely(logits, size)
    if all(row.top_k for row in rows):
        return [values, ids]
    temperature = torch.tensor([[row.temperature] for row in rows], dtype=logits.dtype).to(logits.device)  # (R, 1)
    return [values, ids, torch.softmax(logits / temperature, dim=-1).gather(1, ids[:, :1])]


def _pick(
    arrays: list[np.ndarray], rows: list[RowSampler], uniforms: list[float], complete: bool
) -> tuple[list[int], list[bool]]:
    """Draw from lists of the most likely tokens: ids, and which of them are right; the others want longer lists.

    `complete`: the lists hold the whole vocabulary.
    """
    values, ids = _ties_by_id(arrays[0], arrays[1])  # (R, size)
    size = values.shape[1]
    every = np.arange(len(rows))
    with np.errstate(all="ignore"):  # NaN
        temperature = np.array([row.temperature for row in rows])
        weights = (np.exp((values - values[:, :1]) / temperature[:, None]) * _WEIGHT).astype(np.int64)
    cumulated = weights.cumsum(axis=1)
    n_kept = np.array([min(row.top_k or size, size) for row in rows])
    enough = np.ones(len(rows), dtype=bool)
    top_p = np.array([row.top_p for row in rows])
    if (top_p < 1).any():
        total = cumulated[every, n_kept - 1]
        if len(arrays) == 3:
            total = np.where([row.top_k is None for row in rows], np.rint(_WEIGHT / arrays[2][:, 0]), total)
        reached = cumulated >= np.where(top_p < 1, top_p * total, np.inf)[:, None]
        enough = reached[:, -1] | np.array([row.top_k is not None for row in rows]) | np.isnan(values[:, 0])
        n_kept = np.where(reached.any(axis=1), np.minimum(n_kept, reached.argmax(axis=1) + 1), n_kept)
    target = (uniforms * cumulated[every, n_kept - 1]).astype(np.int64)
    place = np.minimum((cumulated <= target[:, None]).sum(axis=1), n_kept - 1)
    # Beside the last of the list there may be others as likely, with lower ids, that are not on it.
    sure = enough & (values[every, place] != values[:, -1]) | complete
    return ids[every, place].tolist(), sure.tolist()


def _with_logprobs(logits: Tensor, tokens: list[int], n_top: list[int]) -> list[Sampled]:
    """The tokens with their log-probabilities, and those of the `n_top` most likely of their rows."""
    n_vocab = logits.size(1)
    chosen = logits.gather(1, torch.tensor(tokens).to(logits.device)[:, None])  # (R, 1)
    norm = logits.logsumexp(dim=-1, keepdim=True)  # (R, 1)
    wanted = [min(n, n_vocab) for n in n_top]
    size = min(max(wanted) + _MARGIN, n_vocab) if any(wanted) else 0
    while True:
        arrays = _to_host([chosen, norm, *_most_likely(logits, size)])
        values, ids = _ties_by_id(arrays[2], arrays[3])  # (R, size)
        if size in (0, n_vocab) or all(n == 0 or row[n - 1] != row[-1] for n, row in zip(wanted, values, strict=True)):
            break
        size = min(n_vocab, size * _GROWTH)
    with np.errstate(invalid="ignore"):  # rows of infinities
        logprobs, top = (arrays[0] - arrays[1])[:, 0].tolist(), (values - arrays[1]).tolist()
    tops = zip(ids.tolist(), top, wanted, strict=True)
    return [
        Sampled(token, logprob, tuple(zip(map(int, top_ids[:n]), row_top[:n], strict=True)))
        for token, logprob, (top_ids, row_top, n) in zip(tokens, logprobs, tops, strict=True)
    ]


def _ties_by_id(values: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows in falling order, with equal values put in the order of their ids."""
    if not (values[:, 1:] == values[:, :-1]).any():
        return values, ids
    order = np.lexsort((ids, -values), axis=-1)
    return np.take_along_axis(values, order, axis=1), np.take_along_axis(ids, order, axis=1)


def _take(logits: Tensor, rows: list[int]) -> Tensor:
    return logits if len(rows) == len(logits) else logits[rows]


def _to_host(tensors: list[Tensor]) -> list[np.ndarray]:
    """The tensors as arrays, in one transfer; from another device as doubles, which hold ids exactly."""
    if tensors[0].device.type == "cpu":
        return [tensor.numpy() for tensor in tensors]
    flat = torch.cat([tensor.double().flatten() for tensor in tensors]).cpu().numpy()
    parts = np.split(flat, np.cumsum([tensor.numel() for tensor in tensors])[:-1])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

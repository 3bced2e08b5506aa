"""From logits to the next token, one random stream per row."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def row_generator(seed: int, sample: int) -> torch.Generator:
    """The random numbers of one sample of a request, on the CPU.

    They depend on nothing else, so a sample comes out the same alone and in company. Two samples of one seed never
    share a state, although torch uses only 32 bits of it.
    """
    base = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=4).digest(), "little")
    return torch.Generator().manual_seed((base + sample * 0x9E3779B9) % 2**32)  # an odd factor keeps samples apart


def probabilities(logits: Tensor, temperature: float, top_k: int | None) -> tuple[Tensor, Tensor | None]:
    """What is drawn from: logits (R, V) -> probabilities (R, k) with the token ids (R, k) they belong to.

    With `top_k` the k largest, in falling order, otherwise all V and None for the ids. `temperature` is above 0.
    """
    ids = None
    if top_k:
        logits, ids = logits.topk(min(top_k, logits.size(-1)), dim=-1)  # (R, k)
    return torch.softmax(logits / temperature, dim=-1), ids


def sample(logits: Tensor, temperature: float, top_k: int | None, generators: list[torch.Generator]) -> Tensor:
    """One token id per row, (R,) int64 on the device of the logits (R, V). Temperature 0 takes the largest logit.

    Otherwise each row's generator gives one uniform number, which picks the token by the cumulated probabilities; so
    the cost of the random numbers does not grow with the vocabulary. ValueError for a negative temperature or top_k.
    """
    if temperature < 0 or (top_k or 0) < 0:
        raise ValueError(f"temperature {temperature} and top_k {top_k} must not be negative")
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs, ids = probabilities(logits, temperature, top_k)
    uniform = torch.cat([torch.rand(1, generator=generator) for generator in generators])  # (R,) in [0, 1)
    cumulated = probs.cumsum(dim=-1)  # (R, k)
    total = cumulated[:, -1:]
    # Rounding must not lift the target to the total, where the last token would be picked even at probability 0.
    target = torch.minimum(uniform.to(total)[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    picked = torch.searchsorted(cumulated, target, right=True)  # (R, 1)
    return (picked if ids is None else ids.gather(-1, picked)).squeeze(-1)

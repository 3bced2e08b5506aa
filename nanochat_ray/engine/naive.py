"""Generation without a cache: slow and simple, what the engine is tested against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from nanochat_ray.model.gpt import GPT


@torch.inference_mode()
def naive_generate(
    model: GPT, ids: Sequence[int], max_tokens: int, temperature: float = 1.0, top_k: int | None = None, seed: int = 42
) -> Iterator[int]:
    """`max_tokens` ids after `ids`, each by a whole forward pass. No tools, no stop.

    With `top_k`, all ids as likely as the k-th stay in.
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    idx = torch.tensor([list(ids)], device=model.device)  # (1, T)
    for _ in range(max_tokens):
        logits = model(idx, at=torch.tensor([-1], device=model.device))  # (1, V)
        if temperature == 0:
            token = logits.argmax(dim=-1, keepdim=True)
        else:
            logits = logits / temperature
            if top_k:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -torch.inf)
            token = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
        idx = torch.cat([idx, token], dim=1)
        yield int(token)

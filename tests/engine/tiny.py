"""A tokenizer of bytes and a small random network, in double precision so that tokens can be compared exactly."""

from __future__ import annotations

import torch

from nanochat_ray.config import ModelConfig
from nanochat_ray.engine.kv_cache import KVCache
from nanochat_ray.model.gpt import GPT
from nanochat_ray.text.tokenizer import Tokenizer

CONTEXT = 192


def byte_tokenizer() -> Tokenizer:
    return Tokenizer.from_tokens([bytes([byte]) for byte in range(256)])


def tiny_model(window_pattern: str = "SL", n_layer: int = 3, n_kv_head: int = 1, context: int = CONTEXT) -> GPT:
    """Every tensor is random, so that smear, gates and scalars all count."""
    config = ModelConfig(
        sequence_len=context,
        vocab_size=265,
        n_layer=n_layer,
        n_head=2,
        n_kv_head=n_kv_head,
        n_embd=32,
        window_pattern=window_pattern,
    )
    model = GPT.build(config, compute_dtype=torch.float64)
    generator = torch.Generator().manual_seed(n_layer)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.size(1) ** -0.5, generator=generator)
            else:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model.double()


def random_prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (length,), generator=generator).tolist()


class Script:
    """Stands in for a network that answers each prompt it reads, one row at a time, with the next of its replies."""

    device = torch.device("cpu")
    compute_dtype = torch.float32

    def __init__(self, replies: list[list[int]], context: int = CONTEXT) -> None:
        self.config = ModelConfig(sequence_len=context, vocab_size=265, n_layer=1, n_head=1, n_kv_head=1, n_embd=24)
        self.replies = replies
        self.prompts: list[list[int]] = []

    def __call__(self, idx: torch.Tensor, cache: KVCache, last_only: bool) -> torch.Tensor:
        if cache.lengths == [0]:
            self.prompts.append(idx[0].tolist())
        cache.advance(idx)
        step = cache.lengths[0] - len(self.prompts[-1])
        logits = torch.zeros(1, 1, self.config.vocab_size)
        logits[0, 0, self.replies[len(self.prompts) - 1][step]] = 100.0
        return logits

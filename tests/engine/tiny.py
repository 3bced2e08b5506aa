"""A tokenizer of bytes and a small random network, in double precision so that tokens can be compared exactly."""

from __future__ import annotations

import torch

from nanochat_ray.config import ModelConfig
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.kv_cache import Step
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
    """Stands in for a network that answers each prompt it reads, one at a time, with the next of its replies.

    For an engine without prefix cache whose chunks take whole prompts.
    """

    device = torch.device("cpu")
    compute_dtype = torch.float32

    def __init__(self, replies: list[list[int]], context: int = CONTEXT) -> None:
        self.config = ModelConfig(sequence_len=context, vocab_size=265, n_layer=1, n_head=1, n_kv_head=1, n_embd=24)
        self.replies = replies
        self.prompts: list[list[int]] = []

    def __call__(self, idx: torch.Tensor, cache: Step, at: torch.Tensor) -> torch.Tensor:
        [(row, tokens)] = cache.parts
        if row.n == 0:
            self.prompts.append(list(tokens))
        step = row.n + len(tokens) - len(self.prompts[-1])
        logits = torch.zeros(len(at), self.config.vocab_size)
        logits[:, self.replies[len(self.prompts) - 1][step]] = 100.0
        return logits


def scripted_engine(script: Script) -> Engine:
    return Engine(script, byte_tokenizer(), prefix_cache=False)  # type: ignore[arg-type]

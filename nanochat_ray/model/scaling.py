"""What the depth dial decides: sizes, FLOPs, batch, learning-rate scale, weight decay and horizon. Numbers only.

The rules are nanochat's (SPEC 1, section 9): hyper-parameters are tuned at depth 12 and carried to other depths.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final

from nanochat_ray.config import ModelConfig, PretrainSettings, check_total_batch_size
from nanochat_ray.model.attention import windows_of

REFERENCE_DEPTH = 12
REFERENCE_BATCH_TOKENS = 2**19
# The best batch grows with the data as a power law: arXiv:2505.13738.
BATCH_EXPONENT = 0.383

# bf16 FLOP/s, dense, by the part of the device's name; the first match wins. Source: the makers' data sheets.
PEAK_FLOPS: Final = (
    (r"gb200|grace blackwell", 2.5e15),
    (r"b200", 2.25e15),
    (r"b100", 1.8e15),
    (r"h200.*(nvl|pcie)", 836e12),
    (r"h200", 989e12),
    (r"h100.*nvl", 835e12),
    (r"h100.*pcie", 756e12),
    (r"h100", 989e12),
    (r"h800.*nvl", 989e12),
    (r"h800", 756e12),
    (r"a100|a800", 312e12),
    (r"a40", 149.7e12),
    (r"a30", 165e12),
    (r"l40s", 362e12),
    (r"l4", 121e12),
    (r"mi355", 2.5e15),
    (r"mi325|mi300x", 1.3074e15),
    (r"mi300a", 980.6e12),
    (r"mi250x", 383e12),
    (r"mi250", 362.1e12),
    (r"5090", 209.5e12),
    (r"4090", 165.2e12),
    (r"3090", 71e12),
)


@dataclass(frozen=True)
class Plan:
    """Everything about a pretraining run that follows from its settings; the same for any number of workers."""

    config: ModelConfig
    param_counts: dict[str, int]  # by kind, with "total"
    scaling_params: int  # the count that tokens are measured against
    flops_per_token: int
    target_tokens: int  # the horizon by tokens per scaling parameter; batch and weight decay follow it
    total_batch_size: int  # tokens per optimizer step
    num_iterations: int  # optimizer steps
    batch_lr_scale: float  # factor on learning rates
    weight_decay: float  # of the Muon matrices, scaled

    @property
    def rows_per_step(self) -> int:
        return self.total_batch_size // self.config.sequence_len

    @property
    def total_tokens(self) -> int:
        """Tokens that the run really trains on."""
        return self.total_batch_size * self.num_iterations

    @property
    def total_flops(self) -> int:
        return self.flops_per_token * self.total_tokens

    def grad_accum_steps(self, device_batch_size: int, world_size: int) -> int:
        """Micro-steps of the rank with the most rows."""
        rows = -(-self.rows_per_step // world_size)
        return -(-rows // device_batch_size)


def model_config_for(settings: PretrainSettings, vocab_size: int, depth: int | None = None) -> ModelConfig:
    """The network of a depth (the settings' own by default): width grows with depth, in whole heads."""
    depth = settings.depth if depth is None else depth
    n_head = -(-depth * settings.aspect_ratio // settings.head_dim)
    return ModelConfig(
        sequence_len=settings.max_seq_len,
        vocab_size=vocab_size,
        n_layer=depth,
        n_head=n_head,
        n_kv_head=n_head,
        n_embd=n_head * settings.head_dim,
        window_pattern=settings.window_pattern,
    )


def param_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters by kind: wte, value_embeds, lm_head, transformer_matrices, scalars, and their total."""
    table = config.padded_vocab_size * config.n_embd
    kv_channels = config.n_kv_head * config.head_dim
    n_value_embeds = -(-config.n_layer // 2)
    attention = 2 * config.n_embd**2 + 2 * config.n_embd * kv_channels
    mlp = 8 * config.n_embd**2
    gates = n_value_embeds * config.n_kv_head * config.value_gate_channels
    counts = {
        "wte": table,
        "value_embeds": n_value_embeds * config.padded_vocab_size * kv_channels,
        "lm_head": table,
        "transformer_matrices": config.n_layer * (attention + mlp) + gates,
        # Two scalars per layer, the smear gate, and one scale each for smear and backout.
        "scalars": 2 * config.n_layer + config.smear_channels + 2,
    }
    return counts | {"total": sum(counts.values())}


def scaling_params(config: ModelConfig) -> int:
    """Parameters that tokens are counted against: the matrices of the blocks and the output layer."""
    counts = param_counts(config)
    return counts["transformer_matrices"] + counts["lm_head"]


def matmul_params(config: ModelConfig) -> int:
    """Parameters that take part in a matrix product; tables and scalars do not."""
    return scaling_params(config) + config.smear_channels


def flops_per_token(config: ModelConfig) -> int:
    """Training FLOPs per token: 6 per matrix parameter, 12 per channel and position seen in attention.

    Every window is counted full, also at the beginning of a row.
    """
    seen = sum(min(window, config.sequence_len) for window in windows_of(config))
    return 6 * matmul_params(config) + 12 * config.n_embd * seen


def decode_flops(config: ModelConfig, context_len: int) -> int:
    """FLOPs of one new token after `context_len` positions."""
    seen = sum(min(window, context_len) for window in windows_of(config))
    return 2 * matmul_params(config) + 4 * config.n_embd * seen


def prefill_flops(config: ModelConfig, n_tokens: int) -> int:
    """FLOPs of a prompt: a triangle of pairs inside the window, then a band of the window's width."""
    pairs = 0
    for window in windows_of(config):
        w = min(window, n_tokens)
        pairs += w * (w + 1) // 2 + (n_tokens - w) * w
    return 2 * matmul_params(config) * n_tokens + 4 * config.n_embd * pairs


def kv_bytes_per_token(config: ModelConfig, bytes_per_value: int) -> int:
    """Bytes of keys and values stored for each position."""
    return 2 * config.n_layer * config.n_kv_head * config.head_dim * bytes_per_value


def kv_read_bytes(config: ModelConfig, context_len: int, bytes_per_value: int) -> int:
    """Bytes of keys and values read to decode one token after `context_len` positions."""
    seen = sum(min(window, context_len) for window in windows_of(config))
    return 2 * config.n_kv_head * config.head_dim * bytes_per_value * seen


def plan_training(settings: PretrainSettings, vocab_size: int) -> Plan:
    """Batch, horizon, learning-rate scale and weight decay of a pretraining run.

    Batch and weight decay follow the tokens-per-parameter horizon also where `num_iterations` or `target_flops` cuts
    the run elsewhere; the ratio cancels out of both. Raises ValueError if rows do not divide the batch or if the
    horizon is shorter than one step.
    """
    config = model_config_for(settings, vocab_size)
    counts, n_params, flops = param_counts(config), scaling_params(config), flops_per_token(config)
    ratio = settings.target_param_data_ratio
    if ratio is None:
        ratio = float(PretrainSettings.model_fields["target_param_data_ratio"].default)
    target_tokens = int(ratio * n_params)
    reference_tokens = ratio * scaling_params(model_config_for(settings, vocab_size, depth=REFERENCE_DEPTH))
    data_scale = target_tokens / reference_tokens

    check_total_batch_size(settings.total_batch_size, config.sequence_len)
    batch = settings.total_batch_size
    if batch is None:
        power = round(math.log2(REFERENCE_BATCH_TOKENS * data_scale**BATCH_EXPONENT))
        # Only a sequence length that is no power of two moves the batch off one.
        batch = max(1, round(2**power / config.sequence_len)) * config.sequence_len
    batch_scale = math.sqrt(batch / REFERENCE_BATCH_TOKENS)

    num_iterations = _num_iterations(settings, target_tokens, flops, batch)
    return Plan(
        config=config,
        param_counts=counts,
        scaling_params=n_params,
        flops_per_token=flops,
        target_tokens=target_tokens,
        total_batch_size=batch,
        num_iterations=num_iterations,
        # The square root is AdamW's rule (arXiv:2205.10287); nanochat applies it to Muon as well.
        batch_lr_scale=batch_scale,
        # Keeps batch / (lr * decay * tokens) as it is at the reference depth: arXiv:2405.13698.
        weight_decay=settings.weight_decay * batch_scale / data_scale,
    )


def _num_iterations(settings: PretrainSettings, target_tokens: int, flops: int, batch: int) -> int:
    if settings.num_iterations is not None:
        return settings.num_iterations
    if settings.target_flops is not None:
        steps, horizon = round(settings.target_flops / (flops * batch)), f"target_flops {settings.target_flops:g}"
    else:
        steps = target_tokens // batch
        horizon = f"target_param_data_ratio {settings.target_param_data_ratio:g} ({target_tokens:,} tokens)"
    if steps < 1:
        raise ValueError(
            f"{horizon} is less than one step of {batch:,} tokens ({flops * batch:.3g} FLOPs); "
            "raise it, or set num_iterations or a smaller total_batch_size"
        )
    return steps


def peak_flops(device_name: str) -> float:
    """Peak bf16 FLOP/s of a device by the name CUDA gives it; infinity if unknown, so that a share of it is 0."""
    for pattern, flops in PEAK_FLOPS:
        # A further digit is another device: an RTX A4000 is no A40, an L40 no L4.
        if re.search(rf"(?:{pattern})(?!\d)", device_name.lower()):
            return flops
    return math.inf

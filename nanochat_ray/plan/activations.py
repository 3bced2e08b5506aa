"""Memory that one micro-step takes besides parameters, gradients and optimizer: what autograd keeps, and the loss.

The formulas follow the code of model/gpt.py, attention.py, ops.py and fp8.py line by line, without torch.compile, which
may keep less (it recomputes what is cheap) and is not modelled. tests/plan/ holds them against autograd itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanochat_ray.config import ModelConfig
from nanochat_ray.model.attention import QUERY_BLOCK, windows_of
from nanochat_ray.model.fp8 import MULTIPLE, NARROWEST
from nanochat_ray.model.gpt import has_value_embed
from nanochat_ray.model.ops import CHUNK_LOGITS_CPU, CHUNK_LOGITS_GPU

FP32_BYTES = 4


@dataclass(frozen=True)
class Compute:
    """What a micro-step is computed in."""

    dtype_bytes: int  # of the compute dtype: 2 or 4
    fp8: str | None = None  # the recipe
    on_cpu: bool = False  # attention there keeps its probabilities, and the loss works on smaller chunks


@dataclass(frozen=True)
class StepBytes:
    """Bytes of one micro-step at its greatest."""

    activations: int  # kept from the forward pass for the backward pass, without what is listed below
    weight_casts: int  # the weights in the compute dtype or fp8, which products keep for the backward pass
    logits: int  # chunks of logits, the output layer's gradient and its weight's cast, while the loss is computed
    backward: int  # what the backward pass of one layer takes at once, besides parameters' gradients


def step_bytes(config: ModelConfig, rows: int, compute: Compute) -> StepBytes:
    """The bytes of a micro-step of `rows` rows of the whole context."""
    layers = sum(_layer_bytes_per_token(config, layer, compute) for layer in range(config.n_layer))
    tokens = rows * config.sequence_len
    attention = sum(_probabilities_bytes(config, left) for left in windows_of(config)) * rows * compute.dtype_bytes
    kept = tokens * (layers + _outer_bytes_per_token(config, compute)) + (attention if compute.on_cpu else 0)
    return StepBytes(
        activations=kept + _tables_bytes(config, compute),
        weight_casts=_weight_casts(config, compute),
        logits=_loss_bytes(config, tokens, compute),
        backward=_backward_bytes(config, tokens, compute),
    )


def _layer_bytes_per_token(c: ModelConfig, layer: int, compute: Compute) -> int:
    b, C, K, H = compute.dtype_bytes, c.n_embd, c.n_kv_head * c.head_dim, c.n_head
    norms = 2 * (b * C + FP32_BYTES)  # y and its inverse length, before attention and before the MLP
    stream = b * C if layer else 0  # the block's input, for `mix`; the first one's is counted outside
    heads = b * (C + K) + FP32_BYTES * (H + c.n_kv_head)  # queries and keys after their norms
    value = b * K
    output = b * C
    wide_mlp = 2 * 4 * b * C  # before and after the square
    if has_value_embed(c, layer):
        # The embedding that is added; the gate, before and after its scale.
        heads += b * K + 2 * b * c.n_kv_head
    if compute.on_cpu:
        # Queries, keys and values once more, laid out by head (with one head they are no copies).
        value = b * K if c.n_kv_head > 1 else 0
        heads += b * (C + K) if c.n_kv_head > 1 else b * C
    else:
        output += FP32_BYTES * H  # the softmax's denominators
    if compute.fp8 == "tensorwise":
        # Inputs of the products in fp8, one copy each; the square itself is not needed any more.
        wide_mlp = 4 * b * C + _fp8_saved(C, 4 * C, compute) + _fp8_saved(4 * C, C, compute)
        if not _fits(4 * C, C):
            wide_mlp += 4 * b * C
        output += _fp8_saved(C, C, compute)
        heads += _fp8_saved(C, C, compute) + 2 * _fp8_saved(C, K, compute)
    return norms + stream + heads + value + output + wide_mlp


def _fits(n_in: int, n_out: int) -> bool:
    return min(n_in, n_out) >= NARROWEST and n_in % MULTIPLE == 0 and n_out % MULTIPLE == 0


def _fp8_saved(n_in: int, n_out: int, compute: Compute) -> int:
    return n_in if _fits(n_in, n_out) else 0


def _probabilities_bytes(c: ModelConfig, left: int) -> int:
    """Elements of one row's attention probabilities in a layer, as `BlockAttention` keeps them."""
    T = c.sequence_len
    wide = left >= T - 1
    found = 0
    for first in range(0, T, QUERY_BLOCK):
        end = min(first + QUERY_BLOCK, T)
        found += (end - first) * (end - (0 if wide else max(0, first - left)))
    return found * c.n_head


def _outer_bytes_per_token(c: ModelConfig, compute: Compute) -> int:
    """Kept outside of the layers: embedding, smear, the first and the last stream, the final norm, the loss."""
    b, C = compute.dtype_bytes, c.n_embd
    embedding = b * C + FP32_BYTES
    smear = b * C + 2 * b  # the embeddings one place later, the gate
    ids = 4 + 8  # token ids, targets
    # First stream, last stream, final norm, and the gradient that the loss hands back.
    return embedding + smear + ids + 4 * b * C + FP32_BYTES


def _tables_bytes(c: ModelConfig, compute: Compute) -> int:
    rotary = 2 * c.sequence_len * c.head_dim * FP32_BYTES
    short = any(left < c.sequence_len - 1 for left in windows_of(c))
    return rotary + (c.sequence_len**2 * compute.dtype_bytes if short and not compute.on_cpu else 0)


def _weight_casts(c: ModelConfig, compute: Compute) -> int:
    """Bytes of the blocks' weights in the format of the products; fp32 products take the weights themselves."""
    K = c.n_kv_head * c.head_dim
    if compute.dtype_bytes == FP32_BYTES or compute.fp8 == "rowwise":
        return 0
    shapes = [(c.n_embd, c.n_embd)] * 2 + [(K, c.n_embd)] * 2 + [(4 * c.n_embd, c.n_embd), (c.n_embd, 4 * c.n_embd)]
    each = sum(m * n * (1 if compute.fp8 and _fits(n, m) else compute.dtype_bytes) for m, n in shapes)
    return c.n_layer * each


def _loss_bytes(c: ModelConfig, tokens: int, compute: Compute) -> int:
    chunk_logits = CHUNK_LOGITS_CPU if compute.on_cpu else CHUNK_LOGITS_GPU
    chunk = min(tokens, max(1, chunk_logits // c.vocab_size)) * c.vocab_size
    n_chunks = -(-tokens * c.vocab_size // max(1, chunk))
    b, head = compute.dtype_bytes, c.padded_vocab_size * c.n_embd
    # Sigmoids, capped logits and probabilities in fp32, logits as they were; from the second chunk on the sigmoids and
    # probabilities of the one before are still there.
    per_logit = b + 3 * FP32_BYTES + (2 * FP32_BYTES if n_chunks > 1 else 0)
    cast = head * b if b != FP32_BYTES else 0
    if compute.fp8 and _fits(c.n_embd, c.padded_vocab_size):
        cast = 2 * head + tokens * c.n_embd  # the weight twice, as it is and transposed; the stream
    return per_logit * chunk + cast + FP32_BYTES * head


def _backward_bytes(c: ModelConfig, tokens: int, compute: Compute) -> int:
    """The MLP's gradients: of the stream, the square and what was squared; and those of one weight with its cast."""
    b = compute.dtype_bytes
    weight = 4 * c.n_embd**2 * (FP32_BYTES + (b if b != FP32_BYTES else 0))
    return tokens * c.n_embd * (1 + 4 + 4) * b + weight

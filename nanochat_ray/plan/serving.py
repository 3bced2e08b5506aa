"""What a network needs to answer: memory of weights and streams, and what bounds a decoding step."""

from __future__ import annotations

from dataclasses import dataclass

from nanochat_ray.config import ModelConfig
from nanochat_ray.engine.engine import KV_FRAC_CPU, KV_FRAC_GPU
from nanochat_ray.engine.kv_cache import kinds_of, pages_needed
from nanochat_ray.model.scaling import decode_flops, kv_bytes_per_token, kv_read_bytes, matmul_params
from nanochat_ray.plan.hardware import Device
from nanochat_ray.plan.memory import RESERVE_CPU_BYTES, RESERVE_GPU_BYTES
from nanochat_ray.plan.state import FP32_BYTES, Shapes

BLOCK_SIZE = 16  # positions, as the engine has it
CHUNK_TOKENS = 256  # prompt tokens of a step, as the server has it
MAX_ROWS = 64  # streams that are decoded together, as the server and the engine have it
COPIES = 3  # a step reads the pages, writes them side by side and reads those


@dataclass(frozen=True)
class Serving:
    """One replica on one device. Exact but for `streams` (what else takes memory is modelled) and the bounds."""

    context: int  # tokens of a stream
    weight_bytes: int  # the fp32 weights, and their copies in the compute dtype that inference keeps
    kv_bytes_per_token: int  # before windows let go of anything
    kv_bytes_per_stream: int  # the most that a stream of `context` tokens holds at a time
    block_bytes: int  # all layers' pages of the same positions
    streams: int | None  # at that context, of the memory that the engine takes
    max_rows: int  # of them that are decoded together
    step_bytes_one: int  # that a decoding step of one stream must read
    step_s_one: float | None
    tok_per_s_all: float | None  # of all streams that are decoded together, at the bound


def serving(
    config: ModelConfig, shapes: Shapes, device: Device, dtype_bytes: int, context: int, max_rows: int = MAX_ROWS
) -> Serving:
    """A replica that answers streams of `context` tokens (at most the configured length), `max_rows` at a time."""
    context = min(context, config.sequence_len)
    lefts, layers = kinds_of(config)
    page = 2 * config.n_kv_head * BLOCK_SIZE * config.head_dim * dtype_bytes
    held = page * pages_needed(lefts, [len(those) for those in layers], context, CHUNK_TOKENS, BLOCK_SIZE)
    casts = matmul_params(config) * dtype_bytes if dtype_bytes != FP32_BYTES else 0
    weights = shapes.weight_bytes + casts
    streams = None
    if device.memory_bytes:
        reserve, frac = (RESERVE_CPU_BYTES, KV_FRAC_CPU) if device.on_cpu else (RESERVE_GPU_BYTES, KV_FRAC_GPU)
        streams = max(0, int((device.memory_bytes - weights - reserve) * frac)) // held
    products = matmul_params(config) * dtype_bytes

    def bound_s(n: int) -> float | None:
        if not device.bandwidth or not device.peak_flops:
            return None
        moved = products + n * COPIES * kv_read_bytes(config, context, dtype_bytes)
        return max(moved / device.bandwidth, n * decode_flops(config, context) / device.peak_flops)

    rows = min(streams, max_rows) if streams else 0
    all_s = bound_s(rows) if rows else None
    return Serving(
        context, weights, kv_bytes_per_token(config, dtype_bytes), held, page * config.n_layer, streams, max_rows,
        products + COPIES * kv_read_bytes(config, context, dtype_bytes), bound_s(1),
        rows / all_s if all_s else None,
    )

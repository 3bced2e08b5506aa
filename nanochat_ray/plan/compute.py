"""How fast a rank trains: published runs as anchors on GPUs, this machine's matrix products on a CPU.

No run of this project on a GPU has been measured yet. The anchors are nanochat's own runs of the same network, whose
attention skips what a window hides; ours computes whole squares there (model/attention.py), so the lower figure, with
which times are planned, adds that work.
"""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from typing import Final

import torch

from nanochat_ray.config import ModelConfig
from nanochat_ray.model.attention import windows_of
from nanochat_ray.model.muon import POLAR_EXPRESS
from nanochat_ray.model.scaling import flops_per_token
from nanochat_ray.plan.hardware import Device

# GPU, fp8, share of the bf16 peak, source. Steps, tokens and seconds are the source's, FLOPs those of this network.
ANCHORS: Final = (
    (r"a100|a800", False, 0.74, "nanochat pull request 147, 8 A100, October 2025, an earlier network"),
    (r"", True, 0.59, "nanochat's d24 in fp8, 8 H100: 5,568 steps of 1,048,576 tokens in 99 minutes, 14 March 2026"),
    (r"", False, 0.50, "nanochat's d24 in bf16, 8 H100: 4.33e19 FLOPs in 10,949 s, 29 January 2026"),
)
ANCHOR_WIDTH = 1536  # channels of d24
HALF_WIDTH = 360  # channels at which half of a wide network's share is reached: d12 takes minutes there, not less
MASKED_ATTENTION_FRAC = 0.25  # of the peak, assumed for attention with a mask
FP32_ON_TENSOR_CORES_FRAC = 0.5  # of the bf16 peak: TF32
# dev/LOG.md, 2026-11-20: a step's share of this CPU's matrix products, depth 4 with 256 channels.
CPU_SHARE: Final = {2: 0.493, 4: 0.696}
CPU_ANCHOR_WIDTH, CPU_HALF_WIDTH = 256, 64
PRODUCT_SIZE = 1024
MEASURE_TRIES, MEASURE_S = 4, 0.2


@dataclass(frozen=True)
class Speed:
    """Of one rank. `flops` is what training is planned with, `best_flops` what the source of the estimate reached."""

    flops: float | None
    best_flops: float | None
    peak_flops: float | None
    mark: str
    source: str

    @property
    def mfu(self) -> float | None:
        """Share of the peak."""
        return self.flops / self.peak_flops if self.flops and self.peak_flops else None

    @property
    def best_mfu(self) -> float | None:
        return self.best_flops / self.peak_flops if self.best_flops and self.peak_flops else None


def expected_speed(
    config: ModelConfig, device: Device, dtype_bytes: int, fp8: bool, mfu_percent: float | None = None
) -> Speed:
    """FLOP/s of one rank while it trains; `mfu_percent` is the person's own figure."""
    peak = device.peak_flops
    if peak is None:
        return Speed(None, None, None, "unknown", f"no peak known for {device.name}: take a --gpu-type that is known")
    if mfu_percent is not None:
        flops = peak * mfu_percent / 100
        return Speed(flops, flops, peak, "measured", "--mfu, your own figure")
    if device.on_cpu:
        share = CPU_SHARE[dtype_bytes] * _narrow(config.n_embd, CPU_ANCHOR_WIDTH, CPU_HALF_WIDTH)
        source = "this machine's matrix products, measured now, times the share that steps reach (dev/LOG.md)"
        return Speed(peak * share, peak * share, peak, "modelled", source)
    share, source = next(
        (frac, text) for pattern, eight, frac, text in ANCHORS
        if eight == fp8 and re.search(pattern, device.name.lower())
    )
    share *= _narrow(config.n_embd, ANCHOR_WIDTH, HALF_WIDTH)
    if dtype_bytes == 4 and device.bf16:
        share *= FP32_ON_TENSOR_CORES_FRAC
    best = peak * share
    per_token = flops_per_token(config)
    seconds = per_token / best + masked_flops(config) / (peak * MASKED_ATTENTION_FRAC)
    return Speed(per_token / seconds, best, peak, "modelled", source)


def _narrow(width: int, anchor: int, half: int) -> float:
    """Narrow networks fill a device less; wider ones than the anchor are taken to fill it as much."""
    width = min(width, anchor)
    return width / (width + half) * (anchor + half) / anchor


def masked_flops(config: ModelConfig) -> int:
    """FLOPs per token that windowed layers compute for a mask to hide, forward and backward."""
    T = config.sequence_len
    hidden = sum(T - left for left in windows_of(config) if left < T - 1)
    return 12 * config.n_embd * hidden


def optimizer_flops(config: ModelConfig) -> int:
    """FLOPs of Muon's matrix products in one step, all matrices together."""
    C, K = config.n_embd, config.n_kv_head * config.head_dim
    shapes = [(C, C)] * 2 + [(K, C)] * 2 + [(4 * C, C)] * 2
    rounds = len(POLAR_EXPRESS)
    return config.n_layer * sum(rounds * (4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3) for s in shapes)


def measured_product_flops(dtype: torch.dtype) -> float:
    """FLOP/s of matrix products on this machine, the best of a few; takes about a tenth of a second."""
    factors = [torch.ones(PRODUCT_SIZE, PRODUCT_SIZE, dtype=dtype) for _ in range(2)]
    best, started = math.inf, time.perf_counter()
    for _ in range(MEASURE_TRIES):
        begun = time.perf_counter()
        torch.mm(*factors)
        best = min(best, time.perf_counter() - begun)
        if time.perf_counter() - started > MEASURE_S:
            break
    return 2 * PRODUCT_SIZE**3 / best

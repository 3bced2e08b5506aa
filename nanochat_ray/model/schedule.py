"""Schedules: learning rate, Muon momentum and Muon weight decay as plain functions of the step or of progress.

Every learning-rate function returns a multiplier of a group's `initial_lr`. Source: nanochat's schedules as recorded in
tests/parity/data/schedules.json.
"""

from __future__ import annotations

import math

MOMENTUM_START = 0.85
MOMENTUM_PEAK = 0.97
MOMENTUM_END = 0.90
MOMENTUM_RAMP_STEPS = 400

SFT_MOMENTUM_PEAK = 0.95
SFT_MOMENTUM_RAMP_STEPS = 300

# Keeps the first multiplier of a warmup above zero.
SFT_WARMUP_OFFSET = 1e-8


def _mix(start: float, end: float, frac: float) -> float:
    return (1 - frac) * start + frac * end


def lr_multiplier(
    step: int, num_iterations: int, warmup_steps: int, warmdown_ratio: float, final_lr_frac: float
) -> float:
    """Pretraining: up over `warmup_steps`, flat, then down linearly over the last `warmdown_ratio` of the run.

    The warmup wins where both apply; `final_lr_frac` itself belongs to step `num_iterations`, one past the last.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    warmdown_steps = round(warmdown_ratio * num_iterations)
    if step <= num_iterations - warmdown_steps:
        return 1.0
    left = (num_iterations - step) / warmdown_steps
    return left + (1 - left) * final_lr_frac


def muon_momentum(step: int, num_iterations: int, warmdown_ratio: float) -> float:
    """Pretraining: up over the first 400 steps, flat, then down over the learning rate's warmdown.

    The ramp wins where both apply, so a run whose warmdown starts before step 400 jumps there.
    """
    if step < MOMENTUM_RAMP_STEPS:
        return _mix(MOMENTUM_START, MOMENTUM_PEAK, step / MOMENTUM_RAMP_STEPS)
    warmdown_steps = round(warmdown_ratio * num_iterations)
    start = num_iterations - warmdown_steps
    if warmdown_steps == 0 or step < start:
        return MOMENTUM_PEAK
    return _mix(MOMENTUM_PEAK, MOMENTUM_END, (step - start) / warmdown_steps)


def muon_weight_decay(step: int, num_iterations: int, weight_decay: float) -> float:
    """Pretraining: half a cosine from `weight_decay` to zero."""
    return weight_decay * 0.5 * (1 + math.cos(math.pi * step / num_iterations))


def sft_lr_multiplier(progress: float, warmup_ratio: float, warmdown_ratio: float, final_lr_frac: float) -> float:
    """SFT: the same shape over progress, the share of the run that is done; outside of 0 to 1 it counts as 0 or 1."""
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup_ratio:
        return (progress + SFT_WARMUP_OFFSET) / warmup_ratio
    if progress <= 1 - warmdown_ratio:
        return 1.0
    return _mix(1.0, final_lr_frac, (progress - (1 - warmdown_ratio)) / warmdown_ratio)


def sft_muon_momentum(step: int) -> float:
    """SFT: up over the first 300 steps, then flat."""
    return _mix(MOMENTUM_START, SFT_MOMENTUM_PEAK, min(step / SFT_MOMENTUM_RAMP_STEPS, 1.0))


def rl_lr_multiplier(step: int, num_steps: int) -> float:
    """RL: down linearly, above zero at the last step."""
    return 1.0 - step / num_steps

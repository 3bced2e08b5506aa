"""The main job's presets: which settings a machine gets when nobody names any. Imports neither torch nor Ray."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from nanochat_ray.config import (
    BaseEvalSettings,
    ChatEvalSettings,
    PretrainSettings,
    RLSettings,
    RunSettings,
    SFTSettings,
    SpeedrunSettings,
    TokenizerSettings,
)


@dataclass(frozen=True)
class Machine:
    """What a preset is chosen by."""

    gpus: int
    gpu_name: str = ""
    cpus: int = 1
    where: str = "here"


def choose_preset(machine: Machine) -> tuple[str, str]:
    """The preset's name and the reason in one line."""
    if machine.gpus == 0:
        return "cpu", f"no GPU {machine.where}, {machine.cpus} CPUs"
    if machine.gpus >= 8:
        return "d24", f"{machine.gpus} GPUs {machine.where} ({machine.gpu_name})"
    return "d12", f"{machine.gpus} GPU{'s' if machine.gpus > 1 else ''} {machine.where} ({machine.gpu_name})"


def preset(name: str, machine: Machine) -> SpeedrunSettings:
    """The settings of a preset; ValueError with the nearest names for one that is not there."""
    if name in ("cpu", "smoke"):
        return _small(name)
    if name in GPU_PRESETS:
        return _gpu(name, machine)
    names = ["cpu", "smoke", *GPU_PRESETS]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names
    raise ValueError(f"no preset {name!r}; nearest: {', '.join(near)} (there are {', '.join(names)})")


# depth -> tokens per scaling parameter and rows per GPU; d24 is nanochat's speedrun, with fp8
GPU_PRESETS: dict[str, tuple[int, float, int]] = {
    "d12": (12, 12.0, 32),
    "d20": (20, 12.0, 32),
    "d24": (24, 8.0, 16),
    "d26": (26, 8.0, 16),
    "d32": (32, 8.0, 8),
}


# GPUs with at least eight to a machine that have no fp8 of the kind needed; for other names the stage's check decides.
NO_FP8_GPUS = r"v100|a100|a800|a10g?\b|a30\b|a40\b|rtx 30|mi\d"


def _gpu(name: str, machine: Machine) -> SpeedrunSettings:
    depth, ratio, rows = GPU_PRESETS[name]
    fp8 = name == "d24" and not re.search(NO_FP8_GPUS, machine.gpu_name.lower())
    # A cluster's GPUs may come only when they are asked for.
    device_type: Literal["cuda"] | None = "cuda" if machine.where == "in the cluster" else None
    return SpeedrunSettings(
        preset=name,
        run=RunSettings(model_tag=name, workers=str(max(1, machine.gpus)), data="climbmix", device_type=device_type),
        pretrain=PretrainSettings(depth=depth, target_param_data_ratio=ratio, device_batch_size=rows, fp8=fp8),
        sft=SFTSettings(device_batch_size=min(rows, 16)),
    )


def _small(name: str) -> SpeedrunSettings:
    """Minutes on a laptop's CPU, on the embedded world.

    Batches of a few thousand tokens scale nanochat's learning rates down by more than ten; the rates here make up for
    that (dev/LOG.md has the trials).
    """
    smoke = name == "smoke"
    sequence_len = 256
    eval_tokens = (64 if smoke else 256) * sequence_len
    batch_tokens = 2048 if smoke else 4096
    return SpeedrunSettings(
        preset=name,
        run=RunSettings(model_tag=name, workers="1", data="embedded"),
        tokenizer=TokenizerSettings(vocab_size=1024, max_chars=10_000_000),
        pretrain=PretrainSettings(
            depth=2 if smoke else 4, aspect_ratio=48, head_dim=32 if smoke else 64, max_seq_len=sequence_len,
            num_iterations=60 if smoke else 500, total_batch_size=batch_tokens, device_batch_size=16,
            embedding_lr=1.0, unembedding_lr=0.02, matrix_lr=0.35, warmup_steps=10 if smoke else 40,
            eval_every=30 if smoke else 250, eval_tokens=eval_tokens, core_metric_every=None, sample_every=None,
        ),
        base_eval=BaseEvalSettings(split_tokens=eval_tokens, max_per_task=50),
        sft=SFTSettings(
            total_batch_size=batch_tokens, num_iterations=60 if smoke else 700, embedding_lr=0.05,
            unembedding_lr=0.001, matrix_lr=0.012, eval_every=None, eval_tokens=eval_tokens, chatcore_every=None,
        ),
        chat_eval=ChatEvalSettings(max_problems=40 if smoke else None, max_new_tokens=96),
        rl=RLSettings(
            num_iterations=4 if smoke else 50, examples_per_step=4 if smoke else 16, num_samples=4 if smoke else 8,
            prompts_per_unit=2 if smoke else 8, max_new_tokens=96, device_batch_size=32, embedding_lr=0.05,
            unembedding_lr=0.001, matrix_lr=0.012, scalar_lr=0.01, init_lr_frac=0.08, eval_every=None,
            eval_examples=8 if smoke else 64, eval_samples=4 if smoke else 8,
        ),
    )

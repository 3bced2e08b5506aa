"""A run folder as training leaves it, made in a second: a byte tokenizer and a small random network per stage."""

from __future__ import annotations

from pathlib import Path

import torch

from nanochat_ray.config import ModelConfig
from nanochat_ray.model.checkpoint import model_tensors, save_checkpoint
from nanochat_ray.model.gpt import GPT
from nanochat_ray.run_dir import CONFIG_FILE, RunDir, write_json
from tests.engine.tiny import byte_tokenizer

CONTEXT = 4096
BYTES = 256  # ids of the tokenizer that are no special tokens


def random_model(seed: int, n_layer: int = 2) -> GPT:
    """Weights that differ from seed to seed. With top_k 50 or less its answers are noise that does not end by itself:
    a special token is as likely as the middle one of all tokens."""
    generator = torch.Generator().manual_seed(seed)
    config = ModelConfig(sequence_len=CONTEXT, vocab_size=265, n_layer=n_layer, n_head=2, n_kv_head=2, n_embd=64)
    model = GPT.build(config, compute_dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.size(1) ** -0.5, generator=generator)
        model.lm_head.weight[BYTES:] = 0
    return model


def save_step(storage: Path, tag: str, stage: str, step: int, seed: int) -> Path:
    """Another checkpoint of a run."""
    model = random_model(seed)
    meta = {"model_config": model.config.model_dump(mode="json"), "val_bpb": 1.0}
    return save_checkpoint(RunDir(storage / tag).checkpoints(stage), step, model_tensors(model), None, meta)


def make_run(storage: Path, tag: str = "d1-test", stages: tuple[str, ...] = ("pretrain", "sft")) -> RunDir:
    """A run with one checkpoint, of step 10, in each of the stages."""
    run = RunDir(storage / tag)
    with run.open():
        run.stage("tokenizer").mkdir(parents=True)
        byte_tokenizer().save(run.stage("tokenizer"))
        run.finish_stage("tokenizer")
        for number, stage in enumerate(stages):
            run.stage(stage).mkdir()
            write_json(run.stage(stage) / CONFIG_FILE, {"settings": {}})
            save_step(storage, tag, stage, 10, number)
            run.finish_stage(stage)
    return run

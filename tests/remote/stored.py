"""Small checkpoints to store, and where they lie."""

from __future__ import annotations

import torch

from nanochat_ray.model.checkpoint import (
    save_checkpoint,
    step_folder,
)
from nanochat_ray.remote import Remote
from nanochat_ray.run_dir import (
    RunDir,
)


def save(root, step, val_bpb=None, keep_last=None, **guarded):
    state = {"w": torch.full((50, 7), float(step))}
    return save_checkpoint(root, step, state, dict(state), {"val_bpb": val_bpb}, keep_last, **guarded)


def is_of(checkpoint, step):
    return checkpoint.step == step and bool((checkpoint.model_tensors()["w"] == step).all())


def object_of(root, step, name):
    """The path that stands for a file of a checkpoint in the store, by its ending."""
    folder = step_folder(root, step)
    found = [folder / there for there in Remote.of(root).listing(folder) if there.endswith(name)]
    assert len(found) == 1
    return found[0]


def checkpoints_of(uri, tag="d4"):
    return RunDir.of(uri, tag).checkpoints("pretrain")

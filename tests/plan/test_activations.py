"""What the plan says of activations and peaks, against autograd and the storages that are really alive."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nanochat_ray.config import ModelConfig, PretrainSettings
from nanochat_ray.model import attention
from nanochat_ray.model.fp8 import enable_fp8
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.scaling import model_config_for
from nanochat_ray.plan.activations import Compute, StepBytes, step_bytes
from tests.plan.watching import Kept, LiveBytes, gpu_kernels, rows

BF16, FP32 = torch.bfloat16, torch.float32
# depth, rows, context, dtype, device, head dim, vocabulary, fp8 recipe
CASES = [
    (12, 4, 2048, BF16, "meta", 128, 32768, None),
    (4, 8, 2048, BF16, "meta", 128, 1024, None),
    (5, 3, 512, FP32, "meta", 128, 32768, None),
    (6, 1, 1024, BF16, "meta", 64, 5000, None),
    (6, 4, 1024, BF16, "meta", 128, 32768, "rowwise"),
    (6, 4, 1024, BF16, "meta", 128, 32768, "tensorwise"),
    (1, 2, 300, BF16, "cpu", 64, 1000, None),
    (4, 8, 256, BF16, "cpu", 64, 1024, None),
    (3, 2, 512, FP32, "cpu", 32, 8192, None),
]


def case(values: tuple) -> tuple[ModelConfig, GPT, Compute, Tensor, Tensor]:
    depth, n, context, dtype, device, head_dim, vocab, fp8 = values
    config = model_config_for(PretrainSettings(depth=depth, max_seq_len=context, head_dim=head_dim), vocab)
    model = GPT.build(config, device=device, compute_dtype=dtype)
    if fp8:
        enable_fp8(model, fp8)
    inputs, targets = rows(config, n, device)
    return config, model, Compute(dtype.itemsize, fp8, on_cpu=device == "cpu"), inputs, targets


def make_masks(model: GPT) -> None:
    """Masks are made once and stay: the plan counts them as kept."""
    config = model.config
    for left in set(model.windows()):
        if left < config.sequence_len - 1:
            like = torch.empty(0, dtype=model.compute_dtype, device=model.device)
            attention._mask(config.sequence_len, config.sequence_len, left, 1, like)


@pytest.mark.parametrize("values", CASES, ids=str)
def test_what_autograd_keeps(values):
    config, model, compute, inputs, targets = case(values)
    planned = step_bytes(config, len(inputs), compute)
    kept = Kept(model)
    with gpu_kernels(), torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        model(inputs, targets, reduction="sum")
    head_gradient = config.padded_vocab_size * config.n_embd * 4
    if compute.fp8 and head_gradient:  # also computed at once and handed to the backward pass
        assert planned.logits > head_gradient
    assert planned.activations + planned.weight_casts + head_gradient == pytest.approx(kept.n_bytes, rel=0.01)


def passes(planned: StepBytes) -> int:
    return planned.activations + planned.weight_casts + max(planned.logits, planned.backward)


@pytest.mark.parametrize("values", CASES, ids=str)
def test_the_peak_of_a_micro_step(values):
    config, model, compute, inputs, targets = case(values)
    planned = step_bytes(config, len(inputs), compute)
    with gpu_kernels():
        make_masks(model)
        model(inputs, targets, reduction="sum").backward()  # so that gradients are there
        own = [*model.parameters(), *model.buffers(), *(param.grad for param in model.parameters()), inputs, targets]
        with LiveBytes(own) as live:
            model(inputs, targets, reduction="sum").backward()
    assert live.now < 0.05 * live.peak + 2**20  # nothing stays but masks and rotary tables
    assert passes(planned) == pytest.approx(live.peak, rel=0.1)


def test_the_judge_counts_a_storage_once_and_forgets_it():
    there = torch.ones(1000)
    with LiveBytes([there]) as live:
        one = there + 1
        view = one.view(10, 100)[2:]
        two = one * 2
        assert (live.now, live.peak) == (8000, 8000)
        del one, two
        assert live.now == 4000  # the view holds its storage
        del view
        there.view(10, 100)
    assert (live.now, live.peak) == (0, 8000)


def test_more_rows_take_more_and_no_row_is_free():
    config = model_config_for(PretrainSettings(depth=4), 32768)
    one, two = (step_bytes(config, n, Compute(2)) for n in (1, 2))
    assert one.activations < two.activations < 2 * one.activations  # masks and tables are there once
    assert one.weight_casts == two.weight_casts

"""Weights, gradients, optimizer state and its step, against networks and optimizers that were really built."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from nanochat_ray.config import PretrainSettings
from nanochat_ray.model.checkpoint import model_tensors, save_checkpoint
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.optim import build_optimizer
from nanochat_ray.model.scaling import model_config_for, param_counts
from nanochat_ray.plan.network import sent_bytes
from nanochat_ray.plan.stages import checkpoint_bytes
from nanochat_ray.plan.state import ANY_RATES, Shapes, n_bytes, state_bytes
from tests.plan.watching import LiveBytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def small(depth: int, head_dim: int = 32, vocab: int = 1000, aspect_ratio: int = 32):
    settings = PretrainSettings(depth=depth, head_dim=head_dim, max_seq_len=64, aspect_ratio=aspect_ratio)
    return model_config_for(settings, vocab)


@pytest.fixture
def fake_ranks() -> Iterator[int]:
    """This process as rank 0 of four, with collectives that send nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield 4
    dist.destroy_process_group()


def optimizer_bytes(optimizer) -> int:
    found = 0
    for shard in optimizer.shards:
        tensors = [value for value in vars(shard).values() if isinstance(value, torch.Tensor)]
        found += n_bytes(tensor for tensor in tensors if not isinstance(tensor, torch.nn.Parameter))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", [1, 2, 3, 6])
def test_exact_for_one_rank(depth, dtype):
    config = small(depth)
    model = GPT.build(config, compute_dtype=dtype)
    optimizer = build_optimizer(model, **ANY_RATES)
    planned = state_bytes(Shapes(config, dtype), "sharded", 1)
    assert planned.exact
    assert planned.weights == n_bytes([*model.parameters(), *model.buffers()])
    model(torch.zeros(1, 64, dtype=torch.int64), torch.zeros(1, 64, dtype=torch.int64)).backward()
    assert planned.gradients == n_bytes(param.grad for param in model.parameters())
    assert planned.optimizer == optimizer_bytes(optimizer)
    assert state_bytes(Shapes(config, dtype), "ddp", 4).optimizer == planned.optimizer


@pytest.mark.parametrize("depth", [12, 24, 32])
def test_exact_for_large_networks(depth):
    config = model_config_for(PretrainSettings(depth=depth), 32768)
    counts = param_counts(config)
    shapes = Shapes(config, torch.bfloat16)
    assert shapes.n_parameters == counts["total"]
    tables = counts["wte"] + counts["value_embeds"]
    matrices, rest = counts["transformer_matrices"], counts["lm_head"] + counts["scalars"]
    assert shapes.gradient_bytes == 2 * tables + 4 * (matrices + rest)
    whole = state_bytes(shapes, "ddp", 8).optimizer
    moments = 2 * 2 * tables + 4 * matrices + 2 * 4 * rest
    assert 0 < whole - moments < 0.002 * whole  # second moments of Muon: a vector for each matrix
    shared = state_bytes(shapes, "sharded", 8).optimizer
    assert whole / 8 <= shared < whole / 8 * 1.4  # 12 matrices are two each for six of eight ranks


@pytest.mark.parametrize("depth", [1, 3, 6])
def test_the_ranks_parts_are_the_whole(depth):
    """No part of the state is missing or there twice, but for small tensors, which are everywhere."""
    config, dtype, ranks = small(depth), torch.bfloat16, 4
    parts = []
    for rank in range(ranks):
        optimizer = build_optimizer(Shapes(config, dtype).model, rank=rank, world_size=ranks, **ANY_RATES)
        parts.append(optimizer_bytes(optimizer))
    planned = state_bytes(Shapes(config, dtype), "sharded", ranks)
    whole = state_bytes(Shapes(config, dtype), "ddp", ranks)
    assert planned.optimizer == parts[0] == max(parts)
    assert whole.optimizer <= sum(parts) < whole.optimizer * 1.01 + 4000


def update_peak(model: GPT, ranks: int) -> int:
    """The most bytes that are alive in the optimizer's step besides what is there before."""
    optimizer = build_optimizer(model, rank=0, world_size=ranks, **ANY_RATES)
    for param in model.parameters():
        param.grad = torch.full_like(param, 1e-3)
    there = [*model.parameters(), *(param.grad for param in model.parameters())]
    for shard in optimizer.shards:
        there += [value for value in vars(shard).values() if isinstance(value, torch.Tensor)]
    with LiveBytes(there) as live:
        optimizer.step()
    return live.peak


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("depth", "aspect_ratio"), [(2, 64), (4, 64), (6, 48)])
def test_the_optimizers_step_on_one_rank(depth, aspect_ratio, dtype):
    config = small(depth, aspect_ratio=aspect_ratio)
    model = GPT.build(config, compute_dtype=dtype)
    planned = state_bytes(Shapes(config, dtype), "sharded", 1)
    assert planned.update == pytest.approx(update_peak(model, 1), rel=0.05)


@pytest.mark.parametrize(("depth", "vocab"), [(4, 1000), (6, 1003), (3, 4096)])
def test_the_optimizers_step_on_four_ranks(fake_ranks, depth, vocab):
    config = small(depth, vocab=vocab, aspect_ratio=64)
    model = GPT.build(config, compute_dtype=torch.bfloat16)
    planned = state_bytes(Shapes(config, torch.bfloat16), "sharded", fake_ranks)
    assert planned.update == pytest.approx(update_peak(model, fake_ranks), rel=0.1)


def test_zero_cuts_up_more_and_more():
    shapes = Shapes(model_config_for(PretrainSettings(depth=12), 32768), torch.bfloat16)
    one, two, three = (state_bytes(shapes, f"zero{stage}", 8) for stage in (1, 2, 3))
    assert not one.exact
    assert one.weights == two.weights > 7 * three.weights
    assert one.gradients > 4 * two.gradients > 4 * three.gradients
    assert one.optimizer == two.optimizer > three.optimizer


def test_bytes_on_the_wire_as_measured():
    """dev/LOG.md, `python bench/parallel.py`: two gloo ranks, MB that a rank sent and MB of its state."""
    config = model_config_for(PretrainSettings(depth=4, head_dim=64, max_seq_len=512), 4096)
    for dtype, sent, shared, whole in ((torch.float32, 29.4, 23.1, 46.2), (torch.bfloat16, 23.1, 16.8, 33.6)):
        shapes = Shapes(config, dtype)
        for parallel in ("sharded", "ddp"):
            assert round(sent_bytes(shapes, parallel, 2, 1) / 1e6, 1) == sent
        assert round(state_bytes(shapes, "sharded", 2).optimizer / 1e6, 1) == shared
        assert round(state_bytes(shapes, "ddp", 2).optimizer / 1e6, 1) == whole


def test_a_checkpoint_on_the_disk(tmp_path):
    config = small(3)
    model = GPT.build(config, compute_dtype=torch.bfloat16)
    optimizer = build_optimizer(model, **ANY_RATES)
    folder = save_checkpoint(tmp_path, 1, model_tensors(model), optimizer.state_by_name(), {})
    tensors = sum((folder / name).stat().st_size for name in ("model.safetensors", "optim.safetensors"))
    headers = sum(8 + int.from_bytes((folder / name).read_bytes()[:8], "little")
                  for name in ("model.safetensors", "optim.safetensors"))
    n_counters = sum(name.endswith(".step") for name in optimizer.state_by_name())
    assert tensors - headers == checkpoint_bytes(Shapes(config, torch.bfloat16)) + 4 * n_counters  # saved as int64

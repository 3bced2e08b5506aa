"""The optimizer over 1, 2 and 3 ranks on gloo: the same parameters and the same state, whoever saved it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat_ray.config import ModelConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.optim import MuonAdamW, build_optimizer

# 128 table rows do not divide by 3, nor do the 10 or 5 matrices of a Muon group; 5 and the 3 gates do not by 2.
CONFIG = ModelConfig(sequence_len=32, vocab_size=100, n_layer=5, n_head=4, n_kv_head=2, n_embd=32)
STEPS = 3
MICRO_BATCHES = 6  # shared out evenly over 1, 2 or 3 ranks
NEVER = {"transformer.h.1.mlp.c_fc.weight", "smear_lambda", "value_embeds.0.weight"}  # no gradient on any rank
ONLY_FIRST = {"transformer.h.2.attn.c_q.weight", "lm_head.weight", "x0_lambdas"}  # only micro-batch 0 has one


def new(rank: int, world_size: int, dtype: torch.dtype) -> tuple[GPT, MuonAdamW]:
    model = GPT.build(CONFIG, compute_dtype=dtype, seed=7)
    optimizer = build_optimizer(
        model,
        unembedding_lr=0.008,
        embedding_lr=0.3,
        matrix_lr=0.02,
        scalar_lr=0.5,
        weight_decay=0.2,
        rank=rank,
        world_size=world_size,
    )
    return model, optimizer


def set_gradients(model: GPT, step: int, rank: int, world_size: int) -> None:
    """This rank's mean over its share of the step's micro-batches."""
    share = MICRO_BATCHES // world_size
    for param in model.parameters():
        param.grad = None
    for micro_batch in range(rank * share, (rank + 1) * share):
        generator = torch.Generator().manual_seed(1000 * step + micro_batch)
        for name, param in model.named_parameters():
            grad = torch.randn(param.shape, generator=generator).to(param.dtype) / share
            if name in NEVER or (name in ONLY_FIRST and micro_batch > 0):
                continue
            param.grad = grad if param.grad is None else param.grad + grad


def train(model: GPT, optimizer: MuonAdamW, steps: range, rank: int, world_size: int) -> None:
    for step in steps:
        set_gradients(model, step, rank, world_size)
        optimizer.step()


def save(model: GPT, optimizer: MuonAdamW, rank: int, folder: Path, name: str) -> None:
    """Parameters as every rank has them, state as rank 0 gets it."""
    state = optimizer.state_by_name()
    assert bool(state) == (rank == 0)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / f"{name}_rank{rank}.safetensors")
    if rank == 0:
        save_file(state, folder / f"{name}_state.safetensors")


def worker(rank: int, folder: Path) -> None:
    """One of three processes: the first two train as two ranks, then all of them as three."""
    torch.set_num_threads(1)
    if rank < 2:
        show(rank, 2, folder)
    show(rank, 3, folder)


def show(rank: int, world_size: int, folder: Path) -> None:
    """Everything that one number of ranks has to show; three ranks also continue what two saved."""
    if world_size > 1:
        file = folder / f"rendezvous_{world_size}"
        dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world_size)
    model, optimizer = new(rank, world_size, torch.float32)
    train(model, optimizer, range(2), rank, world_size)
    save(model, optimizer, rank, folder, f"W{world_size}_step2")
    train(model, optimizer, range(2, STEPS), rank, world_size)
    save(model, optimizer, rank, folder, f"W{world_size}")

    model, optimizer = new(rank, world_size, torch.bfloat16)
    train(model, optimizer, range(STEPS), rank, world_size)
    save(model, optimizer, rank, folder, f"W{world_size}_bf16")

    if world_size == 3:
        model, optimizer = new(rank, world_size, torch.float32)
        model.load_state_dict(load_file(folder / "W2_step2_rank0.safetensors"))
        optimizer.load_state_by_name(load_file(folder / "W2_step2_state.safetensors"))
        train(model, optimizer, range(2, STEPS), rank, world_size)
        save(model, optimizer, rank, folder, "W2_then_W3")
    if world_size > 1:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    show(0, 1, folder)
    mp.spawn(worker, (folder,), nprocs=3)
    return folder


def distance(found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor] | None = None) -> float:
    """Largest distance of a tensor, in units of how far it has come from its start (or of its norm)."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for name, tensor in expected.items():
        come = tensor.double() - (0 if start is None else start[name].double())
        worst = max(worst, float((found[name].double() - tensor.double()).norm() / come.norm().clamp(min=1e-9)))
    return worst


@pytest.mark.parametrize("name", ["W2", "W3", "W2_then_W3"])
def test_parameters_do_not_depend_on_the_number_of_ranks(results, name):
    start = new(0, 1, torch.float32)[0].state_dict()
    one = load_file(results / "W1_rank0.safetensors")
    found = load_file(results / f"{name}_rank0.safetensors")
    assert distance(found, one, start) < 1e-5


@pytest.mark.parametrize(("name", "world_size"), [("W2", 2), ("W3", 3), ("W3_bf16", 3), ("W2_then_W3", 3)])
def test_all_ranks_have_the_same_parameters(results, name, world_size):
    ranks = [load_file(results / f"{name}_rank{rank}.safetensors") for rank in range(world_size)]
    for other in ranks[1:]:
        assert all(torch.equal(tensor, other[key]) for key, tensor in ranks[0].items())


@pytest.mark.parametrize("name", ["W2", "W3", "W2_then_W3"])
def test_state_does_not_depend_on_the_number_of_ranks(results, name):
    one, found = (load_file(results / f"{n}_state.safetensors") for n in ("W1", name))
    assert {key: tensor.shape for key, tensor in found.items()} == {key: tensor.shape for key, tensor in one.items()}
    assert distance(found, one) < 1e-5


@pytest.mark.parametrize("name", ["W2_bf16", "W3_bf16"])
def test_bf16_tables(results, name):
    """Averaging bf16 gradients rounds, so this is close only."""
    start = new(0, 1, torch.bfloat16)[0].state_dict()
    one, found = (load_file(results / f"{n}_rank0.safetensors") for n in ("W1_bf16", name))
    assert found["transformer.wte.weight"].dtype == torch.bfloat16
    assert distance(found, one, start) < 0.05

"""DeepSpeed's ZeRO on 1 and 2 ranks (gloo): its stages agree, and save state that each of them resumes."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat_ray.messages import World
from nanochat_ray.model.checkpoint import load_weights
from nanochat_ray.model.gpt import GPT
from nanochat_ray.stages.parallel import build_strategy
from tests.parity.goldens import config_of, model_from_golden
from tests.stages.test_parallel import full_rates, rows_of, train_step

missing = find_spec("deepspeed") is None or find_spec("ninja") is None
pytestmark = [
    pytest.mark.slow,  # DeepSpeed compiles when it is first used
    pytest.mark.skipif(missing, reason="needs the extra deepspeed"),
]

STAGES = ("zero1", "zero2", "zero3")
ROWS = (5, 5, 1, 5)  # of each step: uneven over two ranks, and none for the second
MIDDLE = 2
TOLERANCE = 1e-4


def show(name: str, world: World, folder: Path) -> None:
    """Train, save in the middle, go on; then load what this and what one rank saved, and go on from there."""
    strategy = build_strategy(name, model_from_golden("b"), world, full_rates())
    losses, norms = [], []
    for step, n_rows in enumerate(ROWS):
        if step == MIDDLE:
            save(strategy.model_tensors(), folder / f"{name}_{world.world_size}_model.safetensors", world)
            save(strategy.optimizer_tensors(), folder / f"{name}_{world.world_size}_optimizer.safetensors", world)
        loss, norm = train_step(strategy, step, n_rows)
        losses.append(loss)
        norms.append(norm)
    save(strategy.model_tensors(), folder / f"{name}_{world.world_size}_end.safetensors", world)
    with strategy.full_weights() as network:
        if world.rank == 0:  # evaluation on one rank alone must not wait for the others
            batch, _ = rows_of(0, 5, 0, 1)
            tokens = torch.from_numpy(batch.tokens.astype("int64"))
            loss = network(tokens[:, :-1], tokens[:, 1:]).item()
            (folder / f"{name}_{world.world_size}.json").write_text(
                json.dumps({"losses": losses, "norms": norms, "evaluated": loss, "describe": strategy.describe()})
            )
    strategy.close()
    dist.barrier()

    for source in {world.world_size, 1}:
        strategy = build_strategy(name, model_from_golden("b"), world, full_rates())
        stored = [load_file(folder / f"{name}_{source}_{part}.safetensors") for part in ("model", "optimizer")]
        strategy.load(*stored)
        for part, again in zip(stored, (strategy.model_tensors(), strategy.optimizer_tensors()), strict=True):
            assert world.rank != 0 or part.keys() == again.keys()
            assert all(torch.equal(part[key], tensor) for key, tensor in again.items())
        for step in range(MIDDLE, len(ROWS)):
            train_step(strategy, step, ROWS[step])
        file = folder / f"{name}_{world.world_size}_resumed_from_{source}.safetensors"
        save(strategy.model_tensors(), file, world)
        with pytest.raises(ValueError, match="saved by another --parallel"):
            strategy.load(stored[0], {"lm_head.weight.exp_avg": stored[1]["lm_head.weight.exp_avg"]})
        strategy.close()


def save(tensors: dict[str, Tensor], file: Path, world: World) -> None:
    assert bool(tensors) == (world.rank == 0)
    if world.rank == 0:
        save_file(tensors, file)


def worker(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    file = folder / f"rendezvous_{world_size}"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world_size)
    for name in STAGES:
        show(name, World(rank, rank, world_size), folder)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    for world_size in (1, 2):
        mp.spawn(worker, (world_size, folder), nprocs=world_size)
    return folder


def travelled(folder: Path, name: str) -> dict[str, Tensor]:
    """How far each parameter has come from its start."""
    start = model_from_golden("b").state_dict()
    return {key: tensor - start[key] for key, tensor in load_file(folder / f"{name}.safetensors").items()}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest distance of a tensor, in units of how far it has come."""
    return max(float((found[key] - tensor).norm() / tensor.norm()) for key, tensor in expected.items())


def numbers(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_stages_agree(folder, name, world_size):
    """With momentum, rates and decay that change from step to step."""
    found, first = f"{name}_{world_size}", f"zero1_{world_size}"
    assert distance(travelled(folder, f"{found}_end"), travelled(folder, f"{first}_end")) < TOLERANCE
    for key in ("losses", "norms"):
        assert numbers(folder, found)[key] == pytest.approx(numbers(folder, first)[key], rel=TOLERANCE)


@pytest.mark.parametrize("name", STAGES)
def test_two_ranks_do_what_one_does(folder, name):
    assert distance(travelled(folder, f"{name}_2_end"), travelled(folder, f"{name}_1_end")) < TOLERANCE
    assert numbers(folder, f"{name}_2")["losses"] == pytest.approx(numbers(folder, f"{name}_1")["losses"], rel=1e-5)


@pytest.mark.parametrize(("world_size", "source"), [(1, 1), (2, 2), (2, 1)])
@pytest.mark.parametrize("name", STAGES)
def test_a_resumed_run_ends_where_the_other_did(folder, name, world_size, source):
    end = travelled(folder, f"{name}_{world_size}_end")
    resumed = travelled(folder, f"{name}_{world_size}_resumed_from_{source}")
    if world_size == source:
        assert all(torch.equal(resumed[key], tensor) for key, tensor in end.items())
    else:
        assert distance(resumed, end) < TOLERANCE


@pytest.mark.parametrize("world_size", [1, 2])
def test_state_does_not_depend_on_stage_or_world(folder, world_size):
    one = load_file(folder / "zero1_1_optimizer.safetensors")
    for name in STAGES:
        found = load_file(folder / f"{name}_{world_size}_optimizer.safetensors")
        assert {key: tensor.shape for key, tensor in found.items()} == {key: t.shape for key, t in one.items()}
        assert max(float((found[k] - t).float().norm() / t.float().norm()) for k, t in one.items()) < TOLERANCE


@pytest.mark.parametrize("name", STAGES)
def test_weights_are_ours(folder, name):
    """A plain network takes them, and has the loss that the strategy evaluated to."""
    model = GPT.build(config_of("b"))
    load_weights(model, load_file(folder / f"{name}_2_end.safetensors"))
    batch, _ = rows_of(0, 5, 0, 1)
    tokens = torch.from_numpy(batch.tokens.astype("int64"))
    loss = model(tokens[:, :-1], tokens[:, 1:]).item()
    assert loss == pytest.approx(numbers(folder, f"{name}_2")["evaluated"], rel=1e-6)


def test_the_report_names_the_other_optimizer(folder):
    described = numbers(folder, "zero3_2")["describe"]
    assert (described["parallel"], described["optimizer"]) == ("zero3", "DeepSpeed MuonWithAuxAdam")
    assert any("tuned for" in note for note in described["optimizer_notes"])


def test_losses_fall(folder):
    losses = numbers(folder, "zero2_2")["losses"]
    assert losses[3] < losses[0] - 0.05

"""`sharded` and `ddp` on 2, 3 and 4 ranks (gloo) do what one process does, and take over each other's state."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat_ray.config import ModelConfig
from nanochat_ray.messages import Cursor, PackedBatch, World
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.optim import Rates
from nanochat_ray.model.schedule import lr_multiplier, muon_momentum, muon_weight_decay
from nanochat_ray.stages import parallel
from nanochat_ray.stages.parallel import LossScaler, Replicated, build_strategy, check_strategy
from nanochat_ray.stages.step import count_targets
from nanochat_ray.text.packing import rank_part
from tests.parity.goldens import load_json, model_from_golden

# 5 rows a step fall unevenly to 2, 3 and 4 ranks, and 512 rows of a table or 6 or 3 matrices do not divide by all.
ROWS, DEVICE_BATCH_SIZE, STEPS, MIDDLE = 5, 2, 20, 10
OURS = [(world_size, name) for world_size in (2, 3, 4) for name in ("sharded", "ddp")]
SMALL = ModelConfig(sequence_len=32, vocab_size=100, n_layer=3, n_head=4, n_kv_head=2, n_embd=32)
INF = float("inf")


def golden_rates() -> Rates:
    return Rates(**load_json("train_b")["base"])


def full_rates() -> Rates:
    """Ten times the golden's, as one trains: its updates are so small that the rounding of the weights shows."""
    golden = load_json("train_b")["base"]
    return Rates(**{key: value if key == "weight_decay" else 10 * value for key, value in golden.items()})


def rows_of(step: int, n_rows: int, rank: int, world_size: int) -> tuple[PackedBatch, int]:
    """A rank's rows of one step, and the targets of all ranks; about a third of the targets is masked."""
    all_rows = np.array(load_json("train_b")["ids"], dtype=np.uint16).reshape(-1, 65)
    order = np.random.default_rng(step)
    tokens = all_rows[order.permutation(len(all_rows))[:n_rows]]  # (n, T+1)
    mask = order.random(tokens.shape) < 0.3 + 0.4 * order.random((n_rows, 1))
    part = rank_part(n_rows, rank, world_size)
    n_targets = count_targets(PackedBatch(step, tokens, mask, Cursor(), 0.0))
    return PackedBatch(step, tokens[part], mask[part], Cursor(), 0.0), n_targets


def train_step(strategy: parallel.Strategy, step: int, n_rows: int = ROWS) -> tuple[float, float]:
    """Loss and gradient norm."""
    world = strategy.world
    schedule(strategy, step)
    loss = strategy.accumulate(*rows_of(step, n_rows, world.rank, world.world_size), DEVICE_BATCH_SIZE)
    return loss, strategy.update()


def schedule(strategy: parallel.Strategy, step: int) -> None:
    golden = load_json("train_b")
    lr = lr_multiplier(step, STEPS, golden["warmup_steps"], golden["warmdown_ratio"], golden["final_lr_frac"])
    momentum = muon_momentum(step, STEPS, golden["warmdown_ratio"])
    strategy.set_schedule(lr, momentum, muon_weight_decay(step, STEPS, golden["base"]["weight_decay"]))


def averaged_gradients(strategy: Replicated) -> dict[str, Tensor]:
    """The gradient of the step's mean loss, on every rank."""
    grads = {}
    for name, param in strategy.model.named_parameters():
        grads[name] = torch.zeros_like(param) if param.grad is None else param.grad.clone()
        if strategy.name == "sharded" and strategy.world.world_size > 1:
            dist.all_reduce(grads[name])
            grads[name] /= strategy.world.world_size
    return grads


def show(name: str, rank: int, world_size: int, folder: Path) -> None:
    """All that a strategy has to show on one number of ranks; rank 0 writes it down."""
    world = World(rank, rank, world_size)

    def new(rates: Rates) -> Replicated:
        strategy = build_strategy(name, model_from_golden("b"), world, rates)
        assert isinstance(strategy, Replicated)
        return strategy

    shown: dict[str, object] = {}
    tensors: dict[str, Tensor] = {}

    def keep(prefix: str, found: dict[str, Tensor]) -> None:
        tensors.update({f"{prefix}/{key}": value.clone() for key, value in found.items()})

    for case, n_rows in (("uneven", ROWS), ("few", 1)):
        strategy = new(golden_rates())
        shown[f"{case}_loss"] = strategy.accumulate(*rows_of(0, n_rows, rank, world_size), DEVICE_BATCH_SIZE)
        keep(f"{case}_grad", averaged_gradients(strategy))
        schedule(strategy, 0)
        shown[f"{case}_norm"] = strategy.update()
        assert all(param.grad is None for param in strategy.model.parameters())

    strategy, losses = new(golden_rates()), []
    for step in range(STEPS):
        if step == MIDDLE:
            keep("middle_model", strategy.model_tensors())
            keep("middle_optimizer", strategy.optimizer_tensors())
        losses.append(train_step(strategy, step)[0])
    shown["losses"] = losses
    keep(f"end_of_rank_{rank}", dict(strategy.model.state_dict()))

    # The state that one process had in the middle: taken over bit for bit, and one update from it.
    file = folder / "sharded_1_rank0.safetensors"
    middle = split(load_file(file) if file.exists() else tensors)
    strategy = new(full_rates())
    strategy.load(middle["middle_model"], middle["middle_optimizer"])
    keep("loaded_model", strategy.model_tensors())
    keep("loaded_optimizer", strategy.optimizer_tensors())
    strategy.accumulate(*rows_of(MIDDLE, ROWS, rank, world_size), DEVICE_BATCH_SIZE)
    keep("middle_grad", averaged_gradients(strategy))
    schedule(strategy, MIDDLE)
    strategy.update()
    keep("update", {key: t.detach() - middle["middle_model"][key] for key, t in strategy.model.named_parameters()})

    if rank == 0:
        (folder / f"{name}_{world_size}.json").write_text(json.dumps(shown))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"{name}_{world_size}_rank{rank}.safetensors")


def show_float16(name: str, rank: int, world_size: int, folder: Path) -> None:
    """A step that overflows on every rank, a good one, and (sharded) one whose gradient is infinite on one rank."""
    world = World(rank, rank, world_size)
    model = GPT.build(SMALL, compute_dtype=torch.float16, seed=3)
    strategy = build_strategy(name, model, world, golden_rates(), dtype=torch.float16)
    assert isinstance(strategy, Replicated) and strategy.scaler is not None
    strategy.scaler.scale = 2.0**40
    start = {key: value.clone() for key, value in model.state_dict().items()}
    batch, n_targets = small_rows(rank, world_size)
    found: dict[str, object] = {"first": strategy.accumulate(batch, n_targets, 1), "norms": [strategy.update()]}
    found["untouched"] = all(torch.equal(value, start[key]) for key, value in model.state_dict().items())
    found["no_state"] = all(not t.any() for t in strategy.optimizer_tensors().values())
    found["scales"] = [strategy.scaler.scale]
    strategy.scaler.scale = 65536.0
    strategy.accumulate(batch, n_targets, 1)
    found["norms"].append(strategy.update())
    found["moved"] = not torch.equal(model.lm_head.weight, start["lm_head.weight"])
    if name == "sharded":
        strategy.accumulate(batch, n_targets, 1)
        if rank == world_size - 1:
            assert model.resid_lambdas.grad is not None
            model.resid_lambdas.grad[0] = INF
        found["norms"].append(strategy.update())
    found["scales"].append(strategy.scaler.scale)
    found["saved"] = strategy.extra_state()
    (folder / f"float16_{name}_{world_size}_rank{rank}.json").write_text(json.dumps(found))


def small_rows(rank: int, world_size: int) -> tuple[PackedBatch, int]:
    tokens = np.random.default_rng(0).integers(0, SMALL.vocab_size, (4, 33)).astype(np.uint16)
    return PackedBatch(0, tokens[rank_part(4, rank, world_size)], None, Cursor(), 0.0), 4 * 32


def worker(rank: int, folder: Path) -> None:
    """One of four processes: the first two train as two ranks, the first three as three, then all."""
    torch.set_num_threads(1)
    for world_size in (2, 3, 4):
        if rank < world_size:
            file = folder / f"rendezvous_{world_size}"
            dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world_size)
            for name in ("sharded", "ddp"):
                show(name, rank, world_size, folder)
                if world_size == 2:
                    show_float16(name, rank, world_size, folder)
            dist.destroy_process_group()


def split(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        prefix, name = key.split("/", 1)
        parts.setdefault(prefix, {})[name] = tensor
    return parts


class Results:
    def __init__(self, folder: Path):
        self.folder = folder

    def numbers(self, world_size: int, name: str) -> dict:
        return json.loads((self.folder / f"{name}_{world_size}.json").read_text())

    def tensors(self, world_size: int, name: str, rank: int = 0) -> dict[str, dict[str, Tensor]]:
        return split(load_file(self.folder / f"{name}_{world_size}_rank{rank}.safetensors"))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("parallel")
    for name in ("sharded", "ddp"):
        show(name, 0, 1, folder)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(worker, (folder,), nprocs=4)
    return Results(folder)


def distance(found: dict[str, Tensor], expected: dict[str, Tensor], keep: dict[str, Tensor] | None = None) -> float:
    """Largest distance of a tensor in units of its norm, over the elements to keep.

    The learned scalars are one vector: a gradient that is a single number may cancel down to its rounding.
    """
    assert found.keys() == expected.keys()
    errors: dict[str, float] = {}
    norms: dict[str, float] = {}
    for name, tensor in expected.items():
        chosen = torch.ones_like(tensor, dtype=torch.bool) if keep is None else keep[name]
        a, b = found[name].double()[chosen], tensor.double()[chosen]
        key = "scalars" if tensor.dim() == 1 else name
        errors[key] = errors.get(key, 0.0) + float((a - b).square().sum())
        norms[key] = norms.get(key, 0.0) + float(b.square().sum())
    return max((errors[key] / norms[key]) ** 0.5 for key in errors)


@pytest.mark.parametrize("case", ["uneven", "few"])
@pytest.mark.parametrize(("world_size", "name"), OURS)
def test_gradients_are_those_of_one_process(results, world_size, name, case):
    one = results.tensors(1, "sharded")[f"{case}_grad"]
    assert distance(results.tensors(world_size, name)[f"{case}_grad"], one) < 1e-5
    numbers, expected = results.numbers(world_size, name), results.numbers(1, "sharded")
    assert numbers[f"{case}_loss"] == pytest.approx(expected[f"{case}_loss"], rel=1e-6)


@pytest.mark.parametrize("case", ["uneven", "few"])
@pytest.mark.parametrize(("world_size", "name"), [(1, "sharded"), (1, "ddp"), *OURS])
def test_the_norm_is_that_of_the_full_gradient(results, world_size, name, case):
    grads = results.tensors(world_size, name)[f"{case}_grad"]
    expected = torch.cat([grad.flatten() for grad in grads.values()]).double().norm().item()
    assert results.numbers(world_size, name)[f"{case}_norm"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("world_size", "name"), OURS)
def test_one_update_from_equal_state(results, world_size, name):
    """Where a gradient is rounding noise AdamW may step either way; those elements are left out."""
    one = results.tensors(1, "sharded")
    signal = {key: grad.abs() > 1e-6 * grad.abs().max() for key, grad in one["middle_grad"].items()}
    assert min(float(kept.float().mean()) for kept in signal.values()) > 0.2
    assert distance(results.tensors(world_size, name)["update"], one["update"], signal) < 1e-5


@pytest.mark.parametrize(("world_size", "name"), OURS)
def test_losses_over_20_steps(results, world_size, name):
    found, expected = (np.array(results.numbers(*key)["losses"]) for key in ((world_size, name), (1, "sharded")))
    assert len(found) == STEPS and np.abs(found / expected - 1).max() < 1e-2
    assert expected[-5:].mean() < expected[:5].mean() - 0.5


@pytest.mark.parametrize(("world_size", "name"), [(1, "ddp"), *OURS])
def test_state_crosses_over_bit_for_bit(results, world_size, name):
    """What one process saved, taken over by any strategy on any number of ranks and saved again."""
    saved, found = results.tensors(1, "sharded"), results.tensors(world_size, name)
    for part in ("model", "optimizer"):
        assert found[f"loaded_{part}"].keys() == saved[f"middle_{part}"].keys()
        assert all(torch.equal(found[f"loaded_{part}"][key], t) for key, t in saved[f"middle_{part}"].items())


@pytest.mark.parametrize(("world_size", "name"), OURS)
def test_state_from_any_strategy_fits_any_other(results, world_size, name):
    """What they saved goes back into one process bit for bit."""
    found = results.tensors(world_size, name)
    strategy = build_strategy("sharded", model_from_golden("b"), World(), golden_rates())
    strategy.load(found["middle_model"], found["middle_optimizer"])
    for again, part in ((strategy.model_tensors(), "model"), (strategy.optimizer_tensors(), "optimizer")):
        assert all(torch.equal(again[key], t) for key, t in found[f"middle_{part}"].items())


@pytest.mark.parametrize(("world_size", "name"), OURS)
def test_all_ranks_hold_the_same_weights(results, world_size, name):
    ends = [results.tensors(world_size, name, rank)[f"end_of_rank_{rank}"] for rank in range(world_size)]
    assert all(torch.equal(tensor, end[key]) for end in ends[1:] for key, tensor in ends[0].items())


@pytest.mark.parametrize("name", ["sharded", "ddp"])
def test_float16_skips_a_step_that_overflows(results, name):
    ranks = [json.loads((results.folder / f"float16_{name}_2_rank{rank}.json").read_text()) for rank in range(2)]
    for found in ranks:
        assert found["untouched"] and found["no_state"] and found["moved"]
        assert found["norms"][0] == INF and 0 < found["norms"][1] < 100
        assert found["scales"][0] == 2.0**39
        if name == "sharded":
            assert found["norms"][2] == INF and found["scales"][1] == 32768.0
        assert found["saved"] == ranks[0]["saved"]


def test_the_loss_scaler():
    scaler = LossScaler(growth_interval=3)
    scales = []
    for finite in (True, True, False, True, True, True, True, False):
        scaler.note(finite)
        scales.append((scaler.scale, scaler.good_steps))
    start = 65536.0
    assert scales == [
        (start, 1), (start, 2), (start / 2, 0), (start / 2, 1), (start / 2, 2), (start, 0), (start, 1), (start / 2, 0),
    ]
    with pytest.raises(FloatingPointError, match="diverged"):
        for _ in range(40):
            scaler.note(False)
    assert (LossScaler().scale, LossScaler().growth_interval) == (65536.0, 2000)


def test_float16_trains_like_float32_and_keeps_its_scaler():
    batch, n_targets = small_rows(0, 1)
    losses = {}
    for dtype in (torch.float32, torch.float16):
        model = GPT.build(SMALL, compute_dtype=dtype, seed=3)
        strategy = build_strategy("sharded", model, World(), golden_rates(), dtype=dtype)
        losses[dtype] = []
        for _ in range(5):
            losses[dtype].append(strategy.accumulate(batch, n_targets, 2))
            assert strategy.update() < INF
    assert losses[torch.float16] == pytest.approx(losses[torch.float32], rel=2e-3)
    assert losses[torch.float16][-1] < losses[torch.float16][0]
    assert strategy.extra_state() == {"loss_scaler": {"scale": 65536.0, "good_steps": 5, "growth_interval": 2000}}
    state = json.loads(json.dumps(strategy.extra_state()))
    other = build_strategy("sharded", model, World(), golden_rates(), dtype=torch.float16)
    other.load_extra_state(state)
    assert other.extra_state() == state


def test_bad_names_and_missing_packages(monkeypatch):
    with pytest.raises(ValueError, match="choose from sharded, ddp"):
        check_strategy("zero4")
    monkeypatch.setattr(parallel.importlib.util, "find_spec", lambda name: None)
    for name in ("zero1", "zero2", "zero3"):
        with pytest.raises(ValueError, match=r"deepspeed and ninja.*pip install -e '\.\[deepspeed\]'"):
            check_strategy(name)
    check_strategy("sharded", torch.float16)
    check_strategy("ddp")
    monkeypatch.setattr(parallel.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match="float16"):
        check_strategy("zero2", torch.float16)


def test_describe():
    strategy = build_strategy("ddp", GPT.build(SMALL), World(), golden_rates())
    assert strategy.describe() == {"parallel": "ddp", "optimizer": "MuonAdamW", "optimizer_notes": []}
    with strategy.full_weights() as network:
        assert network is strategy.model
    strategy.close()

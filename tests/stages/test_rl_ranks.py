"""Reinforcement learning on 2 and 3 ranks (gloo) does what one process does, and goes on from what others saved."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from nanochat_ray.messages import RolloutGroup, World
from nanochat_ray.model.checkpoint import model_tensors, open_checkpoint, save_checkpoint
from nanochat_ray.rollout.pool import ElsewhereRollouts
from nanochat_ray.run_dir import CHECKPOINTS
from nanochat_ray.stages.hooks import FolderHooks
from nanochat_ray.stages.rl import RLJob, reinforce
from nanochat_ray.stages.rollout_log import ROLLOUTS, RolloutLog
from nanochat_ray.stages.rollouts import OwnRollouts, RolloutSource
from nanochat_ray.tasks.rl_task import RLTask
from tests.stages.rl_tiny import LowLetters, VersionedRollouts, make_rl

STEPS, STOP_AT, BASE = 5, 3, 4
RATES = {"matrix_lr": 0.01, "embedding_lr": 0.02, "unembedding_lr": 0.002}
ZERO = ("zero1", "zero2", "zero3")
no_deepspeed = find_spec("deepspeed") is None or find_spec("ninja") is None


class AllTheSame(LowLetters):
    """Every completion has the same reward, so there is nothing to learn."""

    def open(self) -> RLTask:
        async def reward(conversation, completion):
            return 0.5

        return RLTask("same", super().open().prompts, reward)


@dataclasses.dataclass(frozen=True)
class Case:
    """A run's folder and how it is trained."""

    folder: str
    parallel: str = "sharded"
    changes: tuple[tuple[str, Any], ...] = ()
    task: type[LowLetters] = LowLetters
    source: str = "own"
    stop_at: int | None = None

    def job(self, root: Path) -> RLJob:
        changes = RATES | dict(self.changes)
        return dataclasses.replace(make_rl(root / self.folder, self.task(), **changes), parallel=self.parallel)

    def prepare(self, root: Path) -> None:
        """Make the folder, with a network that has learned something: a new one's scalars have gradients of noise."""
        base = self.job(root).base()
        model, generator = base.build_model("cpu", torch.float32, 265), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
        save_checkpoint(base.folder.parent, BASE, model_tensors(model), None, base.meta | {"step": BASE})


ONE_ROW = (("examples_per_step", 1), ("num_samples", 2), ("num_iterations", 2))
NOTHING = (("num_iterations", 2),)
AHEAD = (("async_steps", 1),)
ALONE = (Case("one"), Case("ahead_1", source="versions", changes=AHEAD), Case("few_1", changes=ONE_ROW))
TWO_RANKS = (
    Case("sharded_2"), Case("ddp_2", "ddp"), Case("elsewhere_2", source="elsewhere"),
    Case("ahead_2", source="elsewhere", changes=AHEAD),
    Case("stopped", stop_at=STOP_AT),
    Case("nothing_2", task=AllTheSame, changes=NOTHING),
    Case("nothing_ddp_2", "ddp", task=AllTheSame, changes=NOTHING),
)  # fmt: skip
THREE_RANKS = (Case("stopped"), Case("few_3", changes=ONE_ROW), Case("few_ddp_3", "ddp", changes=ONE_ROW))


class RankHooks(FolderHooks):
    """What a rank reports; one that is not the first may write nothing."""

    def __init__(self, folder: Path, world: World, stop_at: int | None) -> None:
        super().__init__(folder, 1, world, None, keep_last=9, beat=lambda: self.beats.append(1))
        self.stop_at, self.losses, self.beats = stop_at, [], []

    def report(self, step, metrics):
        assert self.world.rank == 0
        if "train/loss" in metrics:
            self.losses.append(metrics["train/loss"])

    def stop_requested(self):
        return len(self.losses) + 1 == self.stop_at

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        assert self.world.rank == 0, "only the first rank writes"
        with super().guard():
            yield


def source_of(case: Case, job: RLJob, world: World) -> RolloutSource:
    if case.source == "own":
        return OwnRollouts(job.rollout_spec("cpu"), world)
    return ElsewhereRollouts() if world.rank else VersionedRollouts(job.rollout_spec("cpu"))


def train(case: Case, world: World, root: Path) -> None:
    """Every rank ends with the same weights."""
    job = case.job(root)
    hooks = RankHooks(job.stage_folder, world, case.stop_at)
    result = reinforce(job, world, source_of(case, job, world), hooks)
    (root / f"{case.folder}_beats{world.rank}").write_text(str(len(hooks.beats)))
    if world.rank == 0:
        (root / f"{case.folder}.json").write_text(json.dumps({"status": result["status"], "losses": hooks.losses}))


def worker(rank: int, root: Path) -> None:
    """One of three processes: the first two train as two ranks, then all as three."""
    torch.set_num_threads(1)
    for world_size, cases in ((2, TWO_RANKS), (3, THREE_RANKS)):
        if rank < world_size:
            file = root / f"rendezvous_{world_size}"
            dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world_size)
            for case in cases:
                train(case, World(rank, rank, world_size), root)
            dist.destroy_process_group()


def together(call: Callable[..., None], args: tuple, n: int) -> None:
    """Run this in so many processes at a time, by a server that has the large imports behind it."""
    multiprocessing.set_forkserver_preload(["nanochat_ray.stages.rl"])
    mp.start_processes(call, args, n, start_method="forkserver")


class Runs:
    """Finished runs below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def losses(self, name: str) -> list[float]:
        return json.loads((self.root / f"{name}.json").read_text())["losses"]

    def weights(self, name: str, step: int = STEPS) -> dict[str, Tensor]:
        return open_checkpoint(self.root / name / "rl" / CHECKPOINTS, step).model_tensors()

    def steps(self, name: str, n: int = STEPS) -> list[list[RolloutGroup]]:
        log = RolloutLog(self.root / name / "rl" / ROLLOUTS)
        units = [log.units("train", step) for step in range(n)]
        return [[group for number in sorted(found) for group in found[number]] for found in units]

    def units_written(self, name: str) -> Counter[str]:
        """How often each unit stands in the log."""
        lines = [
            (path.name, json.loads(line)) for path in (self.root / name / "rl" / ROLLOUTS).iterdir()
            for line in path.read_text().splitlines()
        ]  # fmt: skip
        return Counter(f"{name} {line['unit']}" for name, line in lines if line["kind"] == "unit")

    def base(self, name: str) -> dict[str, Tensor]:
        return open_checkpoint(self.root / name / "sft" / CHECKPOINTS, BASE).model_tensors()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    root = tmp_path_factory.mktemp("ranks")
    for case in (*ALONE, *TWO_RANKS, *THREE_RANKS[1:]):
        case.prepare(root)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    for case in ALONE:
        train(case, World(), root)
    together(worker, (root,), 3)
    return Runs(root)


def distance(found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """Largest distance of a tensor, in units of how far it has come.

    Of two layers the backout only scales what the last norm sees, so its gradient is rounding noise.
    """
    assert found.keys() == expected.keys()
    far = {key: (tensor - start[key]).norm() for key, tensor in expected.items() if key != "backout_lambda"}
    assert all(far.values())
    return max(float((found[key] - expected[key]).norm() / moved) for key, moved in far.items())


def tokens(steps: list[list[RolloutGroup]]) -> list[list[tuple]]:
    return [[(g.prompt, g.version, [(r.token_ids, r.mask, r.reward) for r in g.rollouts]) for g in s] for s in steps]


@pytest.mark.parametrize(
    ("name", "alone", "n"),
    [
        ("sharded_2", "one", STEPS), ("ddp_2", "one", STEPS), ("elsewhere_2", "one", STEPS), ("stopped", "one", STEPS),
        ("ahead_2", "ahead_1", STEPS), ("few_3", "few_1", 2), ("few_ddp_3", "few_1", 2),
    ],
)  # fmt: skip
def test_ranks_do_what_one_process_does(runs, name, alone, n):
    """Also where one has nothing to sample or to learn, and where two ranks stopped and three went on."""
    assert runs.steps(name, n)[0] == runs.steps(alone, n)[0]
    assert tokens(runs.steps(name, n)) == tokens(runs.steps(alone, n))
    assert distance(runs.weights(name, n), runs.weights(alone, n), runs.base(alone)) < 1e-3
    assert runs.losses(name) == pytest.approx(runs.losses(alone)[-len(runs.losses(name)) :], abs=1e-5)


@pytest.mark.parametrize("name", ["sharded_2", "ddp_2", "elsewhere_2", "ahead_2", "stopped", "few_3"])
def test_the_first_rank_writes_every_unit_once(runs, name):
    alone = {"ahead_2": "ahead_1", "few_3": "few_1"}.get(name, "one")
    assert runs.units_written(name) == runs.units_written(alone)
    assert set(runs.units_written(name).values()) == {1}


@pytest.mark.parametrize("name", ["elsewhere_2", "few_3"])
def test_a_rank_that_samples_nothing_shows_that_it_lives(runs, name):
    """Else its watchdog would end it."""
    assert int((runs.root / f"{name}_beats1").read_text()) >= len(runs.losses(name))


def test_versions_ahead_of_time(runs):
    found = [{group.version for group in step} for step in runs.steps("ahead_2")]
    assert found == [{0}, {0}, {1}, {2}, {3}]


@pytest.mark.parametrize("name", ["nothing_2", "nothing_ddp_2"])
def test_a_step_without_anything_to_learn_changes_nothing(runs, name):
    assert only_decayed(runs.weights(name, 2), runs.base(name))
    assert runs.losses(name) == [0.0, 0.0]


def only_decayed(found: dict[str, Tensor], start: dict[str, Tensor]) -> bool:
    """Whether matrices are as they were, and what AdamW trains is, but for its weight decay."""
    return all(
        torch.equal(tensor, start[key]) if ".h." in key else torch.allclose(tensor, start[key], rtol=1e-2)
        for key, tensor in found.items()
    )


def deepspeed_worker(rank: int, world_size: int, root: Path) -> None:
    torch.set_num_threads(1)
    file = root / f"rendezvous_zero_{world_size}"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world_size)
    for case in zero_cases(world_size):
        train(case, World(rank, rank, world_size), root)
    dist.destroy_process_group()


def zero_cases(world_size: int) -> list[Case]:
    found = [Case(f"{name}_few_{world_size}", name, ONE_ROW) for name in ZERO]
    if world_size > 1:
        found += [Case(f"{name}_nothing_{world_size}", name, NOTHING, AllTheSame) for name in ZERO]
    return found


@pytest.fixture(scope="module")
def zero_runs(tmp_path_factory) -> Runs:
    root = tmp_path_factory.mktemp("zero")
    for world_size in (1, 3):
        for case in zero_cases(world_size):
            case.prepare(root)
        together(deepspeed_worker, (world_size, root), world_size)
    return Runs(root)


@pytest.mark.slow
@pytest.mark.skipif(no_deepspeed, reason="needs the extra deepspeed")
@pytest.mark.parametrize("name", ZERO)
def test_deepspeed_on_three_ranks_does_what_it_does_on_one(zero_runs, name):
    one, three = f"{name}_few_1", f"{name}_few_3"
    assert tokens(zero_runs.steps(three, 2)) == tokens(zero_runs.steps(one, 2))
    assert distance(zero_runs.weights(three, 2), zero_runs.weights(one, 2), zero_runs.base(one)) < 1e-3
    assert only_decayed(zero_runs.weights(f"{name}_nothing_3", 2), zero_runs.base(f"{name}_nothing_3"))

"""Twenty kills of everything that training consists of, and the model is the one of a quiet run, bit for bit."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from _runtime import available_cpus

from tests.jobs.running import end, run, start

pytestmark = pytest.mark.slow

SEED = 7
SAVE_EVERY = 5
STEPS = 150
TOKENIZER = ("--data", "embedded", "--model-tag", "m", "--vocab-size", "512", "--max-chars", "2000000")
SIZES = ("--data", "embedded", "--model-tag", "m", "--save-every", str(SAVE_EVERY), "--num-iterations", str(STEPS),
         "--hang-s", "20", "--dtype", "float32")  # fmt: skip
PRETRAIN = ("pretrain.py", *SIZES, "--depth", "2", "--aspect-ratio", "32", "--head-dim", "32", "--max-seq-len", "128",
            "--total-batch-size", "1024", "--device-batch-size", "8", "--eval-every", "50", "--eval-tokens", "2048",
            "--core-metric-every", "-1", "--sample-every", "-1")  # fmt: skip
SFT = ("sft.py", *SIZES, "--eval-every", "50", "--eval-tokens", "2048", "--chatcore-every", "-1")
NAMES = {"worker": "RayTrainWorker", "controller": "TrainController", "dealer": "RowDealer", "packing": "PackItems"}

IN_PRETRAINING = {"worker": 4, "controller": 2, "dealer": 2, "packing": 1, "driver": 1}
IN_FINETUNING = {"worker": 4, "controller": 1, "dealer": 1, "packing": 1, "driver": 2, "frozen": 1, "stopped": 1}


def raw_steps(stage: Path) -> list[int]:
    """Training steps in the order in which they were recorded, undone ones among them."""
    path = stage / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = (json.loads(line) for line in lines if line.endswith("}"))
    return [record["step"] for record in records if "train/loss_step" in record]


def lost_steps(stage: Path) -> list[int]:
    """How many steps each restart had to take again."""
    steps = raw_steps(stage)
    return [before + 1 - after for before, after in itertools.pairwise(steps) if after <= before]


@dataclass
class Chaos:
    """One job that is killed at every turn, in part or as a whole, and always has to go on."""

    storage: Path
    command: tuple[str, ...]
    random: random.Random
    kills: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stage = self.storage / "m" / Path(self.command[0]).stem
        self.log = open(self.storage / f"{self.stage.name}.log", "a")
        self.begin()

    def begin(self) -> None:
        self.process = start(self.storage, *self.command, stdout=self.log)

    def kill(self, kind: str) -> None:
        """Wait until training is past its newest checkpoint by a few steps, then kill."""
        seen, ahead = len(raw_steps(self.stage)), self.random.randint(2, 2 * SAVE_EVERY)
        while len(raw_steps(self.stage)) < seen + ahead:
            assert self.process.poll() is None, f"the job ended: {self.said()}"
            time.sleep(0.02)
        if kind == "driver":
            orphans = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            self.process.wait()
            self.begin()
            self.wait_for_life()
            end(orphans)
        elif kind == "stopped":
            self.process.terminate()
            assert self.process.wait(timeout=60) == 130, self.said()
            assert "stopped at step" in self.said()
            self.begin()
            self.wait_for_life()
        elif kind == "frozen":
            self.victim("RayTrainWorker").suspend()
            self.wait_for_life()
        else:
            self.victim(NAMES[kind]).kill()
            if kind != "packing":  # which Ray Data replaces by itself
                self.wait_for_life()
        self.kills.append(kind)

    def said(self) -> str:
        return Path(self.log.name).read_text()[-3000:]

    def victim(self, name: str) -> psutil.Process:
        """The process of this job that a Ray actor lives in."""
        for _ in range(1000):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                try:
                    if name in " ".join(child.cmdline()):
                        return child
                except psutil.NoSuchProcess:
                    continue
            time.sleep(0.02)
        raise AssertionError(f"no process {name}")

    def wait_for_life(self) -> None:
        """Until the job has recorded a step again."""
        before, deadline = len(raw_steps(self.stage)), time.monotonic() + 120
        while len(raw_steps(self.stage)) <= before:
            assert self.process.poll() is None, f"the job ended: {self.said()}"
            assert time.monotonic() < deadline, f"no step for 120 s after {self.kills[-1:]}"
            time.sleep(0.02)

    def finish(self) -> None:
        assert self.process.wait(timeout=200) == 0, self.said()
        self.log.close()


def weights(stage: Path) -> str:
    return hashlib.sha256((stage / "checkpoints" / f"step_{STEPS:06d}" / "model.safetensors").read_bytes()).hexdigest()


def losses(stage: Path) -> dict[int, float]:
    lines = (stage / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return {record["step"]: record["train/loss_step"] for record in records if "train/loss_step" in record}


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> Path:
    """Both stages, undisturbed, in one process with as many threads as the one worker has."""
    storage = tmp_path_factory.mktemp("calm")
    for command in (("tok_train.py", *TOKENIZER), PRETRAIN, SFT):
        code, out = run(storage, *command, "--no-ray", OMP_NUM_THREADS=str(available_cpus()))
        assert code == 0, out
    return storage / "m"


def test_kill_anything(calm, tmp_path):
    code, out = run(tmp_path, "tok_train.py", *TOKENIZER, "--no-ray")
    assert code == 0, out
    chance = random.Random(SEED)
    done = []
    for command, kinds in ((PRETRAIN, IN_PRETRAINING), (SFT, IN_FINETUNING)):
        kinds = [kind for kind, times in kinds.items() for _ in range(times)]
        chance.shuffle(kinds)
        chaos = Chaos(tmp_path, command, chance)
        try:
            for kind in kinds:
                chaos.kill(kind)
            chaos.finish()
        finally:
            end(psutil.Process(os.getpid()).children(recursive=True))
        done += chaos.kills
        assert max(lost_steps(chaos.stage)) <= 2 * SAVE_EVERY  # a checkpoint may be under way when its writer dies
        assert losses(chaos.stage) == losses(calm / chaos.stage.name)
        assert weights(chaos.stage) == weights(calm / chaos.stage.name)
    assert len(done) >= 20 and set(done) == {*NAMES, "driver", "frozen", "stopped"}

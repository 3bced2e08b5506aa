"""base_eval.py --watch: a second job that follows a run's checkpoints, and whose death costs the training nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from nanochat_ray.model.checkpoint import MODEL_FILE, saved_steps, step_folder
from nanochat_ray.report.metrics_log import WATCH_FILE, read_lines, read_metrics
from nanochat_ray.run_dir import CHECKPOINTS, DONE_FILE, METRICS_FILE
from tests.jobs.running import run, start

DEADLINE_S = 120.0
TRAIN = (
    "--no-ray", "--model-tag", "d1", "--depth=1", "--head-dim=16", "--aspect-ratio=32", "--max-seq-len=32",
    "--num-iterations=400", "--total-batch-size=256", "--save-every=100", "--eval-every=-1",
    "--core-metric-every=-1", "--sample-every=-1",
)  # fmt: skip
WATCH = ("--no-ray", "--watch", "d1", "--eval", "bpb,sample", "--split-tokens", "1024")


def tokenized(storage: Path, shards: Path) -> Path:
    flags = ("--no-ray", "--data", str(shards), "--model-tag", "d1", "--vocab-size", "300")
    code, out = run(storage, "tok_train.py", *flags)
    assert code == 0, out
    return storage / "d1" / "pretrain"


@pytest.fixture(scope="module")
def calm(tmp_path_factory, shards):
    """The pretraining that nobody watches: its storage and losses."""
    storage = tmp_path_factory.mktemp("calm")
    stage = tokenized(storage, shards)
    code, out = run(storage, "pretrain.py", *TRAIN)
    assert code == 0, out
    return storage, losses(stage)


def losses(stage: Path) -> list[float]:
    return [record["train/loss_step"] for record in read_metrics(stage / METRICS_FILE) if "train/loss_step" in record]


def watched(stage: Path) -> list[int]:
    return [record["step"] for record in read_lines(stage / WATCH_FILE)]


def wait_until(true, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_watching_job_is_killed_and_started_again_while_the_run_trains(calm, tmp_path, shards):
    watcher = start(tmp_path, "base_eval.py", *WATCH)  # before there is a run
    stage = tokenized(tmp_path, shards)
    trainer = start(tmp_path, "pretrain.py", *TRAIN)
    try:
        wait_until(lambda: watched(stage), watcher)
        watcher.kill()
        watcher.wait()
        assert trainer.wait(DEADLINE_S) == 0, trainer.stdout.read()
    finally:
        for process in (watcher, trainer):
            process.kill()
            process.wait()
    assert losses(stage) == calm[1]
    before = watched(stage)
    code, out = run(tmp_path, "base_eval.py", *WATCH)
    assert code == 0 and "d1: pretraining is done and its checkpoints are evaluated" in out, out
    steps = watched(stage)
    assert steps == sorted(set(steps)) and set(saved_steps(stage / CHECKPOINTS)) <= set(steps) and steps[-1] == 400
    assert [int(step) for step in re.findall(r"step (\d+): evaluating", out)] == [s for s in steps if s not in before]
    for record in read_lines(stage / WATCH_FILE):
        assert 0 < record["val/bpb"] < 10 and 0 < record["train/bpb"] < 10 and record["samples"]

    code, out = run(tmp_path, "base_eval.py", *WATCH)  # nothing is left to do
    assert code == 0 and "evaluating" not in out and watched(stage) == steps
    code, out = run(tmp_path, "report.py", "--model-tag", "d1")
    assert code == 0, out
    report = (tmp_path / "d1" / "report" / "report.md").read_text()
    assert "pretrain_bpb.png" in report
    last = read_lines(stage / WATCH_FILE)[-1]
    assert re.search(rf"\| 400 \|.* {last['val/bpb']:.4f} \|", report)


def test_the_watched_numbers_are_those_of_base_eval(calm):
    storage, _ = calm
    code, out = run(storage, "base_eval.py", *WATCH)
    assert code == 0, out
    code, out = run(storage, "base_eval.py", "--no-ray", "--eval", "bpb", "--split-tokens", "1024")
    assert code == 0, out
    result = json.loads((storage / "d1" / "base_eval" / "result.json").read_text())["metrics"]
    last = read_lines(storage / "d1" / "pretrain" / WATCH_FILE)[-1]
    names = ("step", "val/bpb", "train/bpb", "val/convention")
    assert [last[name] for name in names] == [result[name] for name in names]


def test_corrupt_checkpoints_are_passed_over_and_a_new_one_is_not(calm, tmp_path):
    shutil.copytree(calm[0] / "d1", tmp_path / "d1")
    stage = tmp_path / "d1" / "pretrain"
    (stage / WATCH_FILE).unlink(missing_ok=True)
    (stage / DONE_FILE).unlink()
    early, late = saved_steps(stage / CHECKPOINTS)[-2:]
    weights = step_folder(stage / CHECKPOINTS, early) / MODEL_FILE
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (stage / CHECKPOINTS / "step_000500").mkdir()  # without a manifest
    watcher = start(tmp_path, "base_eval.py", *WATCH)
    try:
        wait_until(lambda: late in watched(stage), watcher)
        time.sleep(2)
        assert early not in watched(stage)
        again = step_folder(stage / CHECKPOINTS, early).with_name("again")  # as a restarted training saves it
        shutil.copytree(step_folder(stage / CHECKPOINTS, early), again)
        (again / MODEL_FILE).write_bytes(whole)
        shutil.rmtree(step_folder(stage / CHECKPOINTS, early))
        again.rename(step_folder(stage / CHECKPOINTS, early))
        wait_until(lambda: early in watched(stage), watcher)
        watcher.terminate()
        out = watcher.stdout.read()
        assert watcher.wait() == 130
    finally:
        watcher.kill()
        watcher.wait()
    assert out.count(f"step {early}: passed over: ") == 1 and "does not match its manifest" in out
    assert out.count("step 500: passed over: ") == 1 and "Traceback" not in out


@pytest.mark.slow
def test_a_run_in_object_storage_is_watched_from_any_machine(calm, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(calm[0] / "d1", store / "d1")
    (store / "d1" / "pretrain" / WATCH_FILE).unlink(missing_ok=True)
    watched_steps = []
    for machine in ("here", "there"):
        (tmp_path / machine).mkdir()
        code, out = run(tmp_path / machine, "base_eval.py", *WATCH, "--storage", f"file://{store}")
        assert code == 0, out
        watched_steps.append([int(step) for step in re.findall(r"step (\d+): evaluating", out)])
    steps = saved_steps(store / "d1" / "pretrain" / CHECKPOINTS)
    assert watched_steps == [steps, []] and watched(store / "d1" / "pretrain") == steps
    code, out = run(tmp_path / "there", "report.py", "--model-tag", "d1", "--storage", f"file://{store}")
    assert code == 0 and "evaluated beside" in (store / "d1" / "report" / "report.md").read_text(), out


def test_a_run_that_never_appears_is_given_up(tmp_path):
    code, out = run(tmp_path, "base_eval.py", *WATCH, "--watch-timeout", "2")
    assert code == 1 and "no sign of life for 2 s" in out and "Traceback" not in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, words", [
    (("--model-tag", "d2"), "one run can be watched"),
    (("--step", "3"), "--step"),
    (("--watch-timeout", "0"), "--watch-timeout"),
])  # fmt: skip
def test_what_a_person_may_get_wrong(tmp_path, flags, words):
    code, out = run(tmp_path, "base_eval.py", "--watch", "d1", *flags)
    assert code == 2 and words in out

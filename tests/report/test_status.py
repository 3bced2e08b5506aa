"""What `jobs/status.py` says of runs in every state, whole and damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat_ray.report.metrics_log import MetricsLog
from nanochat_ray.report.records import StageRecord, write_result
from nanochat_ray.report.status import read_status
from nanochat_ray.report.status_charts import charts_of, svg, thinned, tick_text, ticks
from nanochat_ray.report.status_failures import MAX_CHARS, note_failure, read_failures
from nanochat_ray.report.status_page import page
from nanochat_ray.report.status_text import status_json, status_text
from nanochat_ray.run_dir import Lease, RunDir, write_json

HOSTILE = '<script>alert(1)</script> & "quotes" \x1b[31m'
SETTINGS = {
    "pretrain": {"settings": {"num_iterations": None, "target_param_data_ratio": 12.0}},
    "sft": {"settings": {"num_iterations": None, "num_epochs": 2}},
    "rl": {
        "settings": {"num_iterations": None, "num_epochs": 1, "examples_per_step": 16},
        "task": {"name": "world", "train": {"prompts": 800, "sha256": "x"}},
    },
}


def begin(run: RunDir, stage: str) -> Path:
    folder = run.stage(stage)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", SETTINGS.get(stage, {}))
    return folder


def finish(run: RunDir, stage: str, seconds: float = 3.0) -> None:
    begin(run, stage)
    write_result(run.stage(stage), StageRecord(stage, "2026-01-01T00:00:00+0000", seconds))
    write_json(run.stage(stage) / "_SUCCESS", {})


def train(folder: Path, steps: range, every_s: float = 2.0, starts: bool = False, **metrics: float) -> None:
    """Lines as a stage writes them, the last one written now."""
    log = MetricsLog(folder / "metrics.jsonl")
    begun = time.time() - every_s * (len(steps) - 1)
    if starts:
        log.append({"event": "start", "time": begun - 0.001})
    for k, step in enumerate(steps):
        log.append({"step": step, "time": begun + k * every_s, "train/loss": 5.0 / (step + 1),
                    "train/dt": every_s, "train/tok_per_sec": 1000, **metrics})  # fmt: skip
    log.close()


def save(folder: Path, step: int, **meta: int) -> Path:
    saved = folder / "checkpoints" / f"step_{step:06d}"
    saved.mkdir(parents=True)
    write_json(saved / "meta.json", meta)
    files = {"model.safetensors": {"bytes": 700, "sha256": ""}, "meta.json": {"bytes": 5, "sha256": ""}}
    write_json(saved / "manifest.json", {"version": 1, "files": files})
    return saved


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir(tmp_path / "d1-test")


def test_a_run_that_trains(run):
    finish(run, "tokenizer")
    with Lease.acquire(run.root):
        folder = begin(run, "pretrain")
        status = read_status(run)
        assert (status.state, status.stage) == ("running", "pretrain")
        assert status.current.step is status.current.steps is status.current.eta_s is None
        train(folder, range(40))
        assert read_status(run).current.eta_s is None  # nobody has said yet how many steps there are
        save(folder, 20, num_iterations=100)
        save(folder, 9).joinpath("manifest.json").unlink()
        (folder / "checkpoints" / "step_000030").mkdir()  # being written
        MetricsLog(folder / "metrics.jsonl").append({"step": 40, "val/bpb": 1.25})
        status = read_status(run)
    stage = status.current
    assert (stage.step, stage.steps, stage.done_frac) == (40, 100, 0.4)
    assert stage.step_s == pytest.approx(2.0, abs=0.01) and stage.eta_s == pytest.approx(120, abs=1)
    assert stage.checkpoint.step == 20 and stage.checkpoint.bytes == 705 and stage.checkpoint.age_s < 60
    assert stage.values["val_bpb"] == 1.25 and stage.values["loss"] == 5 / 40 and stage.values["tok_per_sec"] == 1000
    assert status.holder.pid == os.getpid() and status.holder.alive and status.holder.epoch == 1
    assert status.disk_bytes > 1000 and not status.problems and status.restarts == 0
    text = status_text(status)
    assert "step 40 of 100 (40.0 %)" in text and "last checkpoint: step 20" in text and "2 min 00 s to go" in text


def test_steps_of_finetuning_are_epochs_and_of_rl_prompts(run):
    train(begin(run, "sft"), range(30), **{"train/progress": 0.5})
    stage = read_status(run).current
    assert stage.done_frac == 0.25 and stage.eta_s == pytest.approx(2.0 * 30 * 3, abs=1)
    write_json(run.stage("sft") / "_SUCCESS", {})
    rl = begin(run, "rl")
    train(rl, range(10), **{"rollout/reward_mean": 0.5})
    MetricsLog(rl / "metrics.jsonl").append({"step": 0, "eval/reward_mean": 0.25, "eval/greedy": 0.5})
    stage = read_status(run).current
    assert (stage.name, stage.step, stage.steps) == ("rl", 10, 50)
    assert stage.values["reward"] == 0.5 and stage.values["eval_reward"] == 0.25


def test_states(run):
    lease = Lease.acquire(run.root)
    assert read_status(run).state == "running"
    lease.release()
    assert read_status(run).state == "empty"
    finish(run, "tokenizer")
    assert read_status(run).state == "done" and read_status(run).stage is None
    held = json.loads((run.root / "lease.json").read_text())
    gone = held | {"released": False, "pid": 2**22 + 1}  # larger than any process' id
    write_json(run.root / "lease.json", gone)  # killed between two stages
    assert read_status(run).state == "died"
    write_json(run.root / "lease.json", held)
    folder = begin(run, "pretrain")
    assert read_status(run).state == "stopped" and read_status(run).stage == "pretrain"
    write_json(run.root / "lease.json", gone)
    status = read_status(run)
    assert status.state == "died" and not status.holder.alive and "is gone without" in status_text(status)
    other = gone | {"host": "elsewhere|x", "heartbeat": time.time() - 5}
    write_json(run.root / "lease.json", other)
    assert read_status(run).state == "running"
    write_json(run.root / "lease.json", other | {"heartbeat": time.time() - 500})
    assert read_status(run).state == "died"
    write_json(run.root / "lease.json", held)
    note_failure(folder, ValueError("rows do not divide"), held["epoch"], final=True)
    status = read_status(run)
    assert status.state == "failed" and status.last_failure.error == "ValueError: rows do not divide"
    Lease.acquire(run.root).release()  # the next job was stopped
    assert read_status(run).state == "stopped"


def test_restarts_and_failures(run):
    folder = begin(run, "sft")
    train(folder, range(20))
    note_failure(folder, RuntimeError("rank 0: its process died\nbadly"), 1, step=10)
    train(folder, range(10, 30), every_s=1.0, starts=True, **{"train/progress": 0.2})
    stage = read_status(run).current
    assert (stage.restarts, stage.step) == (1, 30)
    assert stage.step_s == pytest.approx(1.0, abs=0.01)  # what was before the restart says nothing of now
    failure = read_status(run).last_failure
    assert (failure.step, failure.final, failure.stage) == (10, False, "sft")
    assert "went on from step 10: RuntimeError: rank 0: its process died badly" in status_text(read_status(run))


def test_notes_of_failures_are_short_and_never_raise(run):
    folder = begin(run, "sft")
    note_failure(folder, "x" * 10 * MAX_CHARS, 1)
    with open(folder / "failures.jsonl", "a") as file:
        file.write('{"time": "never"}\n[]\n{"time": 1.0, "err')
    note_failure(folder, "after a torn line", 2)
    found = read_failures(folder)
    assert [len(found[0].error) < MAX_CHARS + 10, found[1].error] == [True, "after a torn line"]
    shutil.rmtree(folder)
    folder.touch()  # nothing can be written below a file
    note_failure(folder, "nowhere", 3)


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"settings": 3}', "\x00\xff", '{"files": {"a": 1}}'])
@pytest.mark.parametrize("file", [
    "lease.json", "pretrain/config.json", "pretrain/result.json", "pretrain/metrics.jsonl", "pretrain/failures.jsonl",
    "pretrain/watch.jsonl", "pretrain/checkpoints/step_000020/manifest.json",
    "pretrain/checkpoints/step_000020/meta.json",
])  # fmt: skip
def test_damaged_files_are_named_not_fatal(run, file, damage, monkeypatch):
    monkeypatch.setattr("nanochat_ray.run_dir.READ_AGAIN_S", ())
    Lease.acquire(run.root).release()
    folder = begin(run, "pretrain")
    train(folder, range(5))
    write_result(folder, StageRecord("pretrain", "", 1.0))
    save(folder, 10, num_iterations=50)
    save(folder, 20, num_iterations=50)
    (run.root / file).write_text(damage)
    status = read_status(run)
    assert status.state == "stopped" and status.stage == "pretrain"
    if file.endswith("manifest.json"):
        assert status.current.checkpoint.step == 10
    if file in ("lease.json", "pretrain/result.json") and damage != "null":
        assert any(file in problem for problem in status.problems)
    json.loads(status_json(status))
    assert page(status, run).endswith("</html>\n") and status_text(status)


def test_odd_numbers_in_the_metrics(run):
    folder = begin(run, "sft")
    lines = [
        '{"step": 0, "train/loss": null, "time": "x"}', '{"step": true, "train/loss": 1}', '{"step": 1e400}',
        '{"step": "one", "train/loss": 2, "time": 1}', '{"train/loss": 3}', '{"step": 5, "train/loss": NaN}',
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    status = read_status(run)
    assert status.current.step is not None and page(status, run)


def test_the_page_escapes_what_the_run_says(run):
    hostile = RunDir(run.root.parent / "a<b>&c")
    folder = begin(hostile, "pretrain")
    train(folder, range(3))
    note_failure(folder, RuntimeError(HOSTILE), 1)
    (folder / "result.json").write_text('{"stage": "<img src=x>"}')
    status = read_status(hostile)
    html = page(status, hostile, reload_s=5)
    assert "<script" not in html and "<img" not in html and "a<b>" not in html and "&lt;script&gt;" in html
    assert '<meta http-equiv="refresh" content="5">' in html and "http://" not in html and "https://" not in html
    assert "refresh" not in page(status, hostile) and "\x1b" not in status_text(status)


def test_charts():
    records = [{"step": k, "train/loss": 1 / (k + 1), "train/loss_step": float("nan")} for k in range(5000)]
    (chart,) = charts_of(records)
    assert chart.plot.name == "loss" and list(chart.lines) == ["moving average"]
    picture = svg(chart)
    assert len(picture) < 10_000 and "nan" not in picture
    points = [(float(k), float(k % 7)) for k in range(5000)]
    thin = thinned(points)
    assert len(thin) <= 242 and thin[0] == points[0] and thin[-1] == points[-1]
    for records in ([{"step": 3, "train/loss": 2.0}], [{"step": k, "train/loss": 0.0} for k in range(3)]):
        assert "polyline" in svg(charts_of(records)[0])
    assert ticks(0.0, 1.0) == [0.0, 0.5, 1.0] and ticks(0, 3, whole=True) == [0, 1, 2, 3] and ticks(2, 2) == [2]
    assert [tick_text(v) for v in (0, 0.00001, 12345, 2e6, 1.5)] == ["0", "1e-05", "12.35k", "2M", "1.5"]


def test_it_needs_neither_ray_nor_torch():
    code = (
        "import sys, nanochat_ray.report.status_page, nanochat_ray.report.status_text\n"
        "print([name for name in ('torch', 'ray', 'matplotlib', 'wandb') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"

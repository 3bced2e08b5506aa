import json
import os
import subprocess
import sys
import warnings

import pytest

from nanochat_ray.report.metrics_log import MetricsLog, read_metrics
from nanochat_ray.report.tracker import WANDB_ID_FILE, Tracker


def test_without_a_run_there_is_only_the_file(tmp_path):
    with Tracker(tmp_path / "pretrain") as tracker:
        tracker.log(0, {"train/loss": 2.0})
        tracker.log(100, {"train/loss": float("nan")})
    assert [p.name for p in (tmp_path / "pretrain").iterdir()] == ["metrics.jsonl"]
    records = read_metrics(tmp_path / "pretrain" / "metrics.jsonl")
    assert [(r["step"], r["train/loss"]) for r in records] == [(0, 2.0), (100, None)]
    assert all(r["time"] > 0 for r in records)


def test_wandb_is_imported_only_when_asked_for():
    code = "import sys, nanochat_ray.report.tracker as t; assert not {'wandb', 'ray', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("mode", ["offline", None])
def test_wandb_works_offline_and_a_restart_is_the_same_run(tmp_path, mode):
    """Without a mode, and without a key or a server that answers, it goes offline by itself."""
    folder = tmp_path / "sft"
    code = (
        "import sys; from pathlib import Path; from nanochat_ray.report.tracker import Tracker\n"
        "for step in (0, 1):\n"
        "    with Tracker(Path(sys.argv[1]), 'a name', {'depth': 4, 'lr': float('nan')}) as tracker:\n"
        "        tracker.log(step, {'train/loss': 1.0})\n"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    env |= {"WANDB_SILENT": "true", "HOME": str(tmp_path)} | ({"WANDB_MODE": mode} if mode else {})
    subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", code, str(folder)], check=True, env=env)
    run_id = (folder / WANDB_ID_FILE).read_text().strip()
    written = [path.name for path in folder.rglob("*.wandb")]
    assert written == [f"run-{run_id}.wandb"] * 2
    assert len(read_metrics(folder / "metrics.jsonl")) == 2


def test_a_key_without_a_server_is_offline_too(monkeypatch, tmp_path):
    from nanochat_ray.report import tracker

    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # discard; nobody listens
    assert not tracker._can_reach_wandb()


def test_a_failure_warns_once_and_training_goes_on(tmp_path, monkeypatch):
    def full(self, record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MetricsLog, "append", full)
    with pytest.warns(RuntimeWarning, match="No space left") as caught:
        with Tracker(tmp_path) as tracker:
            tracker.log(0, {"a": 1})
            tracker.log(1, {"a": 1})
    assert len(caught) == 1


def test_a_folder_that_cannot_be_made_warns(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match=r"no metrics\.jsonl"):
        tracker = Tracker(tmp_path / "file" / "stage")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker.log(0, {"a": 1})
        tracker.finish()


def test_lines_are_plain_json_objects(tmp_path):
    with Tracker(tmp_path) as tracker:
        tracker.log(3, {"samples": ["a", "b"], "centered_results": {"arc": 0.5}})
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert record["samples"] == ["a", "b"] and record["centered_results"] == {"arc": 0.5}

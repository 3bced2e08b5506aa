import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings

import pytest

from nanochat_ray.report.metrics_log import WATCH_FILE, MetricsLog, read_metrics
from nanochat_ray.report.tracker import Tracker
from nanochat_ray.report.uploader import STATE_FILE, can_reach_wandb
from nanochat_ray.run_dir import METRICS_FILE
from tests.report.offline_wandb import runs

STAGE = """
import os, signal, sys, time
from pathlib import Path
from nanochat_ray.report.tracker import Tracker
folder, first, stop, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
tracker = Tracker(folder, "a name", {"depth": 4, "lr": float("nan")})
for step in range(first, stop):
    if step % 4 == 0:
        tracker.log(step, {"val/bpb": 1.0, "samples": [{"prompt": "a", "text": "b"}]})
    tracker.log(step, {"train/loss": 2.0 + step})
if end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
tracker.finish()
"""


def stage(folder, first, stop, end="finish", mode="offline"):
    """A stage in a process of its own that trains steps [first, stop) and then ends well or is killed."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    env |= {"WANDB_SILENT": "true", "HOME": str(folder.parent)} | ({"WANDB_MODE": mode} if mode else {})
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", STAGE, str(folder), str(first), str(stop), end]
    done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True)
    assert done.returncode == (-signal.SIGKILL if end == "kill" else 0), done.stderr


def test_without_a_run_there_is_only_the_file(tmp_path):
    with Tracker(tmp_path / "pretrain") as tracker:
        tracker.log(0, {"train/loss": 2.0})
        tracker.log(100, {"train/loss": float("nan")})
    assert [p.name for p in (tmp_path / "pretrain").iterdir()] == ["metrics.jsonl"]
    records = read_metrics(tmp_path / "pretrain" / "metrics.jsonl")
    assert [(r["step"], r["train/loss"]) for r in records] == [(0, 2.0), (100, None)]
    assert all(r["time"] > 0 for r in records)


def test_a_later_start_is_marked(tmp_path):
    for step in (0, 1, 2):
        with Tracker(tmp_path) as tracker:
            tracker.log(step, {"train/loss": 2.0})
    records = read_metrics(tmp_path / METRICS_FILE)
    assert [record.get("event", record.get("step")) for record in records] == [0, "start", 1, "start", 2]


def test_wandb_is_never_loaded_in_the_training_process():
    code = "import sys, nanochat_ray.report.tracker as t; assert not {'wandb', 'ray', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_killed_twice_it_is_one_run_with_each_point_once(tmp_path):
    folder = tmp_path / "pretrain"
    stage(folder, 0, 10, "kill")
    stage(folder, 8, 14, "kill")  # from the checkpoint at step 8
    stage(folder, 4, 20)
    written = runs(folder)
    assert len(written) == 3
    assert {run_id for run_id, _ in written} == {json.loads((folder / STATE_FILE).read_text())["id"]}
    rows = [row for _, part in written for row in part]
    counter = [row["_step"] for row in rows]
    assert counter == sorted(set(counter))
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(20))
    assert [row["step"] for row in rows if "val/bpb" in row] == [0, 4, 8, 12, 16]
    assert all(row["train/loss"] == 2.0 + row["step"] for row in rows if "train/loss" in row)


def test_a_watching_jobs_numbers_join_the_run(tmp_path):
    folder = tmp_path / "pretrain"
    stage(folder, 0, 6)
    watch = MetricsLog(folder / WATCH_FILE)
    for step in (2, 4, 2):  # behind the training, and one of them twice
        watch.append({"step": step, "core_metric": step / 100})
    watch.close()
    stage(folder, 6, 8)
    rows = [row for _, part in runs(folder) for row in part]
    assert [(row["step"], row["core_metric"]) for row in rows if "core_metric" in row] == [(2, 0.02), (4, 0.04)]
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(8))


def test_without_a_key_it_goes_offline_by_itself(tmp_path):
    stage(tmp_path / "sft", 0, 2, mode=None)
    assert [len(rows) for _, rows in runs(tmp_path / "sft")] == [3]


def test_a_run_that_is_named_later_has_all_that_came_before(tmp_path):
    with Tracker(tmp_path / "sft") as tracker:
        tracker.log(0, {"train/loss": 1.0})
    stage(tmp_path / "sft", 1, 3)
    assert [row["step"] for _, rows in runs(tmp_path / "sft") for row in rows if "train/loss" in row] == [0, 1, 2]


def test_a_key_without_a_server_is_offline_too(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # discard; nobody listens
    assert not can_reach_wandb()


@pytest.fixture
def dead_server():
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    taken.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        for connection in taken:
            connection.close()


@pytest.mark.slow
def test_a_server_that_never_answers_holds_nothing_up(tmp_path, monkeypatch, dead_server):
    from nanochat_ray.report import uploader

    monkeypatch.setattr(uploader, "FINISH_TIMEOUT_S", 1.0)  # of the side that waits
    for name, value in {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": dead_server, "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    begun = time.monotonic()
    tracker = Tracker(tmp_path / "sft", "a name")
    for step in range(100):
        tracker.log(step, {"train/loss": 1.0})
    assert time.monotonic() - begun < 5
    with pytest.warns(RuntimeWarning, match="did not finish"):
        tracker.finish()
    assert time.monotonic() - begun < 15
    assert len(read_metrics(tmp_path / "sft" / METRICS_FILE)) == 100


def test_an_uploader_that_dies_warns_once_and_training_goes_on(tmp_path, monkeypatch):
    from nanochat_ray.report import tracker as module

    monkeypatch.setattr(module, "CHECK_INTERVAL_S", 0.0)
    (tmp_path / STATE_FILE).write_text("{")  # which it cannot read
    tracker = Tracker(tmp_path, "a name")
    with pytest.warns(RuntimeWarning, match=r"code 1, see .*wandb\.log") as caught:
        tracker._uploader._process.wait()
        tracker.log(0, {"a": 1})
        tracker.log(1, {"a": 1})
    tracker_warnings = [warning for warning in caught if "wandb is off" in str(warning.message)]
    assert len(tracker_warnings) == 1 and len(read_metrics(tmp_path / METRICS_FILE)) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tracker.finish()


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

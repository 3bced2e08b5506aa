"""A node joins and is used, a node is lost and training goes on: the loss curve stays that of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat_ray.report.metrics_log import read_metrics
from nanochat_ray.run_dir import METRICS_FILE
from tests.chaos.nodes import SETTINGS, STEPS
from tests.stages.tiny import Recorder, make_run, run_pretrain

pytestmark = pytest.mark.slow
HOME = Path(__file__).parent.parent.parent


def test_a_node_comes_and_is_lost(tmp_path, shards):
    job, rows = make_run(tmp_path / "plain", shards, SETTINGS)
    plain = Recorder(job.stage_folder)
    run_pretrain(job, rows, plain)

    env = os.environ | {"PYTHONPATH": str(HOME), "RAY_AUTH_MODE": "disabled",
           "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}  # fmt: skip
    outcome = tmp_path / "outcome.json"
    paths = [str(tmp_path / "nodes"), str(shards), str(outcome)]
    code = "import sys; from pathlib import Path; from tests.chaos.nodes import main; main(*map(Path, sys.argv[1:]))"
    command = [sys.executable, "-c", code, *paths]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    result = json.loads(outcome.read_text())  # not from its output, where Ray has its say about the lost node
    assert (result["status"], result["step"]) == ("done", STEPS)
    assert result["launches"] >= 3, done.stderr[-4000:]

    records = read_metrics(tmp_path / "nodes" / "pretrain" / METRICS_FILE)
    losses = [record["train/loss_step"] for record in records if "train/loss_step" in record]
    assert losses == pytest.approx(plain.losses, rel=1e-2)

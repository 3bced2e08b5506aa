"""A rank without a sign of life writes down its stacks and ends."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from nanochat_ray.train.watchdog import Watchdog

HANGS = """
import sys, time
from pathlib import Path
from nanochat_ray.train.watchdog import Watchdog
def stuck_in_a_collective():
    {stuck}
with Watchdog(Path(sys.argv[1]), 3, 1.0) as watchdog:
    for _ in watchdog.watched(iter(range(4))): time.sleep(0.4)
    print("alive", flush=True)
    stuck_in_a_collective()
"""


@pytest.mark.parametrize(
    "stuck", ["time.sleep(60)", "import ctypes; ctypes.PyDLL(None).sleep(60)"], ids=["waits", "holds the interpreter"]
)
def test_a_hung_rank_ends_and_says_where_it_stood(tmp_path, stuck):
    command = [sys.executable, "-c", HANGS.format(stuck=stuck), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout) == (1, "alive\n")
    assert "stuck_in_a_collective" in (tmp_path / "stacks" / "rank3.txt").read_text()


def test_a_rank_that_is_done_is_left_alone(tmp_path):
    with Watchdog(tmp_path, 0, 0.2) as watchdog:
        watchdog.beat()
    time.sleep(0.5)
    assert not list(tmp_path.glob("stacks/*"))

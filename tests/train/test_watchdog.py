"""A rank without a sign of life writes down its stacks and ends."""

from __future__ import annotations

import subprocess
import sys
import time

from nanochat_ray.train.watchdog import EXIT_HUNG, Watchdog

HANGS = """
import sys, threading, time
from pathlib import Path
from nanochat_ray.train.watchdog import Watchdog
def stuck_in_a_collective(): time.sleep(60)
with Watchdog(Path(sys.argv[1]), 3, 0.5) as watchdog:
    for _ in watchdog.watched(iter(range(4))): time.sleep(0.2)
    print("alive", flush=True)
    stuck_in_a_collective()
"""


def test_a_hung_rank_ends_and_says_where_it_stood(tmp_path):
    done = subprocess.run([sys.executable, "-c", HANGS, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (EXIT_HUNG, "alive\n")
    text = (tmp_path / "stacks" / "rank3.txt").read_text()
    assert "rank 3: no sign of life" in text and "stuck_in_a_collective" in text


def test_a_rank_that_is_done_is_left_alone(tmp_path):
    with Watchdog(tmp_path, 0, 0.2) as watchdog:
        watchdog.beat()
    time.sleep(0.5)
    assert not list(tmp_path.iterdir())

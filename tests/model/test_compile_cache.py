"""A restarted process takes the compiled code from the cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

COMPILE_ONCE = """
import json, torch
from torch._dynamo.utils import counters
from nanochat_ray.model.ops import rms_norm
from nanochat_ray.model.precision import prepare_device
prepare_device("cpu")
torch.compile(lambda x: rms_norm(x, 1e-6))(torch.ones(2, 8))
print(json.dumps([counters["inductor"][f"fxgraph_cache_{what}"] for what in ("hit", "miss")]))
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_a_restart_compiles_nothing_again(tmp_path):
    def run() -> list[int]:
        env = os.environ | {"HOME": str(tmp_path)}
        env.pop("TORCHINDUCTOR_CACHE_DIR", None)
        command = [sys.executable, "-c", COMPILE_ONCE]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    assert run() == [0, 1]
    assert run() == [1, 0]

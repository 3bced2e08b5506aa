import subprocess
import sys

import numpy as np

from nanochat_ray.report.environment import UNKNOWN, _git, cost, describe_environment, peak_memory_bytes


def test_this_machine():
    env = describe_environment()
    assert env.cpus_logical and env.cpus_logical >= 1 and env.ram_bytes > 2**28
    assert env.python == ".".join(map(str, sys.version_info[:3])) and env.torch != UNKNOWN and env.ray.startswith("2.")
    assert sum(env.gpus.values()) >= 0 and (env.vram_bytes > 0) == bool(env.gpus)


def test_the_commit_is_of_the_code_and_of_nothing_around_it(tmp_path):
    """A submitted job runs from a copy without .git, which may even lie inside somebody else's repository."""
    code = tmp_path / "package" / "code.py"
    code.parent.mkdir()
    code.write_text("")

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    unknown = (UNKNOWN, UNKNOWN, None)
    assert _git(code) == unknown
    git("init", "-b", "trunk")
    git("commit", "--allow-empty", "-m", "first")
    assert _git(code) == unknown
    git("add", "package")
    git("commit", "-m", "second")
    assert _git(code) == ("trunk", git("rev-parse", "--short", "HEAD"), False)
    (tmp_path / "untracked").write_text("")
    assert _git(code)[2] is False
    code.write_text("pass\n")
    assert _git(code)[2] is True


def test_no_git_is_no_crash(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _git(tmp_path / "code.py") == (UNKNOWN, UNKNOWN, None)
    assert describe_environment().gpus == {}


def test_peak_memory_never_falls():
    before = peak_memory_bytes()
    block = np.ones(16 * 2**20, np.uint8)
    assert peak_memory_bytes() >= max(before, block.nbytes)


def test_cost():
    assert cost(24.0, 5400) == 36.0 and cost(0.0, 60) == 0.0 and cost(None, 60) is None

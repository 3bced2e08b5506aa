"""The script that makes the environment of these tests, with a stand-in for Python that writes down its calls."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = "tests/vllm/environment.sh"
PYTHON = """#!/bin/sh
echo "$@" >>"$LOG"
if [ "$1 $2" = "-m venv" ]; then rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python"; fi
"""


def checkout(folder: Path) -> Path:
    (folder / SCRIPT).parent.mkdir(parents=True)
    for name in (SCRIPT, "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.mark.skipif(shutil.which("flock") is None, reason="there is no flock here")
def test_another_checkout_takes_the_place_of_the_last_one_and_a_new_recipe_begins_anew(tmp_path: Path) -> None:
    log, python = tmp_path / "log", tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(PYTHON)
    python.chmod(0o755)
    env = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}", "LOG": str(log)}

    def calls(root: Path) -> list[str]:
        log.write_text("")
        subprocess.run([root / SCRIPT, tmp_path / "deep" / "folder"], env=env, check=True, timeout=60)
        return [line for line in log.read_text().splitlines() if line != "--version"]

    one, two = checkout(tmp_path / "one"), checkout(tmp_path / "two")
    made = calls(one)
    assert any("venv --clear" in line for line in made) and any(f"-e {one}[tests]" in line for line in made)
    assert calls(one) == []
    assert calls(two) == [f"-m pip install -q --no-deps -e {two}"]
    assert calls(two) == []
    with open(two / "pyproject.toml", "a") as file:
        file.write("\n# other requirements\n")
    assert any("venv --clear" in line for line in calls(two))

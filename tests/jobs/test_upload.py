"""What `ray job submit --working-dir .` uploads: what a job needs, and little else."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from pathlib import Path

from ray._private.runtime_env.packaging import create_package

PROJECT = Path(__file__).parent.parent.parent
AT_MOST_BYTES = 2_500_000


def test_the_upload_is_small_and_has_what_jobs_need(tmp_path):
    copy = tmp_path / "project"
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=PROJECT,
                            capture_output=True)  # fmt: skip
    names = [name for name in listed.stdout.decode().split("\0") if name]
    for name in names or [str(path.relative_to(PROJECT)) for path in PROJECT.rglob("*.py")]:
        if (PROJECT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, copy / name)
    shutil.copy(PROJECT / ".rayignore", copy / ".rayignore")
    for litter in (".venv/lib/big.bin", ".git/objects/pack", "wandb/run", "tests/big.bin", ".cache/x"):
        (copy / litter).parent.mkdir(parents=True, exist_ok=True)
        (copy / litter).write_bytes(b"x" * 10)
    package = tmp_path / "package.zip"
    create_package(str(copy), package, include_gitignore=True)
    packed = set(zipfile.ZipFile(package).namelist())
    top = {name.split("/")[0] for name in packed}
    assert {"nanochat_ray", "jobs", "serve_configs", "pyproject.toml"} <= top
    assert not top & {".git", ".venv", "tests", "dev", "bench", "wandb", ".cache"}
    needed = {name for name in names if name.startswith(("nanochat_ray/", "jobs/")) and (PROJECT / name).is_file()}
    assert needed <= packed
    assert package.stat().st_size < AT_MOST_BYTES

"""The real `ray up`, `ray job submit`, `ray down` with our cluster file: a fake Lambda whose instances have an sshd."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cloud.fake_lambda import KEY, LAUNCH, FakeLambda, serve
from tests.cluster.hosts import Host, hosts, require_hosts

CLUSTER = Path(__file__).parents[2] / "cluster"
COMMAND_S = 540
JOB = """
import os
from pathlib import Path

import ray

ray.init()


@ray.remote(num_gpus=1, num_cpus=0)
def where() -> str:
    return f"{os.uname().nodename} {os.getcwd()} {Path('jobs/where.py').read_text() == Path(__file__).read_text()}"


folder = Path(os.environ["NANOCHAT_BASE_DIR"])
folder.mkdir(parents=True, exist_ok=True)
(folder / "answer.txt").write_text(f"{os.uname().nodename} {ray.get(where.remote())}")
"""


def file_for(machines: list[Host], url: str, shared: Path) -> dict[str, Any]:
    """Our file with another cloud, other machines, and Python as it is here instead of a new environment."""
    config = yaml.safe_load((CLUSTER / "lambda_workers.yaml").read_text())
    config["provider"]["api_url"] = url
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(machines[0].key)}
    config["available_node_types"]["head"]["resources"] = {"CPU": 1}
    config["available_node_types"]["gpus"]["resources"] = {"CPU": 1, "GPU": 8}
    environment, *others = config["setup_commands"]
    environment = environment.replace("$HOME/.nanochat-ray/bin", str(Path(sys.executable).parent))
    environment = environment.replace("/lambda/nfs/my-files/", f"{shared}/")
    made_here = ("uv", "mountpoint", "apt-get")  # what these machines have, or have not
    config["setup_commands"] = [environment, *(each for each in others if not any(it in each for it in made_here))]
    config["head_setup_commands"] = config["worker_setup_commands"] = []
    return config


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_up_a_job_on_a_worker_and_down(tmp_path):
    require_hosts()
    home, project, shared = tmp_path / "home", tmp_path / "project", tmp_path / "shared"
    texts = {
        home / ".lambda_cloud/api_key": KEY, home / ".ray/auth_token": "0123456789abcdef" * 4,
        project / "jobs/where.py": JOB, project / "pyproject.toml": "", project / "nanochat_ray/__init__.py": "",
        project / ".venv/big": "x", shared / "here": "",
    }  # fmt: skip
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with hosts(2) as machines, serve(FakeLambda(scale=1.0), machines[0].address.rpartition(".")[0] + ".1") as cloud:
        cloud.ssh_keys["my-key"] = machines[0].key.with_suffix(".pub").read_text()
        cloud.addresses = lambda n: (machines[n].address,) * 2
        path = tmp_path / "lambda_workers.yaml"
        path.write_text(yaml.safe_dump(file_for(machines, cloud.url, shared)))
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "NANOCHAT_"))}
        env = kept | {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
        log = tmp_path / "log.txt"

        def ray(*arguments: str) -> int:
            with open(log, "a") as out:
                return subprocess.run(
                    [sys.executable, "-m", "ray.scripts.scripts", *arguments], cwd=project, env=env,
                    stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, timeout=COMMAND_S,
                ).returncode  # fmt: skip

        assert ray("up", "-y", "--no-config-cache", str(path)) == 0, log.read_text()[-5000:]
        assert len(cloud.alive()) == 1
        told = machines[0].ssh("ray job submit -- python jobs/where.py", COMMAND_S)
        assert told.returncode == 0, told.stdout[-5000:] + told.stderr[-3000:]
        folder = f"{machines[1].home}/nanochat-ray"
        answer = (shared / "nanochat-ray/answer.txt").read_text()
        assert answer == f"host0 host1 {folder} True"  # asked on the head, answered on the worker, from the same file
        assert cloud.count(LAUNCH) == 2 and len(cloud.alive()) == 2
        copied = machines[1].home
        assert not (copied / ".lambda_cloud/api_key").exists() and not (copied / "nanochat-ray/.venv").exists()
        assert ray("down", "-y", str(path)) == 0, log.read_text()[-5000:]
        assert cloud.alive() == [] and cloud.violations == []
        assert KEY not in log.read_text()

"""What lies in cluster/: files by Ray's own schema, scripts by the shell, the names in the texts by what there is."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import prepare_config, validate_config

PROJECT = Path(__file__).parent.parent.parent
FOLDER = PROJECT / "cluster"
FILES = sorted(FOLDER.glob("*.yaml"))
OURS = [path for path in FILES if not path.name.startswith("lambda")]
SCRIPTS = sorted(FOLDER.rglob("*.sh"))
TEXTS = [*FILES, *SCRIPTS, FOLDER / "README.md", *sorted((FOLDER / "kuberay").iterdir())]
HOME_IN_CLUSTER = "~/nanochat-ray"


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def with_resources(config: dict[str, Any]) -> dict[str, Any]:
    """As a provider does that looks them up."""
    for kind in config.get("available_node_types", {}).values():
        kind.setdefault("resources", {"CPU": 1})
    return config


def start_lines(config: dict[str, Any]) -> list[str]:
    lines = config["head_start_ray_commands"] + config.get("worker_start_ray_commands", [])
    return [line for line in lines if "ray start" in line]


def test_the_files_that_the_readme_promises_are_there():
    assert {"aws.yaml", "gcp.yaml", "lambda.yaml", "lambda_workers.yaml", "local.yaml"} == {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_ray_takes_it(path):
    validate_config(prepare_config(with_resources(read(path))))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
@pytest.mark.parametrize(
    "change",
    [{"head_start_command": []}, {"min_workerz": 1}, {"provider": {"type": "lambda"}}, {"idle_timeout_minutes": "1h"}],
    ids=str,
)
def test_ray_refuses_a_fault(path, change):
    with pytest.raises((jsonschema.ValidationError, ValueError, click.ClickException, NotImplementedError)):
        validate_config(prepare_config(with_resources(read(path)) | change))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_cluster_has_the_project_the_token_and_one_environment(path):
    config = read(path)
    assert config["file_mounts"][HOME_IN_CLUSTER] == "."
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    left_out = config["rsync_exclude"]
    assert ".venv/" in left_out and not any(".git" in name for name in left_out)
    setup = "\n".join(config["setup_commands"])
    assert "export RAY_AUTH_MODE=token" in setup and "chmod 600 ~/.ray/auth_token" in setup
    assert "export PATH=$HOME/.nanochat-ray/bin:" in setup and "NANOCHAT_BASE_DIR=" in setup
    every = "\n".join(config["setup_commands"] + config.get("head_setup_commands", []))
    assert f"-e {HOME_IN_CLUSTER}" in every
    lines = start_lines(config)
    assert lines and sum("--head" in line for line in lines) == 1
    for line in lines:
        assert line.startswith(f"cd {HOME_IN_CLUSTER} && ")  # so a bare `ray job submit -- python jobs/...` finds them
        assert "--metrics-export-port=8080" in line and "unset OMP_NUM_THREADS" in line
        assert "--dashboard-host=127.0.0.1" in line or "--head" not in line


def setup_line(path: Path, word: str) -> str:
    (line,) = (line for line in read(path)["setup_commands"] if word in line)
    return line


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_another_folder_than_the_project_is_refused(path, tmp_path):
    line = setup_line(path, "pyproject.toml")
    assert read(path)["setup_commands"][0] == line
    env = os.environ | {"HOME": str(tmp_path)}
    done = subprocess.run(["bash", "-c", line], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "run `ray up` in its folder" in done.stdout
    (tmp_path / "nanochat-ray").mkdir()
    (tmp_path / "nanochat-ray" / "pyproject.toml").touch()
    assert subprocess.run(["bash", "-c", line], env=env).returncode == 0


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_gpus_that_torch_cannot_use_are_an_error_of_the_setup(path, tmp_path):
    line = setup_line(path, "torch.cuda.is_available()")
    for name in ("vendor", "torch.py"):
        (tmp_path / name).touch()
    line = line.replace("/sys/bus/pci/devices/*/vendor", str(tmp_path / "vendor"))
    line = line.replace("~/.nanochat-ray/bin/python", f"PYTHONPATH={tmp_path} {sys.executable}")

    def code(vendor: str, works: bool) -> int:
        (tmp_path / "vendor").write_text(vendor)
        (tmp_path / "torch.py").write_text(f"__version__ = '2'\nclass cuda:\n    is_available = lambda: {works}\n")
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
        assert ("580 or later" in done.stderr) == bool(done.returncode)
        return done.returncode

    assert (code("0x10de\n", False), code("0x10de\n", True), code("0x8086\n", False)) == (1, 0, 0)


def test_keys_of_the_chat_stay_where_they_are(tmp_path):
    for path in FILES:
        assert "api_keys" in read(path)["rsync_exclude"]
    assert "**/api_keys" in (FOLDER / "kuberay" / "Dockerfile.dockerignore").read_text().split()
    for name in (".gitignore", ".rayignore"):
        shutil.copy(PROJECT / name, tmp_path / name)
        for key in (tmp_path / "api_keys", tmp_path / "serve_configs" / "api_keys"):
            key.parent.mkdir(exist_ok=True)
            key.write_text("secret")
        (tmp_path / "kept.py").touch()
        create_package(str(tmp_path), tmp_path.parent / "package.zip", include_gitignore=name == ".gitignore")
        packed = zipfile.ZipFile(tmp_path.parent / "package.zip").namelist()
        assert "kept.py" in packed and not any("api_keys" in each for each in packed)
        (tmp_path / name).unlink()


@pytest.mark.slow
def test_ray_makes_the_role_of_the_head_and_workers_may_have_it(monkeypatch):
    import boto3
    import moto
    from ray.autoscaler._private.aws import config as ray_aws

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setattr(ray_aws.time, "sleep", lambda _: None)
    config = read(FOLDER / "aws.yaml") | {"head_node": {}}
    workers = config["available_node_types"]["gpus"]["node_config"]["IamInstanceProfile"]["Name"]
    (policy,) = re.findall(r"--policy-document '(.*?)'", (FOLDER / "README.md").read_text(), re.S)
    with moto.mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        made = ray_aws._configure_iam_role(config)["head_node"]["IamInstanceProfile"]["Arn"]
        iam = boto3.client("iam", config["provider"]["region"])
        profile = iam.get_instance_profile(InstanceProfileName=workers)["InstanceProfile"]
        (role,) = profile["Roles"]
        assert profile["Arn"] == made
        iam.put_role_policy(RoleName=role["RoleName"], PolicyName="pass-itself", PolicyDocument=policy)
        assert json.loads(policy)["Statement"][0]["Resource"] == "arn:aws:iam::*:role/" + role["RoleName"]


def test_disks_are_in_the_zone_of_the_machines():
    config = read(FOLDER / "gcp.yaml")
    for kind in config["available_node_types"].values():
        for disk in kind["node_config"]["disks"]:
            assert f"zones/{config['provider']['availability_zone']}/" in disk["initializeParams"]["diskType"]


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_clouds_say_what_a_machine_has(name):
    for kind in read(FOLDER / name)["available_node_types"].values():
        assert kind["resources"]["GPU"] == 8 and kind["resources"]["CPU"] > 64


def test_machines_end_for_good():
    for name in ("aws.yaml", "gcp.yaml"):
        assert read(FOLDER / name)["provider"]["cache_stopped_nodes"] is False


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shells_read_the_scripts(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck"):
        found = subprocess.run(["shellcheck", "--severity=warning", str(path)], capture_output=True, text=True)
        assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_files_named_in_the_texts_are_there(path):
    text = path.read_text()
    names = set(re.findall(r"\b(?:cluster|jobs|serve_configs|nanochat_ray)/[\w/.-]*\w\.(?:ya?ml|py|sh|json)\b", text))
    names |= {f"cluster/{name}" for name in re.findall(r"`((?:kuberay/)?[\w-]+\.(?:yaml|sh))`", text)}
    assert [name for name in sorted(names) if not (PROJECT / name).exists()] == []


def test_the_readme_has_every_file():
    text = (FOLDER / "README.md").read_text()
    assert [path.name for path in (*FILES, *SCRIPTS) if f"`{path.name}`" not in text] == []

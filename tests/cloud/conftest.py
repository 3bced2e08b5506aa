"""A fake Lambda, a computer of one's own with key and project, and the provider's clock made fast."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nanochat_ray.cloud.lambda_provider import LambdaNodeProvider
from nanochat_ray.cloud.pace import Times
from tests.cloud.fake_lambda import KEY, FakeLambda, serve

FAST = 0.005
PATIENT = {"patience_s": 60.0, "end_s": 60.0, "boot_s": 60.0, "appear_s": 60.0}  # machines that test are busy


@pytest.fixture
def cloud(monkeypatch) -> Iterator[FakeLambda]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serve(FakeLambda(FAST)) as fake:
        yield fake
    assert fake.violations == []


@pytest.fixture
def times(monkeypatch) -> Times:
    fast = replace(Times().scaled(FAST), **PATIENT)
    monkeypatch.setattr(LambdaNodeProvider, "times", fast)
    return fast


@pytest.fixture(scope="session")
def ssh_key(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("key") / "id_ed25519"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path


@pytest.fixture
def home(tmp_path, monkeypatch, cloud, ssh_key) -> Path:
    """A home folder with all that the cluster files name, known to the cloud."""
    folder = tmp_path / "home"
    for name, text in {".lambda_cloud/api_key": KEY, ".ray/auth_token": "t" * 64}.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
    (folder / ".ssh").mkdir()
    (folder / ".ssh/id_ed25519").write_bytes(ssh_key.read_bytes())
    (folder / ".ssh/id_ed25519").chmod(0o600)
    project = tmp_path / "project"
    (project / "nanochat_ray").mkdir(parents=True)
    (project / "pyproject.toml").touch()
    monkeypatch.chdir(project)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("LAMBDA_API_KEY", raising=False)
    cloud.ssh_keys["my-key"] = ssh_key.with_suffix(".pub").read_text()
    return folder

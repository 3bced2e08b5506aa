"""Runs whose storage is a URI: a store that answers like s3, and a folder."""

from __future__ import annotations

import pytest

from nanochat_ray import run_dir as run_dir_module

RUNS = iter(range(1000))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(run_dir_module, "SETTLE_S", 0.05)


@pytest.fixture(params=["s3", "file"])
def uri(request, tmp_path):
    """An empty place in each kind of store."""
    if request.param == "file":
        return f"file://{tmp_path}/store"
    return request.getfixturevalue("s3_server")(f"runs{next(RUNS)}")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Switch to another machine: an empty cache of its own and another name."""

    def switch(name: str, same_host: bool = True) -> None:
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / name))
        if not same_host:
            monkeypatch.setattr(run_dir_module, "host_identity", lambda: f"{name}|boot|pid")

    switch("here")
    return switch

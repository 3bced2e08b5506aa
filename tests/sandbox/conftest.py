"""Both isolations, and a nonce by which the processes of a test can be found."""

from __future__ import annotations

import secrets

import pytest

from nanochat_ray.sandbox import isolation as isolations
from nanochat_ray.sandbox import process, program
from nanochat_ray.sandbox.isolation import Isolation
from tests.sandbox.isolated import require


@pytest.fixture(params=["bwrap", "unshare"])
def isolation(request) -> Isolation:
    require(request.param)
    return request.param


@pytest.fixture
def nonce(monkeypatch) -> str:
    """A text that stands in the environment of every process of this test's programs."""
    text = secrets.token_hex(8)
    monkeypatch.setitem(process.ENVIRONMENT, "NONCE", text)
    return text


@pytest.fixture
def without_filter(monkeypatch) -> None:
    """As on a machine where neither seccomp nor pyseccomp is installed."""
    for module in (process, program, isolations):
        monkeypatch.setattr(module, "filter_bytes", lambda: b"")

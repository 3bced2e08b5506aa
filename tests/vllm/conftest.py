"""vLLM in this process, and none left behind. Nothing here imports it before a test wants it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# In this process, so that its errors are the tests' and new weights are read as they lie.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip by name without vLLM; with NANOCHAT_RAY_NEED_VLLM=1 fail instead."""
    if item.get_closest_marker("vllm") and importlib.util.find_spec("vllm") is None:
        if os.environ.get("NANOCHAT_RAY_NEED_VLLM") == "1":
            pytest.fail("vLLM is not installed here: tests/vllm/environment.sh makes an environment that has it")
        pytest.skip("vLLM is not installed here")


@pytest.fixture(scope="module")
def vllm_environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def start_llm(vllm_environment: None) -> Iterator[Callable[..., Any]]:
    """Start a vllm.LLM with these arguments. There is one at a time: starting the next one ends the last one."""
    running: list[Any] = []

    def stop() -> None:
        while running:
            running.pop().llm_engine.engine_core.shutdown()

    def start(**arguments: Any) -> Any:
        stop()
        from vllm import LLM

        running.append(LLM(**arguments))
        return running[-1]

    yield start
    stop()

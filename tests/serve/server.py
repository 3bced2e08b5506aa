"""The application on the session's cluster, deployed as a config file would."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai

EDGE = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "nanochat_ray.serve.edge:middlewares"}
DEADLINE_S = 60.0
ASK: Any = {"model": "d1-test-sft", "messages": [{"role": "user", "content": "What is the name of the river?"}]}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


class Server:
    """The application on the session's cluster, as a config file deploys it."""

    def __init__(self, storage: Path, args: dict[str, Any]) -> None:
        from ray import serve

        self.storage, self.port = storage, free_port()
        self.args = {"storage": str(storage), "cpus": 1, "kv_memory_gb": 0.05, **args}
        http_options = {"host": "127.0.0.1", "port": self.port}
        serve.start(http_options=http_options, controller_options={"runtime_env": {"env_vars": EDGE}})
        self.deploy(None)
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def deploy(self, user_config: dict[str, Any] | None) -> None:
        """What `serve run` does with a config."""
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        deployments = [{"name": "ChatServer", "user_config": user_config}] if user_config is not None else []
        application = {"name": "chat", "import_path": "nanochat_ray.serve.app:build", "args": self.args}
        application["deployments"] = deployments
        config = ServeDeploySchema.model_validate({"applications": [application]})
        _get_global_client().deploy_apps(config, _blocking=True)

    def stats(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/stats", timeout=10).json()

    def lineage(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/v1/models/{ASK['model']}", timeout=10).json()["lineage"]

    def until_idle(self) -> dict[str, Any]:
        return until(lambda: (stats := self.stats())["running"] == stats["waiting"] == 0 and stats)

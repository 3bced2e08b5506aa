"""serve_configs/: valid for Serve, without a key that Serve would pass over, and with arguments that `build` takes."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, SecretStr, ValidationError
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    LoggingConfig,
    ServeApplicationSchema,
    ServeDeploySchema,
)

from nanochat_ray.serve import app
from nanochat_ray.serve.app_settings import API_KEYS_VARIABLE, ServeSettings, UserConfig

FOLDER = Path(__file__).parent.parent.parent / "serve_configs"
FILES = sorted(FOLDER.glob("*.yaml"))


def unknown(config: dict[str, Any], schema: type[BaseModel], place: str = "") -> list[str]:
    return [f"{place}{key}" for key in config if key not in schema.model_fields]


def unknown_anywhere(config: dict[str, Any]) -> list[str]:
    found = unknown(config, ServeDeploySchema)
    found += unknown(config.get("http_options", {}), HTTPOptionsSchema, "http_options.")
    found += unknown(config.get("logging_config", {}), LoggingConfig, "logging_config.")
    for application in config["applications"]:
        found += unknown(application, ServeApplicationSchema, "applications.")
        for deployment in application.get("deployments", []):
            found += unknown(deployment, DeploymentSchema, "deployments.")
            UserConfig.model_validate(deployment.get("user_config") or {})
        ServeSettings.model_validate(application.get("args", {}))
    return found


def with_comments_live(text: str) -> str:
    """The file with its commented-out examples switched on."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    examples = ("# model_tag", "# max_replicas", "# deployments", "#   - name", "#     user_config", "# - {name")
    return "\n".join(
        line.replace("# ", "", 1) if line.strip().startswith(examples) else line for line in lines
    )


def test_there_are_four():
    assert [path.name for path in FILES] == ["chat.yaml", "chat_cpu.yaml", "chat_models.yaml", "chat_vllm.yaml"]


@pytest.mark.parametrize("live", [False, True], ids=["as it is", "with its examples"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_serve_and_build_take_it(path, live):
    text = path.read_text()
    config = yaml.safe_load(with_comments_live(text) if live else text)
    ServeDeploySchema.model_validate(config)
    assert unknown_anywhere(config) == []
    for application in config["applications"]:
        module, _, name = application["import_path"].partition(":")
        assert callable(getattr(importlib.import_module(module), name))
        settings = ServeSettings.model_validate(application.get("args", {}))
        given = config["http_options"].get("request_timeout_s")
        assert given is None or given > settings.http.request_timeout_s  # the application's limit says what happened
    assert config["http_options"]["host"] == "127.0.0.1"
    hook = config["controller_options"]["runtime_env"]["env_vars"]["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]
    module, _, name = hook.partition(":")
    assert getattr(importlib.import_module(module), name)()


def test_the_examples_are_what_they_say():
    config = yaml.safe_load(with_comments_live((FOLDER / "chat.yaml").read_text()))
    application = config["applications"][0]
    assert application["args"] == {"source": "sft", "model_tag": "d12", "max_replicas": 4}
    assert application["deployments"][0]["user_config"] == {"weights": "latest", "revision": 1}
    models = yaml.safe_load(with_comments_live((FOLDER / "chat_models.yaml").read_text()))["applications"][0]["args"]
    assert [model["name"] for model in models["models"]] == ["sft", "base", "rl", "small"]


def test_a_typing_error_would_be_found():
    config = yaml.safe_load((FOLDER / "chat.yaml").read_text())
    config["http_options"]["prot"] = 1
    config["applications"][0]["deployments"] = [{"name": "ChatServer", "max_ongoing": 3}]
    assert unknown_anywhere(config) == ["http_options.prot", "deployments.max_ongoing"]
    config["applications"][0]["args"]["max_row"] = 3
    with pytest.raises(ValidationError, match="max_row"):
        unknown_anywhere(config)


@pytest.mark.parametrize(("gpus", "args", "size"), [
    (8, {}, 8), (0, {}, 1), (8, {"replicas": 2}, 2), (2, {"max_replicas": 6}, (1, 6)),
    (2, {"replicas": 2, "max_replicas": 6}, (2, 6)),
])  # fmt: skip
def test_the_deployment_follows_from_the_settings(gpus, args, size):
    from nanochat_ray.serve.app import deployment

    settings = ServeSettings.model_validate(args)
    made = deployment(settings, gpus)
    scaling = made._deployment_config.autoscaling_config
    found = (scaling.min_replicas, scaling.max_replicas) if scaling else made.num_replicas
    assert found == size
    assert made.ray_actor_options["num_gpus"] == (1 if gpus else 0)
    assert made.max_ongoing_requests > settings.max_rows + settings.max_queue
    assert made._deployment_config.graceful_shutdown_timeout_s > settings.http.request_timeout_s
    backpressure = made._deployment_config.backpressure_config
    assert (backpressure.status_code, backpressure.retry_after_s) == (429, 2)


def test_keys_do_not_stand_in_a_config(monkeypatch):
    with pytest.raises(ValidationError, match=API_KEYS_VARIABLE) as refused:
        ServeSettings.model_validate({"http": {"api_keys": ["a-key-that-is-secret-1"]}})
    assert "a-key-that-is-secret" not in str(refused.value)
    monkeypatch.setenv(API_KEYS_VARIABLE, "first-key-of-this-server, second-key-of-this-server")
    keys = ServeSettings().http_with_keys().api_keys
    assert keys == (SecretStr("first-key-of-this-server"), SecretStr("second-key-of-this-server"))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"models": [{"source": "sft"}], "source": "base"}, "not both"),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas 2 is below replicas 3"),
        ({"source": "gpt"}, "source"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_settings_without_meaning_are_refused(args, said):
    with pytest.raises(ValidationError, match=said):
        ServeSettings.model_validate(args)


@pytest.mark.parametrize(
    ("nodes", "replicas", "each"),
    [([8], 1, 7), ([8], 2, 3), ([8], 4, 1), ([2], 1, 1), ([1], 3, 1), ([8, 8], 1, 7), ([8, 8], 2, 7), ([8, 8], 3, 3)],
)
def test_replicas_without_gpus_fit_on_the_nodes(monkeypatch, nodes, replicas, each):
    """A replica lies on one node, where another process needs a CPU too."""
    alive = [{"Alive": True, "Resources": {"CPU": float(cpus)}} for cpus in nodes]
    monkeypatch.setattr(app.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(app.ray, "nodes", lambda: [*alive, {"Alive": False, "Resources": {"CPU": 64.0}}])
    assert app._cpus_each(replicas) == each

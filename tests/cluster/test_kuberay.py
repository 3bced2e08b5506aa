"""The manifests of cluster/kuberay, key by key: KubeRay passes over keys that it does not know, so this must not."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from ray.serve.schema import HTTPOptionsSchema, LoggingConfig, ServeApplicationSchema, ServeDeploySchema

from nanochat_ray.serve.app import build
from nanochat_ray.serve.app_settings import ServeSettings
from tests.real_data import needs_real_data, real_data
from tests.serve.runs import make_run

FOLDER = Path(__file__).parent.parent.parent / "cluster" / "kuberay"
FIELDS = json.loads((Path(__file__).parent / "kuberay_fields.json").read_text())
MANIFESTS = ("speedrun.yaml", "speedrun_cpu.yaml", "chat.yaml")
METADATA = {"name": "string"}
# Of Kubernetes, what the manifests use.
POD: dict[str, Any] = {
    "spec": {
        "terminationGracePeriodSeconds": "integer",
        "containers": [{
            "name": "string", "image": "string",
            "env": [{"name": "string", "value": "string", "__required__": ["name"]}],
            "ports": [{"name": "string", "containerPort": "integer", "__required__": ["containerPort"]}],
            "resources": {"requests": "map", "limits": "map"},
            "volumeMounts": [
                {"name": "string", "mountPath": "string", "readOnly": "boolean", "__required__": ["name", "mountPath"]}
            ],
            "__required__": ["name", "image"],
        }],
        "volumes": [{
            "name": "string", "persistentVolumeClaim": {"claimName": "string"}, "secret": {"secretName": "string"},
            "emptyDir": {"medium": "string", "sizeLimit": "string"}, "__required__": ["name"],
        }],
        "__required__": ["containers"],
    },
}  # fmt: skip
CLAIM = {
    "apiVersion": "string", "kind": "string", "metadata": METADATA,
    "spec": {"accessModes": ["string"], "storageClassName": "string", "resources": {"requests": "map"}},
}  # fmt: skip
TYPES: dict[str, Any] = {"string": str, "integer": int, "number": (int, float), "boolean": bool}


def fields_of(kind: str) -> dict[str, Any]:
    """Everything that a manifest of this kind may say."""
    spec = dict(FIELDS[kind])
    spec["rayClusterSpec" if kind == "RayJob" else "rayClusterConfig"] = FIELDS["cluster"]
    return {"apiVersion": "string", "kind": "string", "metadata": METADATA, "spec": spec}


def faults(value: Any, field: Any, place: str = "") -> list[str]:
    """What does not agree with the field's description: unknown and missing keys, wrong types and values."""
    if field is None:
        return [f"{place}: not written down in kuberay_fields.json"]
    if field == "PodTemplateSpec (Kubernetes)":
        return faults(value, POD, place)
    if isinstance(field, list):
        return [f for n, one in enumerate(value) for f in faults(one, field[0], f"{place}[{n}]")]
    if isinstance(field, dict) and "__enum__" in field:
        return [] if value in field["__enum__"] else [f"{place}: {value!r} is none of {field['__enum__']}"]
    if isinstance(field, dict):
        if not isinstance(value, dict):
            return [f"{place}: {value!r} is no map"]
        found = [f"{place}.{name}: missing" for name in field.get("__required__", ()) if name not in value]
        for name, one in value.items():
            known = name in field and not name.startswith("__")
            found += faults(one, field[name], f"{place}.{name}") if known else [f"{place}.{name}: unknown"]
        return found
    if field == "map":
        strings = isinstance(value, dict) and all(isinstance(one, str) for one in value.values())
        return [] if strings else [f"{place}: {value!r} is no map of strings"]
    right = isinstance(value, TYPES[field]) and (field == "boolean" or not isinstance(value, bool))
    return [] if right else [f"{place}: {value!r} is no {field}"]


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())


def cluster_of(found: dict[str, Any]) -> dict[str, Any]:
    return found["spec"].get("rayClusterSpec") or found["spec"]["rayClusterConfig"]


def pods(found: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = cluster_of(found)
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", ()))]


def test_all_files_are_looked_at():
    assert {path.name for path in FOLDER.glob("*.yaml")} == {*MANIFESTS, "storage.yaml"}


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_key_is_one_that_kuberay_has(name):
    found = manifest(name)
    assert faults(found, fields_of(found["kind"])) == []
    assert found["apiVersion"] == FIELDS["apiVersion"]


def test_the_volume():
    claim = manifest("storage.yaml")
    assert faults(claim, CLAIM) == []
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]  # pods of several machines write to it


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("spec", "entrypont"), "python", ".spec.entrypont: unknown"),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "tokn", "none of"),
        (("spec", "backoffLimit"), "3", "no integer"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0, "no map of strings"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "maxReplica"), 1, "unknown"),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "container"), [], "unknown"),
        (("spec", "rayClusterSpec", "networkPolicy"), {}, "not written down"),
    ],
)
def test_a_fault_is_found(path, value, said):
    found = copy.deepcopy(manifest("speedrun.yaml"))
    place = found
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert any(said in fault for fault in faults(found, fields_of("RayJob")))
    del place[path[-1]]


def test_a_missing_key_is_found():
    found = manifest("speedrun.yaml")
    del found["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]
    assert faults(found, fields_of("RayJob")) == [".spec.rayClusterSpec.workerGroupSpecs[0].template: missing"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_token_is_on_and_everything_mounted_is_there(name):
    found = manifest(name)
    assert cluster_of(found)["authOptions"] == {"mode": "token"}
    assert cluster_of(found)["rayVersion"].startswith("2.60.")
    assert len({container["image"] for pod in pods(found) for container in pod["containers"]}) == 1
    claim = manifest("storage.yaml")["metadata"]["name"]
    for pod in pods(found):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim
        for container in pod["containers"]:
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert set(mounts.values()) == set(volumes)
            env = {entry["name"]: entry["value"] for entry in container["env"]}
            assert mounts[env["NANOCHAT_BASE_DIR"]] == "runs"


def test_the_job_is_one_of_ours():
    for name in ("speedrun.yaml", "speedrun_cpu.yaml"):
        python, script, *_ = manifest(name)["spec"]["entrypoint"].split()
        assert python == "python" and (FOLDER.parent.parent / script).is_file()


def test_the_chat_is_open_to_holders_of_a_key_only():
    found = manifest("chat.yaml")
    config = yaml.safe_load(found["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(config)
    assert unknown(config, ServeDeploySchema) + unknown(config["http_options"], HTTPOptionsSchema) == []
    assert unknown(config["logging_config"], LoggingConfig) == []
    (application,) = config["applications"]
    assert unknown(application, ServeApplicationSchema) == []
    settings = ServeSettings.model_validate(application["args"])
    assert config["http_options"]["host"] == "0.0.0.0"
    place = Path(str(settings.http.api_keys_file))
    for pod in pods(found):
        secrets = {volume["name"] for volume in pod["volumes"] if "secret" in volume}
        assert not any(volume["secret"].get("optional") for volume in pod["volumes"] if "secret" in volume)
        (container,) = pod["containers"]
        assert str(place.parent) in {m["mountPath"] for m in container["volumeMounts"] if m["name"] in secrets}
        assert config["http_options"]["port"] in {port["containerPort"] for port in container["ports"]}
    secret = pods(found)[0]["volumes"][1]["secret"]["secretName"]
    # The key is never a file in the project's folder, from where it would go into uploads and images.
    for said in ((FOLDER / "chat.yaml").read_text(), (FOLDER.parent / "README.md").read_text()):
        assert f'kubectl create secret generic {secret} --from-literal={place.name}="$(openssl' in said
        assert f"> {place.name}" not in said


def test_the_chat_waits_for_gpus_that_come_after_the_head(tmp_path):
    make_run(tmp_path)
    settings = ServeSettings.model_validate(chat_arguments() | {"storage": str(tmp_path)})
    limits = [pod["containers"][0]["resources"]["limits"] for pod in pods(manifest("chat.yaml"))]
    gpus = [int(limit.get("nvidia.com/gpu", 0)) for limit in limits]
    groups = cluster_of(manifest("chat.yaml"))["workerGroupSpecs"]
    assert settings.replicas == sum(n * group["replicas"] for n, group in zip(gpus[1:], groups, strict=True))
    deployed = build(settings)._bound_deployment  # here is no GPU, as where the head's pod is the first
    assert deployed.ray_actor_options["num_gpus"] == 1 and deployed.num_replicas == settings.replicas
    assert deployed.init_args[0].device == "cuda"
    with pytest.raises(ValueError, match="or say how many `replicas`"):
        build(settings.model_copy(update={"replicas": None}))


def test_the_image_has_what_the_code_calls():
    packages = re.search(r"apt-get install -y --no-install-recommends ([\w\s.-]+)", (FOLDER / "Dockerfile").read_text())
    assert packages and {"bubblewrap", "gcc", "git", "libc6-dev", "wget"} <= set(packages[1].split())


def test_without_a_key_the_chat_does_not_start(tmp_path):
    settings = ServeSettings.model_validate(chat_arguments())
    with pytest.raises(FileNotFoundError, match="api_keys"):
        settings.http_with_keys().keys()
    (tmp_path / "api_keys").write_text("\n")
    empty = {"http": {"api_keys_file": str(tmp_path / "api_keys")}}
    with pytest.raises(ValueError, match="has no key"):
        ServeSettings.model_validate(chat_arguments() | empty).http_with_keys().keys()


def chat_arguments() -> dict[str, Any]:
    return yaml.safe_load(manifest("chat.yaml")["spec"]["serveConfigV2"])["applications"][0]["args"]


def unknown(config: dict[str, Any], schema: type[BaseModel]) -> list[str]:
    return [key for key in config if key not in schema.model_fields]


@needs_real_data
def test_the_fields_written_down_are_those_of_kuberay():
    real = json.loads((real_data() / "cluster" / "kuberay_fields.json").read_text())
    assert FIELDS["apiVersion"] == real["RayJob"]["apiVersion"] == real["RayService"]["apiVersion"]
    for kind, spec in (("RayJob", real["RayJob"]["spec"]), ("RayService", real["RayService"]["spec"]),
                       ("cluster", real["RayJob"]["spec"]["rayClusterSpec"])):  # fmt: skip
        assert_same(FIELDS[kind], spec, kind)
    assert_same(FIELDS["cluster"], real["RayService"]["spec"]["rayClusterConfig"], "cluster")


def assert_same(written: Any, real: Any, place: str) -> None:
    """The same names everywhere, and the same descriptions but where none is written down."""
    if isinstance(written, dict):
        assert written.keys() == real.keys(), place
        for name, one in written.items():
            assert_same(one, real[name], f"{place}.{name}")
    elif isinstance(written, list) and isinstance(written[0], dict):
        assert_same(written[0], real[0], place)
    elif written is not None:
        assert written == real, place

"""Our cluster files, read, brought up, scaled and ended by Ray's own code, on a fake Lambda and machines of paper."""

from __future__ import annotations

import copy
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import jsonschema
import pytest
import yaml
from ray.autoscaler._private import commands
from ray.autoscaler._private import updater as updater_module
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.core.generated import autoscaler_pb2 as pb

from nanochat_ray.cloud.lambda_provider import LambdaNodeProvider
from tests.cloud.fake_lambda import LAUNCH, Fault
from tests.cloud.machines import Machines

CLUSTER = Path(__file__).parents[2] / "cluster"
FILES = ("lambda.yaml", "lambda_workers.yaml")
DEADLINE_S = 120.0


@pytest.fixture
def machines(monkeypatch, times, home, cloud) -> Machines:
    found = Machines()
    monkeypatch.setattr(LambdaNodeProvider, "get_command_runner", lambda *args, **more: found.runner(*args, **more))
    monkeypatch.setattr(commands, "POLL_INTERVAL", 0.05)
    monkeypatch.setattr(updater_module, "READY_CHECK_INTERVAL", 0.05)
    monkeypatch.setattr(commands, "_get_node_provider", lambda config, name: LambdaNodeProvider(config, name))
    monkeypatch.setattr(commands.usage_lib, "show_usage_stats_prompt", lambda cli: None)
    monkeypatch.setattr("atexit.register", lambda f: at_exit.append(f))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    at_exit: list[Callable[[], None]] = []
    found.at_exit = at_exit  # type: ignore[attr-defined]
    return found


@pytest.fixture
def written(tmp_path, cloud):
    """A cluster file of ours, on the fake Lambda, with changes; its path."""

    def write(name: str, **changes: Any) -> str:
        config = yaml.safe_load((CLUSTER / name).read_text())
        config["provider"]["api_url"] = cloud.url
        path = tmp_path / name
        path.write_text(yaml.safe_dump({**config, **changes}))
        return str(path)

    return write


def up(path: str) -> dict[str, Any]:
    return commands.create_or_update_cluster(
        path, None, None, no_restart=False, restart_only=False, yes=True, no_config_cache=False
    )


def down(path: str) -> None:
    commands.teardown_cluster(path, yes=True, workers_only=False, override_cluster_name=None, keep_min_workers=False)


# --- the files --------------------------------------------------------------------------------------------------------


def filled(name: str, url: str) -> dict[str, Any]:
    config = yaml.safe_load((CLUSTER / name).read_text())
    config["provider"]["api_url"] = url
    return LambdaNodeProvider.fillout_available_node_types_resources(prepare_config(config))


@pytest.mark.parametrize("name", FILES)
def test_files_are_what_ray_takes(name, cloud, times, home):
    config = filled(name, cloud.url)
    validate_config(config)
    LambdaNodeProvider.bootstrap_config(config)
    assert config["provider"]["problems"] == []
    for break_it in (
        lambda c: c.update(head_setup_command=[]), lambda c: c["available_node_types"]["head"].update(ressources={}),
        lambda c: c["available_node_types"]["head"].pop("resources"), lambda c: c.update(head_node_type="nobody"),
    ):  # fmt: skip
        broken = copy.deepcopy(config)
        break_it(broken)
        with pytest.raises((jsonschema.ValidationError, ValueError)):
            validate_config(broken)
    for where in (config["provider"], config["available_node_types"]["head"]["node_config"]):
        where["extra"] = 1
        problems = LambdaNodeProvider.bootstrap_config(copy.deepcopy(config))["provider"]["problems"]
        assert any("unknown key" in each and "extra" in each for each in problems)


@pytest.mark.parametrize("name", FILES)
def test_files_say_what_they_must(name):
    text = (CLUSTER / name).read_text()
    config = yaml.safe_load(text)
    assert sum("EDIT" in line and not line.startswith("#") for line in text.splitlines()) == 6
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    starts = [each for each in commands if "ray start" in each]
    assert all("cd ~/nanochat-ray" in each and "--metrics-export-port=8080" in each for each in starts)
    assert "RAY_AUTH_MODE=token" in config["setup_commands"][0]
    assert not any(pattern.startswith(".git") for pattern in config["rsync_exclude"])  # reports name the commit


@pytest.mark.parametrize("name", FILES)
def test_runs_are_kept_on_a_file_system_that_all_machines_have(name, cloud, times, home):
    config = filled(name, cloud.url)
    config["available_node_types"]["head"]["node_config"]["file_system_names"] = ["other"]
    (problem,) = LambdaNodeProvider.bootstrap_config(config)["provider"]["problems"]
    assert "head.node_config: file_system_names has no my-files, where NANOCHAT_BASE_DIR" in problem


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("well", [True, False])
def test_setup_fails_without_file_system_and_without_usable_gpus(name, well, tmp_path):
    config = yaml.safe_load((CLUSTER / name).read_text())
    everything = config["setup_commands"] + config["worker_setup_commands"]
    base, vendor = "/proc" if well else tmp_path, tmp_path / "vendor"
    (tmp_path / ".nanochat-ray.sh").write_text(f"export NANOCHAT_BASE_DIR={base}/nanochat-ray")
    vendor.write_text("0x10de")
    python = tmp_path / ".nanochat-ray/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\nexit {int(not well)}\n")
    python.chmod(0o755)
    for what, old, new, said in (
        ("mountpoint", "timeout 300", "timeout 0.1", f"no file system is mounted at {base}"),
        ("torch", "/sys/bus/pci/devices/*/vendor", str(vendor), "an NVIDIA driver 580 or later"),
    ):
        (command,) = [each for each in everything if what in each]
        line = f"({command.replace(old, new)})"  # as Ray runs it
        ran = subprocess.run(["bash", "-c", line], env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
                             capture_output=True, text=True, timeout=60)  # fmt: skip
        assert (ran.returncode == 0) == well and (said in ran.stdout) == (not well), ran
    vendor.write_text("0x8086")
    assert subprocess.run(["bash", "-c", line], env={"HOME": str(tmp_path)}, timeout=60).returncode == 0


# --- up and down ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_up_and_down(name, written, machines, cloud):
    path = written(name)
    up(path)
    (head,) = cloud.alive()
    ran = machines.run_on(head)
    has_key = name == "lambda_workers.yaml"  # it starts the workers
    assert ran[0] == "uptime" and ran[-2].endswith("ray stop")
    assert "ray start --head" in ran[-1] and ("--autoscaling-config" in ran[-1]) == has_key
    assert {"~/nanochat-ray/", "~/.ray/auth_token"} <= set(machines.files_on(head))
    assert ("~/.lambda_cloud/api_key" in machines.files_on(head)) == has_key
    assert any("chmod 600 ~/.lambda_cloud/api_key" in each for each in ran) == has_key
    resources = machines.started[head]["RAY_OVERRIDE_RESOURCES"]
    assert resources["CPU"] and ("GPU" in resources) == (name == "lambda.yaml")
    machines.at_exit[0]()
    assert cloud.alive() == [head]
    before = len(machines.commands)
    up(path)  # the same again: no second head, no second setup
    assert cloud.alive() == [head] and not any("uv pip" in each for _, each in machines.commands[before:])
    down(path)
    assert cloud.alive() == [] and cloud.count(LAUNCH) == 1


@pytest.mark.parametrize("name", FILES)
def test_one_machine_needs_no_key_in_a_file(name, cloud, times, home, monkeypatch):
    monkeypatch.setenv("LAMBDA_API_KEY", (home / ".lambda_cloud/api_key").read_text())
    (home / ".lambda_cloud/api_key").unlink()
    problems = LambdaNodeProvider.bootstrap_config(filled(name, cloud.url))["provider"]["problems"]
    assert ["api_key" in each for each in problems] == ([] if name == "lambda.yaml" else [True])


@pytest.mark.slow
def test_no_second_head_beside_one_that_cannot_be_ended(written, machines, cloud):
    up(written("lambda.yaml"))
    cloud.stuck = set(cloud.alive())
    config = yaml.safe_load(Path(written("lambda.yaml")).read_text())
    config["available_node_types"]["head"]["node_config"]["instance_type_name"] = "gpu_1x_a10"
    with pytest.raises(click.ClickException, match="still run and cost money"):
        up(written("lambda.yaml", available_node_types=config["available_node_types"]))
    assert cloud.count(LAUNCH) == 1


@pytest.mark.slow
def test_a_down_that_leaves_a_worker_fails(written, machines, cloud):
    path = written("lambda_workers.yaml")
    up(path)
    head = cloud.instances[cloud.alive()[0]]
    worker = cloud.launch({  # by the head, at the last moment
        "instance_type_name": "gpu_1x_a10", "region_name": "us-east-1", "ssh_key_names": ["my-key"],
        "tags": [each for each in head["tags"] if each["key"] in ("nr:launch", "ray-cluster-name")],
    })["instance_ids"]  # fmt: skip
    cloud.stuck = set(worker)
    with pytest.raises(SystemExit) as caught:
        down(path)
    assert caught.value.code == 1 and cloud.alive() == worker


def test_a_failed_up_leaves_nothing(written, machines, cloud):
    machines.broken = "uv venv"
    with pytest.raises(click.ClickException):
        up(written("lambda.yaml"))
    assert cloud.count(LAUNCH) == 1 and cloud.alive() == []


def test_a_refused_up_costs_nothing(written, machines, cloud, home):
    (home / ".ray/auth_token").unlink()
    cloud.capacity["gpu_8x_h100_sxm5"] = ["us-west-1"]
    with pytest.raises(click.ClickException) as caught:
        up(written("lambda.yaml"))
    assert "ray get-auth-token --generate" in caught.value.message and "us-west-1" in caught.value.message
    assert cloud.count(LAUNCH) == 0


def test_down_works_without_capacity_from_elsewhere_and_with_a_bad_file(written, machines, cloud, home, monkeypatch):
    path = written("lambda_workers.yaml")
    up(path)
    assert cloud.alive()
    cloud.capacity = {name: [] for name in cloud.capacity}
    (home / ".ssh/id_ed25519").unlink()
    (home / ".ray/auth_token").unlink()
    monkeypatch.chdir(home)
    down(path)
    assert cloud.alive() == []


# --- the autoscaler on the head ---------------------------------------------------------------------------------------


class Head:
    """Ray's v2 autoscaler, as the monitor on the head runs it; what the cluster reports is made of the `ray start`s."""

    def __init__(self, monkeypatch, machines: Machines, head: str) -> None:
        from ray.autoscaler.v2 import autoscaler as v2
        from ray.autoscaler.v2.instance_manager.config import FileConfigReader

        self.machines, self.head, self.gpus, self.dead = machines, head, 0, set[str]()
        self.version = 0
        monkeypatch.setattr(v2, "_get_node_provider", lambda config, name: LambdaNodeProvider(config, name))
        monkeypatch.setattr(v2, "get_cluster_resource_state", lambda gcs: self.report())
        reader = FileConfigReader(str(Path("~/ray_bootstrap_config.yaml").expanduser()))
        gcs = SimpleNamespace(address="10.0.0.0:6379", drain_node=lambda *_, **__: (True, ""))
        self.autoscaler = v2.Autoscaler("session", reader, gcs)
        self.provider = self.autoscaler._cloud_instance_provider.v1_provider

    def report(self) -> pb.ClusterResourceState:
        self.version += 1
        state = pb.ClusterResourceState(cluster_resource_state_version=self.version)
        for n, (node, environment) in enumerate(sorted(self.machines.started.items())):
            resources = {k: float(v) for k, v in environment["RAY_OVERRIDE_RESOURCES"].items()}
            resources |= {"node:__internal_head__": 1.0} if node == self.head else {}
            status = pb.NodeStatus.DEAD if node in self.dead else pb.NodeStatus.RUNNING
            state.node_states.append(pb.NodeState(
                node_id=node.encode()[:28], instance_id=node, status=status, node_ip_address=f"10.0.0.{n}",
                ray_node_type_name="head" if node == self.head else "gpus",
                total_resources=resources, available_resources=resources,
            ))  # fmt: skip
        if self.gpus:
            wish = pb.ResourceRequest(resources_bundle={"GPU": 8.0})
            wishes = pb.ClusterResourceConstraint(
                resource_requests=[pb.ResourceRequestByCount(request=wish, count=self.gpus)]
            )
            state.cluster_resource_constraints.append(wishes)
        return state

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, "the autoscaler did not get there"
            self.autoscaler.update_autoscaling_state()
            time.sleep(0.02)


@pytest.mark.slow
def test_the_autoscaler_scales_replaces_and_ends(written, machines, cloud, monkeypatch):
    path = written("lambda_workers.yaml")
    up(path)
    (head,) = cloud.alive()
    scaler = Head(monkeypatch, machines, head)

    def workers() -> list[str]:
        return [each for each in cloud.alive() if each != head]

    def all_started() -> bool:
        return len(workers()) == 4 and all(each in machines.started for each in workers())

    scaler.until(lambda: True)
    scaler.autoscaler.update_autoscaling_state()
    assert workers() == []
    scaler.gpus = 4
    cloud.faults = [Fault(LAUNCH, 500), Fault(LAUNCH, "lost after")]
    scaler.until(all_started)
    assert len(cloud.instances) == 5  # not one too many, whatever was lost
    first = workers()
    for each in first:
        ran = machines.run_on(each)
        assert any("-c ~/.nanochat-ray-versions.txt" in command for command in ran)
        assert f"RAY_CLOUD_INSTANCE_ID={each}" in ran[-1] and "RAY_HEAD_IP=10.0.0.0" in ran[-1]
        assert "~/nanochat-ray/" in machines.files_on(each)
        assert not any("api_key" in file for file in machines.files_on(each))
        assert machines.started[each]["RAY_OVERRIDE_RESOURCES"]["GPU"] == 8

    cloud.becomes(first[0], "preempted")
    scaler.dead.add(first[0])
    scaler.until(lambda: all_started() and first[0] not in workers())
    cloud.forget(first[1])
    scaler.dead.add(first[1])
    scaler.until(lambda: all_started() and first[1] not in workers())
    cloud.becomes(first[2], "unhealthy")  # Ray itself sees nothing of that one
    scaler.until(lambda: all_started() and first[2] not in workers())
    scaler.dead.add(first[3])  # Ray died on a machine that is well
    scaler.until(lambda: all_started() and first[3] not in workers())

    # a new process of the autoscaler finds what the old one started
    again = LambdaNodeProvider(scaler.provider.provider_config, "nanochat-workers")
    assert len(again.non_terminated_nodes({"ray-node-type": "worker"})) == 4
    again.terminate_nodes(again.non_terminated_nodes({}))
    assert cloud.alive() == []


def test_a_worker_that_cannot_be_had_comes_when_it_can(written, machines, cloud, monkeypatch):
    path = written("lambda_workers.yaml")
    cloud.capacity["gpu_8x_h100_sxm5"] = []
    up(path)
    scaler = Head(monkeypatch, machines, cloud.alive()[0])
    scaler.gpus = 2
    scaler.until(lambda: cloud.count(LAUNCH) >= 3)
    assert len(cloud.alive()) == 1
    cloud.capacity["gpu_8x_h100_sxm5"] = ["us-east-1"]
    scaler.until(lambda: len(machines.started) == 3)
    down(path)
    assert cloud.alive() == []

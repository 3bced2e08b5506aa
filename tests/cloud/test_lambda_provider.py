"""The provider by itself, method by method, as Ray's commands and its autoscaler use it."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_NODE_STATUS, TAG_RAY_USER_NODE_TYPE

from nanochat_ray.cloud import lambda_checks as checks
from nanochat_ray.cloud.lambda_errors import LambdaError
from nanochat_ray.cloud.lambda_provider import LambdaNodeProvider
from tests.cloud.fake_lambda import KEY, LAUNCH, LIST, MACHINES, TERMINATE, Fault

MACHINE = {
    "instance_type_name": "gpu_1x_a10", "region_name": "us-east-1", "ssh_key_names": ["my-key"],
    "file_system_names": ["my-files"],
}  # fmt: skip
HEAD = {TAG_RAY_NODE_KIND: "head", TAG_RAY_USER_NODE_TYPE: "head", "ray-node-name": "ray-c-head"}
WORKER = {TAG_RAY_NODE_KIND: "worker", TAG_RAY_USER_NODE_TYPE: "gpus", "ray-launch-request": "r1"}


@pytest.fixture
def make(cloud, times, home, monkeypatch):
    """A provider as each process has its own."""
    monkeypatch.setattr("atexit.register", lambda f: None)

    def provider(name: str = "c", **config: Any) -> LambdaNodeProvider:
        return LambdaNodeProvider({"type": "external", "api_url": cloud.url, **config}, name)

    return provider


def only(nodes: dict[str, Any]) -> str:
    (node,) = nodes
    return node


def test_a_head_is_there_at_once_and_has_its_tags_and_addresses(make, cloud):
    cloud.hidden_s = 0.2  # longer than the provider looks
    cloud.boot_s = 0.3
    provider = make()
    node = only(provider.create_node(MACHINE, HEAD, 1))
    assert provider.non_terminated_nodes({TAG_RAY_NODE_KIND: "head"}) == [node]
    assert provider.is_running(node) and not provider.is_terminated(node)
    assert (provider.external_ip(node), provider.internal_ip(node)) == ("198.51.100.0", "10.0.0.0")
    assert HEAD.items() <= provider.node_tags(node).items()
    assert cloud.instances[node]["name"] == "ray-c-head"
    assert provider.get_node_id("10.0.0.0", use_internal_ip=True) == node


def test_a_worker_that_boots_is_not_running_and_has_no_address(make, cloud):
    cloud.boot_s, cloud.hidden_s = 1e9, 1e9
    provider = make()
    node = only(provider.create_node(MACHINE, WORKER, 1))
    assert provider.non_terminated_nodes(WORKER) == [node]
    assert not provider.is_running(node) and not provider.is_terminated(node)
    assert provider.external_ip(node) is None and provider.internal_ip(node) is None


def test_clusters_of_one_account_do_not_see_each_other(make, cloud):
    one, two = make("a" * 300), make("two")
    node = only(one.create_node(MACHINE, WORKER, 1))
    assert one.non_terminated_nodes({}) == [node] and two.non_terminated_nodes({}) == []
    assert two.node_tags(node) == {} and two.is_terminated(node)


def test_tags_outlive_the_process(make):
    provider = make()
    node = only(provider.create_node(MACHINE, WORKER, 1))
    provider.set_node_tags(node, {TAG_RAY_NODE_STATUS: "up-to-date", "ray-runtime-config": "h" * 200})
    again = make()
    assert again.non_terminated_nodes({TAG_RAY_NODE_STATUS: "up-to-date"}) == [node]
    assert again.node_tags(node) == {
        **WORKER, "ray-cluster-name": "c", TAG_RAY_NODE_STATUS: "up-to-date", "ray-runtime-config": "h" * 200
    }  # fmt: skip


def test_many_threads(make, cloud):
    provider = make()
    made: list[str] = []
    threads = [threading.Thread(target=lambda: made.extend(provider.create_node(MACHINE, WORKER, 2))) for _ in range(3)]
    threads += [threading.Thread(target=lambda: provider.non_terminated_nodes({})) for _ in range(5)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert sorted(made) == provider.non_terminated_nodes(WORKER) == sorted(cloud.alive()) and len(made) == 6


def test_no_answer_is_an_error_and_not_an_empty_cluster(make, cloud, times):
    provider = make()
    provider._api.times = replace(times, patience_s=0.2)
    provider.create_node(MACHINE, WORKER, 1)
    cloud.faults = [Fault(LIST, 500, times=10_000)]
    with pytest.raises(LambdaError, match="did not answer"):
        provider.non_terminated_nodes({})


@pytest.mark.parametrize("status", ["preempted", "terminated", "terminating"])
def test_lost_instances_are_gone(make, cloud, status):
    provider = make()
    node, other = provider.create_node(MACHINE, WORKER, 2)
    cloud.becomes(node, status)
    cloud.forget(other)
    fresh = make()
    assert fresh.non_terminated_nodes({}) == [] and fresh.is_terminated(node) and fresh.is_terminated(other)
    assert not fresh.is_running(node) and fresh.node_tags(other) == {} and fresh.internal_ip(other) is None


def test_an_unhealthy_worker_is_ended_by_the_head_only_and_after_a_while(make, cloud):
    laptop, head = make(), make(on_head=True)
    node = only(laptop.create_node(MACHINE, WORKER, 1))
    laptop.non_terminated_nodes({})
    cloud.becomes(node, "unhealthy")
    assert make().non_terminated_nodes({}) == [node] == make().nodes_for_teardown({})
    assert head.non_terminated_nodes({}) == [node] and not head.is_running(node)
    head._unhealthy[node] -= head.times.unhealthy_s
    assert head.non_terminated_nodes({}) == []
    assert cloud.alive() == [] and cloud.count(TERMINATE) == 1


def test_a_worker_that_recovers_stays(make, cloud):
    head = make(on_head=True)
    node = only(head.create_node(MACHINE, WORKER, 1))
    cloud.boot_s = 0
    assert head.non_terminated_nodes({}) == [node]
    for status in ("unhealthy", "active", "unhealthy"):
        cloud.becomes(node, status)
        head._api._changed()
        assert head.non_terminated_nodes({}) == [node]
        for each in head._unhealthy:
            head._unhealthy[each] -= 0.6 * head.times.unhealthy_s


def test_a_launch_that_shows_up_twice_is_ended_once(make, cloud):
    provider = make()
    node = only(provider.create_node(MACHINE, WORKER, 1))
    cloud.launch({**MACHINE, "tags": cloud.instances[node]["tags"]})
    cloud.seen.clear()
    assert provider.nodes_for_teardown({}) == [node]
    assert cloud.alive() == [node]


def test_workers_that_cannot_be_had(make, cloud):
    cloud.quota = 2
    provider = make()
    with pytest.raises(NodeLaunchException, match="2 of 4 started") as caught:
        provider.create_node(MACHINE, WORKER, 4)
    assert caught.value.category == "quota-exceeded"
    assert len(provider.non_terminated_nodes(WORKER)) == 2
    cloud.capacity["gpu_1x_a10"] = ["us-west-1"]
    with pytest.raises(NodeLaunchException, match="Regions that have it now: us-west-1") as caught:
        provider.create_node(MACHINE, WORKER, 1)
    assert len(caught.value.category) <= 20
    with pytest.raises(NodeLaunchException, match="unknown key 'InstanceType'; known are instance_type_name"):
        provider.create_node({**MACHINE, "InstanceType": "x"}, WORKER, 1)


# --- ending -----------------------------------------------------------------------------------------------------------


def test_ending_many_and_some_that_are_gone(make, cloud):
    provider = make()
    nodes = list(provider.create_node(MACHINE, WORKER, 3))
    cloud.forget(nodes[1])
    provider.terminate_nodes([*nodes, "never-was"])
    provider.terminate_nodes(nodes)
    assert cloud.alive() == [] and provider.non_terminated_nodes({}) == []


def test_what_cannot_be_ended_is_said(make, cloud, monkeypatch):
    monkeypatch.setattr("nanochat_ray.cloud.lambda_provider.REFUSALS", 3)
    laptop, head = make(), make(on_head=True)
    good, bad = laptop.create_node(MACHINE, WORKER, 2)
    cloud.stuck = {bad}
    with pytest.raises(LambdaError, match=rf"{bad} \(ray-c, gpu_1x_a10, 0.75 USD an hour\)"):
        head.non_terminated_nodes({})
        head.terminate_nodes([good, bad])
    assert cloud.alive() == [bad]
    for _ in range(2):
        laptop.terminate_nodes([bad])
    with pytest.raises(LambdaError, match="still run and cost money; end them at https://"):
        laptop.terminate_nodes([bad])


def test_the_end_of_ray_down_finds_what_came_late(make, cloud):
    head, laptop = make(on_head=True), make(node_types={"head": MACHINE, "gpus": MACHINE})
    timer = threading.Timer(0.05, lambda: head.create_node(MACHINE, WORKER, 1))
    timer.start()
    laptop.cleanup_cluster_resources()
    timer.join()
    assert cloud.count(LAUNCH) == 1
    if cloud.alive():  # it came after even that, on a machine that was busy
        laptop.cleanup_cluster_resources()
    assert cloud.alive() == []


@pytest.mark.parametrize("keep", [False, True])
def test_a_failed_setup_ends_a_head_of_ours_only(make, cloud, keep):
    provider = make(keep_failed_head=keep)
    node = only(provider.create_node(MACHINE, HEAD, 1))
    make().set_node_tags(node, {TAG_RAY_NODE_STATUS: "update-failed"})  # another `ray up` that did not launch it
    assert cloud.alive() == [node]
    provider.set_node_tags(node, {TAG_RAY_NODE_STATUS: "update-failed"})
    assert cloud.alive() == ([node] if keep else [])
    provider._end_unfinished()
    assert cloud.alive() == ([node] if keep else [])


def test_a_head_that_came_up_stays(make, cloud):
    provider = make()
    node = only(provider.create_node(MACHINE, HEAD, 1))
    provider.set_node_tags(node, {TAG_RAY_NODE_STATUS: "up-to-date"})
    provider._end_unfinished()
    assert cloud.alive() == [node]


def test_a_head_that_never_boots_is_given_up_and_ended(make, cloud, monkeypatch):
    cloud.boot_s = 1e9
    provider = make()
    monkeypatch.setattr(provider, "times", replace(provider.times, boot_s=0.1))
    with pytest.raises(LambdaError, match="has been booting"):
        provider.create_node(MACHINE, HEAD, 1)
    provider._end_unfinished()
    assert cloud.alive() == []


ENDS = """
import os, signal, sys, time
from dataclasses import replace
from nanochat_ray.cloud.lambda_provider import LambdaNodeProvider
from nanochat_ray.cloud.pace import Times
LambdaNodeProvider.times = replace(Times().scaled(0.01), patience_s=60.0, end_s=60.0, boot_s=60.0)
provider = LambdaNodeProvider({"type": "external", "api_url": sys.argv[1]}, "c")
provider.create_node(%r, %r, 1)
os.kill(os.getpid(), getattr(signal, sys.argv[2]))
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number, fault", [("SIGTERM", None), ("SIGINT", "lost after")])
def test_the_end_of_the_process_ends_the_head(cloud, home, number, fault):
    if fault:
        cloud.faults = [Fault(LAUNCH, fault)]
    ended = subprocess.run([sys.executable, "-c", ENDS % (MACHINE, HEAD), cloud.url, number], capture_output=True,
                           text=True, timeout=120)  # fmt: skip
    assert ended.returncode != 0 and cloud.count(LAUNCH) == 1, ended.stderr
    assert cloud.alive() == [], ended.stderr
    assert "the head did not come up" in ended.stdout + ended.stderr and KEY not in ended.stdout + ended.stderr


def test_a_ctrl_c_within_a_launch_leaves_nothing(make, cloud, monkeypatch):
    provider = make()
    real = provider._api._send

    def cut(method: str, path: str, *rest: Any, **more: Any) -> Any:
        answer = real(method, path, *rest, **more)
        if path.endswith("/launch"):
            raise KeyboardInterrupt
        return answer

    monkeypatch.setattr(provider._api, "_send", cut)
    with pytest.raises(KeyboardInterrupt):
        provider.create_node(MACHINE, HEAD, 1)
    assert len(cloud.alive()) == 1
    provider._end_unfinished()
    assert cloud.alive() == []


def ready(cloud: Any, **machine: Any) -> dict[str, Any]:
    """The provider's part of a cluster's file, as Ray hands it on."""
    types = {"head": {"node_config": {**MACHINE, **machine}}}
    config = cluster(available_node_types=types, provider={"type": "external", "api_url": cloud.url})
    return LambdaNodeProvider.bootstrap_config(config)["provider"]


def test_a_head_that_cannot_be_ended_is_not_replaced(make, cloud):
    node = only(make().create_node(MACHINE, HEAD, 1))
    cloud.stuck = {node}
    with pytest.raises(LambdaError, match=rf"still run and cost money(.|\n)*{node}"):
        make(**ready(cloud)).terminate_node(node)


def test_a_head_of_somebody_else_is_not_replaced(make, cloud):
    cloud.ssh_keys["other"] = cloud.ssh_keys["my-key"]
    node = only(make().create_node(MACHINE, HEAD, 1))
    with pytest.raises(LambdaError, match="has the ssh key my-key, not other, and is not replaced"):
        make(**ready(cloud, ssh_key_names=["other"])).terminate_node(node)
    assert cloud.alive() == [node]


def silent(cloud: Any, *providers: LambdaNodeProvider) -> None:
    """Lambda answers no more."""
    cloud.faults = [Fault(request, 500, times=10_000) for request in (LIST, TERMINATE)]
    for each in providers:
        each._api.times = replace(each._api.times, patience_s=0.1)


def test_a_down_that_cannot_see_says_what_may_run(make, cloud):
    first, second = make(), make()
    nodes = list(first.create_node(MACHINE, WORKER, 2))
    second.terminate_nodes(nodes[:1])
    silent(cloud, first, second)
    with pytest.raises(LambdaError, match=r"cluster c may still run and cost money: nothing was ended.*https://"):
        first.nodes_for_teardown({})
    with pytest.raises(LambdaError, match="1 of its instances were ended"):
        second.nodes_for_teardown({})


def test_a_down_that_leaves_something_fails(make, cloud, capsys):
    laptop = make()
    node = only(make().create_node(MACHINE, WORKER, 1))
    cloud.stuck = {node}
    with pytest.raises(SystemExit) as caught:
        laptop.cleanup_cluster_resources()
    said = capsys.readouterr()
    assert caught.value.code == 1 and "still run and cost money" in said.out + said.err and node in said.out + said.err
    silent(cloud, laptop)
    with pytest.raises(SystemExit):
        laptop.cleanup_cluster_resources()
    said = capsys.readouterr()
    assert "may still run and cost money" in said.out + said.err


def test_a_cluster_of_another_name_is_named_at_the_end_of_up_and_down(make, cloud, capsys):
    other = only(make("old-name").create_node(MACHINE, HEAD, 1))
    cloud.launch({**MACHINE, "tags": [{"key": "mine", "value": "x"}]})  # by hand: not our business
    provider = make()
    node = only(provider.create_node(MACHINE, HEAD, 1))
    capsys.readouterr()
    for end in (
        lambda: provider.set_node_tags(node, {TAG_RAY_NODE_STATUS: "up-to-date"}),
        lambda: (provider.terminate_nodes([node]), provider.cleanup_cluster_resources()),
    ):
        end()
        said = "".join(capsys.readouterr())
        assert said.count("Also running") == 1
        assert f"{other} of the cluster old-name (gpu_1x_a10, 0.75 USD an hour)" in " ".join(said.split())


def test_a_head_that_was_there_before_a_failed_up_is_named(make, cloud, capsys):
    node = only(make().create_node(MACHINE, HEAD, 1))
    provider = make()
    provider.non_terminated_nodes({})
    capsys.readouterr()
    provider.set_node_tags(node, {TAG_RAY_NODE_STATUS: "update-failed"})
    assert f"{node} was there before, runs on and costs money" in " ".join("".join(capsys.readouterr()).split())


def test_a_launch_that_is_not_seen_is_named(make, cloud, monkeypatch, capsys):
    provider = make()

    def cut(*_: Any, **__: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(provider._api, "launch", cut)
    with pytest.raises(KeyboardInterrupt):
        provider.create_node(MACHINE, HEAD, 1)
    provider._end_unfinished()
    said = " ".join("".join(capsys.readouterr()).split())
    assert "is seen; it may still come, and cost money: see https://" in said


# --- checks -----------------------------------------------------------------------------------------------------------


def cluster(**changes: Any) -> dict[str, Any]:
    return {
        "provider": {"type": "external"}, "head_node_type": "head", "auth": {"ssh_private_key": "~/.ssh/id_ed25519"},
        "available_node_types": {"head": {"node_config": MACHINE, "min_workers": 0, "max_workers": 0}},
        "file_mounts": {"~/nanochat-ray": "."}, **changes,
    }  # fmt: skip


def test_all_that_is_wrong_is_said_at_once_and_before_a_launch(make, cloud, home):
    wrong = {**MACHINE, "ssh_key_names": ["nobody"], "file_system_names": ["nothing"], "instance_type_name": "gpu_9x"}
    config = LambdaNodeProvider.bootstrap_config(cluster(
        available_node_types={
            "head": {"node_config": wrong}, "gpus": {"node_config": {"quantity": 3, "region_name": "mars"}}
        },
        file_mounts={"~/nanochat-ray": str(home), "~/.ray/auth_token": "~/no/auth_token"},
        auth={"ssh_private_key": "~/no/key"}, provider={"type": "external", "api_url": cloud.url, "zone": "b"},
    ))  # fmt: skip
    provider = LambdaNodeProvider(config["provider"], "c")
    with pytest.raises(LambdaError) as caught:
        provider.create_node(wrong, HEAD, 1)
    for said in (
        "unknown key zone", "by min_workers", "ssh_key_names is missing", "one region for all", "no private key",
        "is not the project", "ray get-auth-token --generate", "no instance type gpu_9x", "no ssh key 'nobody'",
        "no file system 'nothing' in us-east-1", "there are: my-files",
    ):  # fmt: skip
        assert said in str(caught.value)
    assert cloud.count(LAUNCH) == 0
    with pytest.raises(LambdaError, match="is not the project"):
        provider.prepare_for_head_node(config)


def test_capacity_is_needed_now_for_what_starts_now(make, cloud):
    big = {**MACHINE, "instance_type_name": "gpu_8x_h100_sxm5"}
    cloud.capacity["gpu_8x_h100_sxm5"] = ["us-west-1"]
    for least, refused in ((0, False), (1, True)):
        types = {"head": {"node_config": MACHINE}, "gpus": {"node_config": big, "min_workers": least, "max_workers": 2}}
        config = LambdaNodeProvider.bootstrap_config(
            cluster(available_node_types=types, provider={"type": "external", "api_url": cloud.url})
        )
        provider = make(**config["provider"])
        if refused:
            with pytest.raises(LambdaError, match="gpus: Lambda has no gpu_8x_h100_sxm5 free in us-east-1"):
                provider.create_node(MACHINE, HEAD, 1)
        else:
            assert provider.create_node(MACHINE, HEAD, 1)


def test_a_private_key_of_somebody_else(make, cloud, home):
    other = home / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)], check=True)
    assert not checks.same_key(str(other), cloud.ssh_keys["my-key"])
    assert checks.same_key("~/.ssh/id_ed25519", cloud.ssh_keys["my-key"])
    locked = home / "locked"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "pass phrase", "-f", str(locked)], check=True)
    assert checks.same_key(str(locked), cloud.ssh_keys["my-key"])  # cannot be told


def test_a_head_is_not_given_up_for_one_that_cannot_be(make, cloud):
    config = LambdaNodeProvider.bootstrap_config(cluster(provider={"type": "external", "api_url": cloud.url}))
    old = make(**config["provider"])
    node = only(old.create_node(MACHINE, HEAD, 1))
    cloud.capacity["gpu_1x_a10"] = []  # we have the last one: it can be exchanged for itself, not for another type
    for kind, refused in (("gpu_8x_h100_sxm5", True), ("gpu_1x_a10", False)):
        cloud.capacity["gpu_8x_h100_sxm5"] = []
        types = {"head": {"node_config": {**MACHINE, "instance_type_name": kind}}}
        config = LambdaNodeProvider.bootstrap_config(
            cluster(available_node_types=types, provider={"type": "external", "api_url": cloud.url})
        )
        provider = make(**config["provider"])
        if refused:
            with pytest.raises(LambdaError, match="nothing was launched"):
                provider.terminate_node(node)
            assert cloud.alive() == [node]
        else:
            provider.terminate_node(node)
            assert cloud.alive() == []


@pytest.mark.parametrize(
    "name, gpu", [("gpu_8x_h100_sxm5", "H100"), ("gpu_1x_a6000", "RTX-A6000"), ("cpu_4x_general", None)]
)
def test_resources_are_looked_up(cloud, times, home, name, gpu):
    config = cluster(provider={"type": "external", "api_url": cloud.url})
    config["available_node_types"]["head"]["node_config"] = {**MACHINE, "instance_type_name": name}
    filled = LambdaNodeProvider.fillout_available_node_types_resources(config)
    found = filled["available_node_types"]["head"]["resources"]
    vcpus, memory_gib, gpus, _ = MACHINES[name]
    assert found["CPU"] == vcpus and 0.6 < found["memory"] / (memory_gib * 2**30) < 0.8
    assert found.get("GPU", 0) == gpus and all(isinstance(each, int) for each in found.values())
    assert [key for key in found if key.startswith("accelerator_type")] == ([f"accelerator_type:{gpu}"] if gpu else [])


def test_resources_that_are_written_are_kept_and_a_missing_key_stops_no_ray_down(cloud, times, home):
    config = cluster()
    config["available_node_types"]["head"]["resources"] = {"CPU": 7}
    filled = LambdaNodeProvider.fillout_available_node_types_resources(config)
    assert filled["available_node_types"]["head"]["resources"] == {"CPU": 7} and cloud.seen == []
    (home / ".lambda_cloud/api_key").unlink()
    config = LambdaNodeProvider.fillout_available_node_types_resources(cluster())
    assert config["available_node_types"]["head"]["resources"] == {}
    assert "no Lambda API key" in config["provider"]["problems"][0]
    with pytest.raises(LambdaError, match="no Lambda API key"):
        LambdaNodeProvider(config["provider"], "c")


def test_workers_get_no_api_key_and_the_cache_is_not_believed(make, tmp_path):
    cache = tmp_path / "ray-config-x"
    cache.touch()
    config = LambdaNodeProvider.bootstrap_config(cluster())
    config["file_mounts"] = {"~/.lambda_cloud/api_key": "~/.lambda_cloud/api_key", "~/nanochat-ray": "~/nanochat-ray"}
    config["provider"]["_config_cache_path"] = str(cache)
    remote = make(**config["provider"]).prepare_for_head_node(config)
    assert not cache.exists()
    assert remote["file_mounts"] == {"~/nanochat-ray": "~/nanochat-ray"}
    assert remote["provider"] == {"type": "external", "on_head": True}
    assert "~/.lambda_cloud/api_key" in config["file_mounts"]  # the head's own
    assert Path("~/.lambda_cloud/api_key").expanduser().exists()

"""What can be known to be wrong with a cluster's file before a machine is paid for, and what its machines are."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_ray.cloud.lambda_api import URL, FileSystem, LambdaApi, Offer, capacity_text

REQUIRED = ("instance_type_name", "region_name", "ssh_key_names")
ALLOWED = (*REQUIRED, "file_system_names", "file_system_mounts", "image", "user_data", "firewall_rulesets")
PROVIDER_KEYS = frozenset(
    {"type", "module", "api_url", "api_key_file", "state_folder", "keep_failed_head", "use_internal_ips"}
)
INJECTED = frozenset(  # by Ray or by the provider itself
    {"node_types", "needed", "problems", "private_key", "on_head", "_config_cache_path"}
)
BASE_DIR = re.compile(r"export NANOCHAT_BASE_DIR=/lambda/nfs/([^/\s]+)")
PROJECT = "nanochat-ray"  # the name of the project's folder on the machines
RAY_MEMORY_FRAC = 0.7  # Ray sets 30 % of a machine's memory aside for its object store
# The name that Ray gives to a GPU where it is not the one in Lambda's name of the type.
RAY_GPU_NAMES = {"A6000": "RTX-A6000", "RTX6000": "RTX-6000"}


def of_node_config(where: str, node_config: Mapping[str, Any]) -> list[str]:
    """What is wrong with a node_config by itself."""
    found = []
    for key in node_config:
        if key == "quantity":
            found.append(f"{where}: quantity is not set here, but by min_workers and max_workers of the node type")
        elif key not in ALLOWED:
            found.append(f"{where}: unknown key {key!r}; known are {', '.join(ALLOWED)}")
    found += [f"{where}: {key} is missing" for key in REQUIRED if not node_config.get(key)]
    keys = node_config.get("ssh_key_names") or ["-"]
    if not isinstance(keys, list) or len(keys) != 1:
        found.append(f"{where}: ssh_key_names is a list with exactly one name of a key, not {keys!r}")
    return found


def of_cluster(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with a cluster's file, and with the files that it names, without asking Lambda."""
    found = []
    provider = config["provider"]
    known = PROVIDER_KEYS | INJECTED
    if unknown := sorted(provider.keys() - known):
        found.append(f"provider: unknown key {', '.join(unknown)}; known are {', '.join(sorted(PROVIDER_KEYS))}")
    for name, node_type in config["available_node_types"].items():
        found += of_node_config(f"available_node_types.{name}.node_config", node_type["node_config"])
    regions = {each["node_config"].get("region_name") for each in config["available_node_types"].values()}
    if len(regions) > 1:
        found.append(f"available_node_types: one region for all, not {', '.join(sorted(map(str, regions)))}")
    private_key = config.get("auth", {}).get("ssh_private_key")
    if not private_key:
        found.append("auth: ssh_private_key is missing: the file of the key that is registered with Lambda")
    elif not Path(private_key).expanduser().is_file():
        found.append(f"auth: there is no private key {private_key}")
    for remote, local in config.get("file_mounts", {}).items():
        found += of_mount(remote, local)
    return found + of_base_dir(config)


def of_base_dir(config: Mapping[str, Any]) -> list[str]:
    """Whether the folder of the runs is on a file system of all machines: else they are lost with the machine."""
    lines = [line for each in config.get("head_setup_commands", ()) for line in each.splitlines()]
    names = {found[1] for line in lines if (found := BASE_DIR.match(line.strip()))}
    problems = []
    for name, node_type in config["available_node_types"].items():
        node = node_type["node_config"]
        lacking = names - set(node.get("file_system_names") or ())
        if lacking and not node.get("file_system_mounts"):  # those are named by ids; setup looks whether they are there
            problems.append(
                f"available_node_types.{name}.node_config: file_system_names has no {', '.join(sorted(lacking))}, "
                "where NANOCHAT_BASE_DIR in setup_commands keeps the runs"
            )
    return problems


def of_mount(remote: str, local: str) -> list[str]:
    path = Path(local).expanduser()
    if not path.exists():
        hints = {
            "auth_token": " Make it once: ray get-auth-token --generate",
            "api_key": f" Make a key at {URL}/api-keys and write it into the file: the head starts workers with it.",
        }
        return [f"file_mounts: there is no {local}.{hints.get(path.name, '')}"]
    is_project = (path / "nanochat_ray").is_dir() and (path / "pyproject.toml").is_file()
    if Path(remote).name == PROJECT and not is_project:
        return [f"file_mounts: {path.absolute()} is not the project: run ray up in the project's folder"]
    return []


@dataclass(frozen=True)
class Account:
    """What Lambda has for us."""

    offers: Mapping[str, Offer]
    ssh_keys: Mapping[str, str]  # public keys by name
    file_systems: list[FileSystem]

    @staticmethod
    def of(api: LambdaApi) -> Account:
        return Account(api.offers(), api.ssh_keys(), api.file_systems())


def of_account(
    account: Account, node_types: Mapping[str, Mapping[str, Any]], private_key: str | None,
    needed: Collection[str], given_back: Collection[tuple[str, str]] = (),
) -> list[str]:  # fmt: skip
    """What Lambda would refuse of node_configs, by their node types' names: types, capacity, keys, file systems.

    needed: the names that must have capacity now; the autoscaler waits for that of others. given_back: pairs of
    instance type and region of which one is about to be free.
    """
    found = []
    offers, ssh_keys, file_systems = account.offers, account.ssh_keys, account.file_systems
    for where, node in node_types.items():
        type_name, region = node["instance_type_name"], node["region_name"]
        freed = [its_region for its_type, its_region in given_back if its_type == type_name]
        if type_name not in offers:
            found.append(f"{where}: Lambda has no instance type {type_name}; it has {', '.join(sorted(offers))}")
        elif where in needed and region not in (*offers[type_name].regions, *freed):
            found.append(f"{where}: {capacity_text(offers, type_name, region)}")
        key_name = node["ssh_key_names"][0]
        if key_name not in ssh_keys:
            names = ", ".join(sorted(ssh_keys)) or "none"
            found.append(f"{where}: no ssh key {key_name!r} is registered; there are: {names} ({URL}/ssh-keys)")
        elif private_key and not same_key(private_key, ssh_keys[key_name]):
            found.append(f"{where}: {private_key} is not the private half of Lambda's ssh key {key_name!r}")
        found += of_file_systems(where, node, file_systems)
    return list(dict.fromkeys(found))


def of_file_systems(where: str, node: Mapping[str, Any], file_systems: list[FileSystem]) -> list[str]:
    region = node["region_name"]
    here = ", ".join(sorted(each.name for each in file_systems if each.region == region)) or "none"
    found = []
    for name in node.get("file_system_names") or ():
        regions = [each.region for each in file_systems if each.name == name]
        if region not in regions:
            elsewhere = f"it is in {', '.join(regions)}" if regions else f"make it at {URL}/file-systems"
            found.append(f"{where}: no file system {name!r} in {region} ({elsewhere}); in {region} there are: {here}")
    ids = {each.id for each in file_systems if each.region == region}
    for mount in node.get("file_system_mounts") or ():
        if mount.get("file_system_id") not in ids:
            found.append(f"{where}: no file system with the id {mount.get('file_system_id')!r} in {region}")
    return found


def same_key(private_key: str, public_key: str) -> bool:
    """Whether they belong together; True too where that cannot be told (a passphrase, no ssh-keygen)."""
    command = ["ssh-keygen", "-y", "-P", "", "-f", str(Path(private_key).expanduser())]
    try:
        made = subprocess.run(command, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return True
    return made.returncode != 0 or made.stdout.split()[:2] == public_key.split()[:2]


def resources(offer: Offer) -> dict[str, int]:
    """What a machine of this type has, in Ray's terms: whole numbers, memory in bytes."""
    found = {"CPU": offer.vcpus, "memory": int(offer.memory_gib * 2**30 * RAY_MEMORY_FRAC)}
    if offer.gpus:
        parts = offer.name.split("_")  # gpu_8x_h100_sxm5
        gpu = parts[2].upper() if len(parts) > 2 else ""
        found["GPU"] = offer.gpus
        if gpu:
            found[f"accelerator_type:{RAY_GPU_NAMES.get(gpu, gpu)}"] = 1
    return found

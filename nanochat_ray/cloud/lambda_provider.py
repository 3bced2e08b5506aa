"""The node provider that lets `ray up` and Ray's autoscaler start and end machines of Lambda Cloud.

A cluster's file has `provider: {type: external, module: nanochat_ray.cloud.lambda_provider.LambdaNodeProvider}`.
Ray makes one in every process that needs it: in `ray up`, `ray down` and their like, and in the monitor on the head,
which starts the workers. What they share is the account: instances that bear the cluster's name in their tags.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import signal
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray.autoscaler._private.cli_logger import cli_logger
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    STATUS_UPDATE_FAILED,
    TAG_RAY_CLUSTER_NAME,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
)

from nanochat_ray.cloud import lambda_checks as checks
from nanochat_ray.cloud.lambda_api import KEY_FILE, TOKEN, URL, Instance, LambdaApi, read_key
from nanochat_ray.cloud.lambda_errors import LambdaError, NotThere, Unreachable
from nanochat_ray.cloud.lambda_tags import LaterTags, decode, encode
from nanochat_ray.cloud.pace import Times

logger = logging.getLogger(__name__)
STATE_FOLDER = "~/.nanochat_ray/lambda"
NAME_LENGTH = 64
REFUSALS = 24  # how often `ray down` asks for the end of an instance that Lambda does not end


class LambdaNodeProvider(NodeProvider):
    """Instances of one cluster. A node's id is the instance's id."""

    times = Times()

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        # Ray keeps what it made of a cluster's file and takes it in place of the file the next time, without looking at
        # what the file names. It costs nothing to look again.
        if cache := provider_config.get("_config_cache_path"):
            Path(cache).unlink(missing_ok=True)
        self._api = open_api(provider_config, self.times)
        self._later = LaterTags(state_folder(provider_config), cluster_name)
        self._on_head = bool(provider_config.get("on_head"))
        self._lock = threading.RLock()
        self._nodes: dict[str, Instance] = {}  # of this cluster and alive, when last looked
        self._launched: dict[str, tuple[Instance, float]] = {}  # not in a list yet; until when that is believed
        self._tokens: dict[str, str] = {}  # launch token -> the instance that we were given for it
        self._unhealthy: dict[str, float] = {}  # since when
        self._refusals: dict[str, int] = {}
        self._ended: set[str] = set()  # by this process
        self._unfinished: dict[str, str | None] = {}  # launch token -> id of a head that is not up yet
        self._given_back: list[tuple[str, str]] = []  # type and region of a head that is being replaced
        self._watching_exit = False

    # --- what there is ------------------------------------------------------------------------------------------------

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        """Ids of the cluster's instances with these tags. LambdaError, not an empty list, without an answer."""
        nodes = self._look()
        if self._on_head:
            nodes = self._without_unhealthy(nodes)
        return [each for each in sorted(nodes) if tag_filters.items() <= self.node_tags(each).items()]

    def nodes_for_teardown(self, tag_filters: dict[str, str]) -> list[str]:
        """The same, unhealthy ones too: they cost as much. LambdaError says what `ray down` has done so far."""
        try:
            nodes = self._look(fresh=True)
        except LambdaError as trouble:
            raise LambdaError(self._may_run(str(trouble)), trouble.code, trouble.status) from None
        return [each for each in sorted(nodes) if tag_filters.items() <= self.node_tags(each).items()]

    def is_running(self, node_id: str) -> bool:
        node = self._node(node_id)
        return node is not None and node.status == "active" and node.private_ip is not None

    def is_terminated(self, node_id: str) -> bool:
        return self._node(node_id) is None

    def node_tags(self, node_id: str) -> dict[str, str]:
        """Ray's tags; none for a node that is no more."""
        with self._lock:
            node = self._nodes.get(node_id)
        return decode(node.tags) | self._later.of(node_id) if node else {}

    def external_ip(self, node_id: str) -> str | None:  # type: ignore[override]
        node = self._node(node_id)
        return node.ip if node else None

    def internal_ip(self, node_id: str) -> str | None:  # type: ignore[override]
        node = self._node(node_id)
        return node.private_ip if node else None

    def _node(self, node_id: str) -> Instance | None:
        return self._look().get(node_id)

    def _look(self, fresh: bool = False) -> dict[str, Instance]:
        """The cluster's instances, from a list that is a few seconds old at most."""
        listed = self._api.instances(fresh)
        with self._lock:
            self._nodes = {each.id: each for each in listed.values() if self._ours(each) and each.alive}
            for node_id, (node, until) in list(self._launched.items()):
                if node_id in listed or time.monotonic() > until:
                    del self._launched[node_id]
                else:
                    self._nodes[node_id] = node
            twins = [each.id for each in self._nodes.values() if self._tokens.get(each.tags[TOKEN], each.id) != each.id]
            for each in twins:
                del self._nodes[each]
            nodes = dict(self._nodes)
        if twins:  # a launch whose answer was lost came to light after it was repeated
            logger.warning("ending %s: launched twice by one request", ", ".join(twins))
            self._end(twins)
        return nodes

    def _ours(self, node: Instance) -> bool:
        return TOKEN in node.tags and decode(node.tags).get(TAG_RAY_CLUSTER_NAME) == self.cluster_name

    def _without_unhealthy(self, nodes: dict[str, Instance]) -> dict[str, Instance]:
        """Workers that stay unhealthy are ended, and gone for the autoscaler, which starts others."""
        now, lost = time.monotonic(), []
        with self._lock:
            sick = {each.id for each in nodes.values() if each.status == "unhealthy"}
            self._unhealthy = {each: self._unhealthy.get(each, now) for each in sick}
            for node_id, since in self._unhealthy.items():
                is_worker = self.node_tags(node_id).get(TAG_RAY_NODE_KIND) == NODE_KIND_WORKER
                if is_worker and now - since >= self.times.unhealthy_s:
                    lost.append(node_id)
        if lost:
            logger.warning("ending unhealthy workers: %s", ", ".join(lost))
            self._end(lost)
        return {name: each for name, each in nodes.items() if name not in lost}

    # --- starting -----------------------------------------------------------------------------------------------------

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        """Start instances, one launch each. A head only when nothing is known to be wrong with the whole cluster.

        Errors: LambdaError for a head; NodeLaunchException for workers, some of which may have been started.
        """
        made: dict[str, Any] = {}
        if tags.get(TAG_RAY_NODE_KIND) == NODE_KIND_HEAD:
            self._refuse_problems()
            self._watch_exit()
            for _ in range(count):
                made |= self._launch(node_config, tags, head=True)
            for node_id in made:
                self._wait_for_boot(node_id)
            return made
        try:
            if problems := checks.of_node_config("node_config", node_config):
                raise LambdaError("; ".join(problems))
            for _ in range(count):
                made |= self._launch(node_config, tags, head=False)
        except LambdaError as trouble:
            category = trouble.code.rpartition("/")[2][:20] or "Lambda"
            text = f"{len(made)} of {count} started. {trouble}"
            raise NodeLaunchException(category, text, sys.exc_info()) from trouble
        return made

    def _launch(self, node_config: dict[str, Any], tags: dict[str, str], head: bool) -> dict[str, Any]:
        token = uuid.uuid4().hex
        ray_tags = {**tags, TAG_RAY_CLUSTER_NAME: self.cluster_name}
        name = tags.get(TAG_RAY_NODE_NAME, f"ray-{self.cluster_name}")[:NAME_LENGTH]
        request = {**node_config, "name": name, "tags": encode(ray_tags)}
        if head:
            self._unfinished[token] = None  # before the request: a Ctrl-C may come while it is under way
        try:
            node_id = self._api.launch(request, token)
        except LambdaError as trouble:
            if head and (trouble.code or (isinstance(trouble, Unreachable) and trouble.nothing_done)):
                del self._unfinished[token]
            raise
        launch_tags = {each["key"]: each["value"] for each in [*request["tags"], {"key": TOKEN, "value": token}]}
        node = Instance(
            node_id, name, "booting", node_config["instance_type_name"], node_config["region_name"], 0.0, launch_tags
        )
        with self._lock:
            self._tokens[token] = node_id
            self._launched[node_id] = (node, time.monotonic() + self.times.appear_s)
            if head:
                self._unfinished[token] = node_id
        logger.info("launched %s (%s)", node_id, name)
        return {node_id: {"instance_id": node_id}}

    def _wait_for_boot(self, node_id: str) -> None:
        """Wait until a head is active: 8 GPUs may take longer than Ray waits for ssh. LambdaError if it never is."""
        deadline = time.monotonic() + self.times.boot_s
        cli_logger.print("{} is booting; this takes minutes, and Ctrl-C ends it", node_id)
        while (node := self._node(node_id)) and node.status == "booting":
            if time.monotonic() > deadline:
                raise LambdaError(f"{node_id} has been booting for {self.times.boot_s:.0f} s and is given up")
            time.sleep(self.times.listing_s)
        if node is None or node.status != "active":
            raise LambdaError(f"{node_id} did not come up: it is {node.status if node else 'gone'}")

    def _refuse_problems(self) -> None:
        """Say everything that is wrong at once, before it costs anything; then what it will cost."""
        known = self.provider_config
        node_types, needed = known.get("node_types", {}), known.get("needed", ())
        problems = list(known.get("problems", ()))
        account = checks.Account.of(self._api)
        whole = {name: each for name, each in node_types.items() if not checks.of_node_config(name, each)}
        problems += checks.of_account(account, whole, known.get("private_key"), needed, self._given_back)
        if problems:
            lines = "".join(f"\n  - {each}" for each in problems)
            raise LambdaError(f"nothing was launched for {self.cluster_name}, because:{lines}")
        for name, each in node_types.items():
            price = account.offers[each["instance_type_name"]].usd_per_hour
            cli_logger.print("{}: {}, {:.2f} USD an hour each", name, each["instance_type_name"], price)

    # --- tags ---------------------------------------------------------------------------------------------------------

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        """Change Ray's tags. The failed setup of a head that this process launched ends the head; others run on."""
        with self._lock:
            others = list(self._nodes)
        self._later.set(node_id, tags, others)
        status = tags.get(TAG_RAY_NODE_STATUS)
        token = next((token for token, each in self._unfinished.items() if each == node_id), None)
        if token and status == STATUS_UP_TO_DATE:
            del self._unfinished[token]
        elif token and status == STATUS_UPDATE_FAILED:
            if self.provider_config.get("keep_failed_head"):
                del self._unfinished[token]
                cli_logger.warning("{} runs on and costs money (keep_failed_head): end it with ray down", node_id)
            else:
                self._end_unfinished()
        elif status == STATUS_UPDATE_FAILED and not self._on_head:
            cli_logger.warning("{} was there before, runs on and costs money: ray up again, or ray down", node_id)
        if status == STATUS_UP_TO_DATE and not self._on_head:
            self._tell_others()

    # --- ending -------------------------------------------------------------------------------------------------------

    def terminate_node(self, node_id: str) -> None:
        """End one, or LambdaError. Ray calls this for a head that it will replace, and launches the other at once.

        So nothing is ended that is somebody else's, and nothing before the new one is known to be possible.
        """
        node = self._node(node_id)
        is_head = self.node_tags(node_id).get(TAG_RAY_NODE_KIND) == NODE_KIND_HEAD
        if node and is_head and "node_types" in self.provider_config:
            self._refuse_others(node)
            self._given_back.append((node.type_name, node.region))
            self._refuse_problems()
        if failed := self._end([node_id]):
            raise LambdaError(self._left_running(failed))

    def terminate_nodes(self, node_ids: list[str]) -> None:
        """End them all; LambdaError names those that Lambda does not end and what is left to do by hand.

        `ray down` asks again while nodes are left, so there a refusal becomes an error only when it stays.
        """
        failed = self._end(node_ids)
        for node_id in failed:
            self._refusals[node_id] = self._refusals.get(node_id, 0) + 1
        if failed and (self._on_head or max(self._refusals[each] for each in failed) >= REFUSALS):
            raise LambdaError(self._left_running(failed))
        if failed:
            cli_logger.warning("{} Trying again.", self._left_running(failed))

    def cleanup_cluster_resources(self) -> None:
        """The end of `ray down`: what the head started while it was being ended is found and ended too."""
        had_workers = len(self.provider_config.get("node_types", ())) > 1
        deadline = time.monotonic() + (self.times.settle_s if had_workers else 0)
        try:
            while True:
                late = list(self._look(fresh=True))
                if late:
                    cli_logger.warning("Ending {}: started by the head while it was going down", ", ".join(late))
                failed = self._end(late) if late else {}
                if time.monotonic() >= deadline:
                    break
                time.sleep(self.times.settle_s / 5)
            problem = self._left_running(failed) if failed else ""
        except LambdaError as trouble:
            problem = self._may_run(str(trouble))
        if problem:  # an Exception would be a word about another cloud's leftovers, and the exit code of a success
            cli_logger.error("{}", problem)
            raise SystemExit(1)
        self._tell_others()

    def _end(self, node_ids: Sequence[str]) -> dict[str, LambdaError]:
        """End what can be ended; why not, for the rest. Instances that Lambda does not know are ended."""
        failed: dict[str, LambdaError] = {}
        left = list(node_ids)
        try:
            ended = self._api.terminate(left)
        except LambdaError:  # one bad id spoils the request for all: one by one then
            ended = []
        for node_id in [each for each in left if each not in ended]:
            try:
                if node_id in self._api.terminate([node_id]):
                    ended.append(node_id)
                else:
                    failed[node_id] = LambdaError(f"Lambda did not say that {node_id} is ending")
            except NotThere:
                ended.append(node_id)
            except LambdaError as trouble:
                failed[node_id] = trouble
        with self._lock:
            self._ended.update(ended)
            for node_id in ended:
                self._launched.pop(node_id, None)
        if ended:
            logger.info("ended %s", ", ".join(ended))
        return failed

    def _left_running(self, failed: dict[str, LambdaError]) -> str:
        with self._lock:
            nodes = dict(self._nodes)
        lines = []
        for node_id, trouble in failed.items():
            node = nodes.get(node_id)
            what = f" ({node.name}, {node.type_name}, {node.usd_per_hour:.2f} USD an hour)" if node else ""
            lines.append(f"\n  - {node_id}{what}: {trouble}")
        return f"These instances still run and cost money; end them at {URL}/instances:{''.join(lines)}\n"

    def _may_run(self, trouble: str) -> str:
        """What `ray down` must say when it cannot see what is left."""
        done = f"{len(self._ended)} of its instances were ended" if self._ended else "nothing was ended"
        return (
            f"{trouble}\nThe cluster {self.cluster_name} may still run and cost money: {done}. "
            f"Run ray down again, and look at {URL}/instances."
        )

    def _refuse_others(self, head: Instance) -> None:
        """LambdaError for a head with another ssh key than the file's: it may be another person's."""
        types = self.provider_config["node_types"].values()
        keys = {key for each in types for key in each.get("ssh_key_names") or ()}
        if head.ssh_key_names and not keys & set(head.ssh_key_names):
            raise LambdaError(
                f"the running head {head.id} of {self.cluster_name} has the ssh key {', '.join(head.ssh_key_names)}, "
                f"not {', '.join(sorted(keys))}, and is not replaced. If it is another person's, change cluster_name; "
                "if it is yours, run ray down first."
            )

    def _tell_others(self) -> None:
        """Name what else runs in the account by this provider: the cluster may have had another name."""
        try:
            listed = self._api.instances().values()
        except LambdaError:
            return  # what was asked for is done
        others = [each for each in listed if each.alive and TOKEN in each.tags and not self._ours(each)]
        for each in others:
            name = decode(each.tags).get(TAG_RAY_CLUSTER_NAME, "?")
            cli_logger.warning(
                "Also running in this account: {} of the cluster {} ({}, {:.2f} USD an hour)",
                each.id, name, each.type_name, each.usd_per_hour,
            )  # fmt: skip

    # --- nothing left running by accident -----------------------------------------------------------------------------

    def _watch_exit(self) -> None:
        """The end of this process ends a head that is not up: by an error, Ctrl-C, a closed terminal, a kill."""
        if self._watching_exit:
            return
        self._watching_exit = True
        atexit.register(self._end_unfinished)
        for number in (signal.SIGTERM, signal.SIGHUP):
            with contextlib.suppress(ValueError):  # not the main thread
                if signal.getsignal(number) == signal.SIG_DFL:
                    signal.signal(number, lambda n, _: sys.exit(128 + n))

    def _end_unfinished(self) -> None:
        """End every head that this process launched and did not bring up; say what could not be ended."""
        for token, known in list(self._unfinished.items()):
            deadline, waiting_s = time.monotonic() + self.times.end_s, self.times.backoff_s
            try:
                node_id = known or self._api.launched(token)
                if node_id is None:
                    text = "No instance with the tag {}={} is seen; it may still come, and cost money: see {}/instances"
                    cli_logger.warning(text, TOKEN, token, URL)
                while node_id:
                    failed = self._end([node_id])
                    if not failed:
                        cli_logger.warning("Ended {}: the head did not come up, and would have cost money", node_id)
                        break
                    if time.monotonic() > deadline:
                        cli_logger.error("{}", self._left_running(failed))
                        break
                    time.sleep(waiting_s)
                    waiting_s = min(2 * waiting_s, self.times.backoff_most_s)
                self._unfinished.pop(token, None)  # only now: a Ctrl-C in between leaves it to the process' end
            except (LambdaError, KeyboardInterrupt) as trouble:
                what = known or f"an instance with the tag {TOKEN}={token}"
                cli_logger.error("{} may still run and cost money ({}): look at {}/instances", what, trouble, URL)

    # --- what Ray asks before there is a provider ---------------------------------------------------------------------

    @staticmethod
    def fillout_available_node_types_resources(cluster_config: dict[str, Any]) -> dict[str, Any]:
        """Write `resources` of node types that have none, from Lambda's own list.

        Ray calls this in every command, before it looks whether the file is valid. Nothing fails here, because
        `ray down` must go on: what is wrong is said by the next launch.
        """
        provider = cluster_config["provider"]
        lacking = [each for each in cluster_config["available_node_types"].values() if not each.get("resources")]
        if not lacking:
            return cluster_config
        problems = provider.setdefault("problems", [])
        offers = {}
        try:
            api = open_api(provider, LambdaNodeProvider.times)
            offers = api.offers()
            api.close()
        except LambdaError as trouble:
            problems.append(f"available_node_types: resources are not given and cannot be looked up: {trouble}")
        for node_type in lacking:
            offer = offers.get(node_type.get("node_config", {}).get("instance_type_name"))
            node_type["resources"] = checks.resources(offer) if offer else {}
        return cluster_config

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        """Note what is wrong and what the provider must know. Refused is only what costs money (see create_node)."""
        provider = cluster_config["provider"]
        provider["problems"] = [*provider.get("problems", ()), *checks.of_cluster(cluster_config)]
        provider["node_types"] = {
            name: each["node_config"] for name, each in cluster_config["available_node_types"].items()
            if name == cluster_config["head_node_type"] or each.get("max_workers", 1) > 0
        }  # fmt: skip
        provider["needed"] = [
            name for name, each in cluster_config["available_node_types"].items()
            if name == cluster_config["head_node_type"] or each.get("min_workers")
        ]  # fmt: skip
        provider["private_key"] = cluster_config.get("auth", {}).get("ssh_private_key")
        return cluster_config

    def prepare_for_head_node(self, cluster_config: dict[str, Any]) -> dict[str, Any]:
        """The file that the head works with. Its workers need no API key, so they get none."""
        if problems := self.provider_config.get("problems"):
            lines = "".join(f"\n  - {each}" for each in problems)
            raise LambdaError(f"the head is left as it is, because:{lines}")
        provider = {k: v for k, v in cluster_config["provider"].items() if k not in checks.INJECTED} | {"on_head": True}
        key_file = provider.get("api_key_file", KEY_FILE)
        mounts = {remote: local for remote, local in cluster_config["file_mounts"].items() if remote != key_file}
        return {**cluster_config, "provider": provider, "file_mounts": mounts}


def state_folder(provider_config: dict[str, Any]) -> Path:
    return Path(provider_config.get("state_folder", STATE_FOLDER)).expanduser()


def open_api(provider_config: dict[str, Any], times: Times) -> LambdaApi:
    """A client as the cluster's file wants it. LambdaError without a key."""
    try:
        key = read_key(provider_config.get("api_key_file", KEY_FILE))
    except (FileNotFoundError, ValueError) as trouble:
        raise LambdaError(str(trouble)) from None
    logging.getLogger("httpx").setLevel(logging.WARNING)  # else a line for each request, every few seconds for ever
    return LambdaApi(key, provider_config.get("api_url", URL), state_folder(provider_config), times)

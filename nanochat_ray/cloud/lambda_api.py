"""Lambda Cloud's HTTP API (version 1.8.3): the few requests that a cluster needs, within its limits.

Requests are tried again when that is safe. A launch whose answer was lost is looked for before it is asked for again.
"""

from __future__ import annotations

import logging
import os
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cache
from pathlib import Path
from typing import Any

import httpx

from nanochat_ray.cloud.lambda_errors import NoCapacity, NotThere, Unreachable, refused
from nanochat_ray.cloud.pace import Pace, Times

logger = logging.getLogger(__name__)
URL = "https://cloud.lambda.ai"
KEY_FILE = "~/.lambda_cloud/api_key"
TOKEN = "nr:launch"  # the tag that names one wish for an instance, however often it is sent
GONE = frozenset({"terminated", "terminating", "preempted"})  # states of what no longer runs or is about to end
LONGEST_WAIT_S = 120.0  # more than this is not waited for, whatever the answer says


@dataclass(frozen=True)
class Instance:
    """One machine, as the API describes it."""

    id: str
    name: str
    status: str  # booting, active, unhealthy, terminating, terminated, preempted
    type_name: str
    region: str
    usd_per_hour: float
    tags: Mapping[str, str]
    ip: str | None = None  # public; missing while it boots
    private_ip: str | None = None
    ssh_key_names: tuple[str, ...] = ()

    @property
    def alive(self) -> bool:
        """It costs money and can still be ended."""
        return self.status not in GONE

    @staticmethod
    def of(fields: Mapping[str, Any]) -> Instance:
        kind = fields.get("instance_type") or {}
        return Instance(
            id=str(fields["id"]),
            name=fields.get("name") or "",
            status=fields["status"],
            type_name=kind.get("name", ""),
            region=(fields.get("region") or {}).get("name", ""),
            usd_per_hour=kind.get("price_cents_per_hour", 0) / 100,
            tags={tag["key"]: tag["value"] for tag in fields.get("tags") or ()},
            ip=fields.get("ip"),
            private_ip=fields.get("private_ip"),
            ssh_key_names=tuple(fields.get("ssh_key_names") or ()),
        )


@dataclass(frozen=True)
class Offer:
    """An instance type: what it is, what it costs, and where one could be had now."""

    name: str
    vcpus: int
    memory_gib: int
    gpus: int
    gpu_description: str
    usd_per_hour: float
    regions: tuple[str, ...]

    @staticmethod
    def of(fields: Mapping[str, Any]) -> Offer:
        kind, specs = fields["instance_type"], fields["instance_type"]["specs"]
        regions = tuple(region["name"] for region in fields["regions_with_capacity_available"])
        return Offer(
            kind["name"], specs["vcpus"], specs["memory_gib"], specs["gpus"], kind.get("gpu_description", ""),
            kind["price_cents_per_hour"] / 100, regions,
        )  # fmt: skip


@dataclass(frozen=True)
class FileSystem:
    id: str
    name: str
    region: str
    mount_point: str


class _TryAgain(Exception):
    """No usable answer. `maybe_done`: the request may have been carried out all the same."""

    def __init__(self, reason: str, maybe_done: bool, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.maybe_done = maybe_done
        self.wait_s = wait_s


@cache
def certificates() -> ssl.SSLContext:
    """Whom we believe to be Lambda. Reading them takes longer than a request, and Ray makes several providers."""
    return httpx.create_ssl_context()


def read_key(key_file: str | Path = KEY_FILE) -> str:
    """The API key: LAMBDA_API_KEY, else the file's content. FileNotFoundError or ValueError says what is missing."""
    key = os.environ.get("LAMBDA_API_KEY", "").strip()
    path = Path(key_file).expanduser()
    if not key:
        try:
            key = path.read_text().strip()
        except OSError as trouble:
            raise FileNotFoundError(
                f"no Lambda API key: LAMBDA_API_KEY is not set and {path} cannot be read ({trouble.strerror}). "
                f"Make a key at {URL}/api-keys and write it into that file."
            ) from None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"the Lambda API key in LAMBDA_API_KEY or {path} must be one word of plain characters")
    return key


class LambdaApi:
    """A client with one key. Any number of threads may use it."""

    def __init__(self, key: str, url: str = URL, folder: Path | None = None, times: Times | None = None) -> None:
        self.times = times or Times()
        self._pace = Pace(folder, self.times)
        self._http = httpx.Client(
            base_url=f"{url.rstrip('/')}/api/v1",
            headers={"Authorization": f"Bearer {key}", "Accept": "application/json"},
            timeout=httpx.Timeout(60.0, connect=10.0),
            verify=certificates(),
        )
        self._listing = threading.Lock()  # one list at a time: who waits for it takes what the other got
        self._listed: dict[str, Instance] = {}
        self._listed_at = -float("inf")
        self._changes = 0  # launches and terminations of ours, which make a list old

    # --- reading ------------------------------------------------------------------------------------------------------

    def instances(self, fresh: bool = False) -> dict[str, Instance]:
        """All instances of the account by id, as they were at most `times.listing_s` ago, or now if `fresh`."""
        asked_at = time.monotonic()
        with self._listing:
            oldest = asked_at if fresh else time.monotonic() - self.times.listing_s
            if self._listed_at < oldest:
                changes, began = self._changes, time.monotonic()
                answer = self._ask("GET", "/instances", "a list of instances")
                self._listed = {fields["id"]: Instance.of(fields) for fields in answer}
                # One that was made while ours changed something shows neither before nor after for certain.
                self._listed_at = began if changes == self._changes else -float("inf")
            return dict(self._listed)

    def offers(self) -> dict[str, Offer]:
        """All instance types by name."""
        answer = self._ask("GET", "/instance-types", "a list of instance types")
        return {name: Offer.of(fields) for name, fields in answer.items()}

    def ssh_keys(self) -> dict[str, str]:
        """Public keys by name."""
        return {key["name"]: key["public_key"] for key in self._ask("GET", "/ssh-keys", "a list of ssh keys")}

    def file_systems(self) -> list[FileSystem]:
        answer = self._ask("GET", "/file-systems", "a list of file systems")
        return [FileSystem(each["id"], each["name"], each["region"]["name"], each["mount_point"]) for each in answer]

    # --- changing -----------------------------------------------------------------------------------------------------

    def launch(self, request: Mapping[str, Any], token: str) -> str:
        """Start one instance and return its id. The same token never gives a second one that is kept unseen.

        `request` is the body of the launch without the token, which becomes one of its tags. When no answer comes, the
        instance is looked for by that tag before it is asked for again. Errors: NoCapacity, NotThere, LambdaError;
        Unreachable when it stays unknown whether there is an instance.
        """
        tags = [*request.get("tags", ()), {"key": TOKEN, "value": token}]
        body, what = {**request, "tags": tags}, f"to launch {request['instance_type_name']} in {request['region_name']}"
        perhaps, reason = False, ""
        for _ in self._tries():
            try:
                ids = self._send("POST", "/instance-operations/launch", what, body, launch=True)["instance_ids"]
                self._changed()
                return str(ids[0])
            except NoCapacity as trouble:
                raise self._with_places(trouble, request) from None
            except _TryAgain as trouble:
                self._changed()
                perhaps, reason = perhaps or trouble.maybe_done, str(trouble)
                if trouble.maybe_done and (found := self.launched(token)):
                    return found
                time.sleep(trouble.wait_s or 0.0)
        if perhaps and (found := self.launched(token)):
            return found
        unsure = f" It may still start one, with the tag {TOKEN}={token}: look at {URL}/instances." if perhaps else ""
        raise Unreachable(f"Lambda did not answer when asked {what}: {reason}.{unsure}", nothing_done=not perhaps)

    def launched(self, token: str) -> str | None:
        """The id of the instance with this token, once it can be seen; None if it is not within `times.settle_s`."""
        deadline = time.monotonic() + self.times.settle_s
        while True:
            last = time.monotonic() > deadline  # known before the list is asked for: it may be long under way
            found = [i.id for i in self.instances(fresh=True).values() if i.tags.get(TOKEN) == token and i.alive]
            if found or last:
                return min(found, default=None)
            time.sleep(self.times.settle_s / 10)

    def terminate(self, ids: Sequence[str]) -> list[str]:
        """Ask for the end of instances; the ids that Lambda says are ending. NotThere if it knows one of them not."""
        body = {"instance_ids": list(ids)}
        answer = self._ask("POST", "/instance-operations/terminate", f"to end {', '.join(ids)}", body)
        self._changed()
        return [str(fields["id"]) for fields in answer["terminated_instances"]]

    def close(self) -> None:
        self._http.close()

    # --- how a request is made ----------------------------------------------------------------------------------------

    def _changed(self) -> None:
        self._changes += 1
        self._listed_at = -float("inf")

    def _tries(self) -> Iterator[float]:
        """Waits between tries for as long as there is patience. Each is yielded before it is waited for."""
        deadline, wait_s = time.monotonic() + self.times.patience_s, self.times.backoff_s
        while True:
            yield wait_s
            if time.monotonic() + wait_s > deadline:
                return
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, self.times.backoff_most_s)

    def _ask(self, method: str, path: str, what: str, body: Any = None) -> Any:
        """A request that may be sent twice. Returns the answer's data."""
        reason = ""
        for wait_s in self._tries():
            try:
                return self._send(method, path, what, body)
            except _TryAgain as trouble:
                reason = str(trouble)
                logger.info("Lambda: %s: %s; trying again", what, reason)
                time.sleep(max(0.0, (trouble.wait_s or 0.0) - wait_s))
        raise Unreachable(f"Lambda did not answer when asked {what}: {reason}; tried for {self.times.patience_s:.0f} s")

    def _send(self, method: str, path: str, what: str, body: Any = None, launch: bool = False) -> Any:
        """Send it once: the answer's data, or LambdaError for a refusal, or _TryAgain."""
        self._pace.wait(launch)
        try:
            response = self._http.request(method, path, json=body)
        except (httpx.ConnectError, httpx.ConnectTimeout) as trouble:
            raise _TryAgain(f"no connection ({trouble})", maybe_done=False) from None
        except httpx.HTTPError as trouble:
            raise _TryAgain(f"the answer was lost ({type(trouble).__name__}: {trouble})", maybe_done=True) from None
        if response.status_code == 429:
            raise _TryAgain("too many requests", maybe_done=False, wait_s=retry_after_s(response.headers))
        if response.status_code >= 500:
            wait_s = retry_after_s(response.headers)
            raise _TryAgain(f"HTTP {response.status_code}", maybe_done=True, wait_s=wait_s)
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if response.is_success and isinstance(answer, dict) and "data" in answer:
            return answer["data"]
        if response.is_success:
            raise _TryAgain("an answer that cannot be read", maybe_done=True)
        raise refused(what, response.status_code, answer.get("error") if isinstance(answer, dict) else None)

    def _with_places(self, trouble: NoCapacity, request: Mapping[str, Any]) -> NoCapacity:
        """The same refusal with what could be had instead, if Lambda tells."""
        try:
            text = capacity_text(self.offers(), request["instance_type_name"], request["region_name"])
        except (NotThere, Unreachable):
            text = trouble.message
        return NoCapacity(text, trouble.code, trouble.status)


def capacity_text(offers: Mapping[str, Offer], type_name: str, region: str) -> str:
    """What to say when a region has none of a type: where it is, and what is there."""
    offer = offers.get(type_name)
    elsewhere = ", ".join(offer.regions) if offer and offer.regions else "none"
    here = ", ".join(sorted(name for name, each in offers.items() if region in each.regions)) or "none"
    return (
        f"Lambda has no {type_name} free in {region}. Regions that have it now: {elsewhere}. "
        f"Types that {region} has now: {here}. Change region_name or instance_type_name (a file system is mounted "
        "in its own region only), or try again later."
    )


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """The wait that an answer asks for, in seconds or as a date; None if it asks for none."""
    text = headers.get("retry-after", "").strip()
    if not text:
        return None
    try:
        wait_s = float(text)
    except ValueError:
        try:
            wait_s = parsedate_to_datetime(text).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(wait_s, 0.0), LONGEST_WAIT_S)

"""Waiting for room on the cluster: what is needed is asked for, said aloud, and given up on at a deadline."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import ray
from ray._raylet import PlacementGroupID
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from nanochat_ray.messages import ClusterError

logger = logging.getLogger(__name__)

SAY_EVERY_S = 30.0
FULL_SIZE_FIRST_S = 20.0  # how long the greatest number of workers is asked for alone
TRY_S = 3.0


@dataclass(frozen=True)
class Workers:
    """The machines' share of a training stage. Changes how fast it runs, not its result."""

    at_least: int = 1
    at_most: int = 1
    use_gpu: bool = False
    cpus_each: float = 1.0
    threads_each: int | None = None  # torch threads of a CPU worker; None: as Ray sets them
    rollout_workers: int | None = None  # processes that sample beside them; None: a stage that packs rows instead

    @property
    def resources_each(self) -> dict[str, float]:
        return {"CPU": self.cpus_each} | ({"GPU": 1.0} if self.use_gpu else {})

    def data_actors(self, count: int) -> int:
        """Processes that read, tokenize and pack for `count` workers: one each for GPUs, which are fast, else one."""
        return count if self.use_gpu else 1

    def beside(self, count: int) -> list[dict[str, float]]:
        """What must run beside `count` workers: packing, or a process that samples; further ones take what is left."""
        if self.rollout_workers is None:
            return [{"CPU": 1.0}] * self.data_actors(count)
        sampling = {"CPU": 1.0} | ({"GPU": 1.0} if self.use_gpu else {})
        return [sampling] * min(1, self.rollout_workers)

    def bundles(self, count: int) -> list[dict[str, float]]:
        """What `count` workers take, with what must run beside them."""
        return [self.resources_each] * count + self.beside(count)

    def total(self, count: int) -> dict[str, float]:
        """The sum of the bundles."""
        bundles = self.bundles(count)
        return {kind: sum(bundle.get(kind, 0.0) for bundle in bundles) for kind in ("CPU", "GPU")}

    def need(self, count: int) -> str:
        total, beside = self.total(count), len(self.beside(count))
        gpus = f" and {total['GPU']:g} GPU" if total["GPU"] else ""
        what = "data" if self.rollout_workers is None else "rollouts"
        return f"{total['CPU']:g} CPU{gpus} ({count} x {self.cpus_each:g} CPU for workers, {beside} for {what})"


def wait_for_room(
    workers: Workers, what: str, wait_s: float, can_grow: bool, stopped: Callable[[], bool]
) -> int | None:
    """The number of workers that fit now, at_most of them if possible; None if asked to stop meanwhile.

    Asks with a placement group, so that an autoscaler hears of the need. Raises ClusterError after `wait_s`, or at once
    if a cluster that cannot grow is too small in total.
    """
    if not can_grow:
        _refuse_if_too_small(workers, what)
    begun = said = time.monotonic()
    while True:
        alone = time.monotonic() - begun < FULL_SIZE_FIRST_S
        count = most_that_fit(workers, workers.at_most if alone else workers.at_least)
        if count is not None:
            return count
        if stopped():
            return None
        if time.monotonic() - said >= SAY_EVERY_S:
            said = time.monotonic()
            logger.warning(
                "%s: waiting for room: needs %s; free %s; %.0f of at most %.0f s",
                what, workers.need(workers.at_least), _free(), said - begun, wait_s,
            )
        if time.monotonic() - begun > wait_s:
            raise ClusterError(
                f"{what} waited {wait_s:.0f} s for {workers.need(workers.at_least)}; the cluster has {_total()}, "
                f"free are {_free()}. Lower --workers, give MIN:MAX, or add machines; --wait-s sets the deadline."
            )


def most_that_fit(workers: Workers, at_least: int) -> int | None:
    """The greatest number of workers from `at_least` to at_most that could be placed now, found by bisection."""
    if not fits(workers, at_least, TRY_S):
        return None
    low, high = at_least, workers.at_most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(workers, middle, TRY_S) else (low, middle - 1)
    return low


def fits(workers: Workers, count: int, timeout_s: float) -> bool:
    """Whether `count` workers could be placed now."""
    group: PlacementGroup = placement_group(workers.bundles(count))
    try:
        return group.wait(timeout_s)
    finally:
        remove_placement_group(group)


def room_for_more(workers: Workers, count: int) -> bool:
    """Whether one more worker than the running `count` could be placed beside them now.

    The packing processes may be between two of their turns and hold nothing, so the totals count too.
    """
    if count >= workers.at_most or not _enough_in_total(workers, count + 1):
        return False
    group: PlacementGroup = placement_group([workers.resources_each])
    try:
        return group.wait(TRY_S)
    finally:
        remove_placement_group(group)


def groups_of_this_job() -> set[str]:
    """Ids of the placement groups that processes of this job hold or wait for."""
    job_id = ray.get_runtime_context().get_job_id()  # which ends the id of everything that a job makes
    table = placement_group_table()
    return {name for name, group in table.items() if name.endswith(job_id) and group["state"] != "REMOVED"}


def give_back(groups: set[str]) -> None:
    """Remove placement groups by their ids.

    Ray Train's controller leaves its group behind when it is killed: its cleaner asks the dashboard whether the
    controller lives, and a private cluster has none.
    """
    for name in groups:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))


def _enough_in_total(workers: Workers, count: int) -> bool:
    have = ray.cluster_resources()
    return all(have.get(kind, 0) >= amount for kind, amount in workers.total(count).items())


def _refuse_if_too_small(workers: Workers, what: str) -> None:
    if not _enough_in_total(workers, workers.at_least):
        raise ClusterError(
            f"{what} needs {workers.need(workers.at_least)}, the cluster has {_total()}. Lower --workers, or start Ray "
            "with more (ray start --head --num-cpus N)."
        )


def _total() -> str:
    return _amounts(ray.cluster_resources())


def _free() -> str:
    return _amounts(ray.available_resources())


def _amounts(resources: dict[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPU and {resources.get('GPU', 0):g} GPU"

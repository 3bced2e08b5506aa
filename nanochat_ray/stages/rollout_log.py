"""The rollout log: every rollout of a run as a line of JSON, in one file per step that only grows.

`train_000012.jsonl` has what step 12 learned from, `val_000000.jsonl` what the evaluation before step 0 saw. A unit is
written at once: a line per group and per rollout, and last a line that says the unit is whole, with the hash of those
before it. What has no such line, or is not what was hashed, does not count, so neither a crash nor a broken disk leaves
half a unit. Steps are trained on what their file says: after a crash from the same rollouts, and a copy of the folder
replays a run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from nanochat_ray.messages import FinishedUnit, RolloutGroup, RolloutPrompt, RolloutSplit, RolloutUnit, ScoredRollout
from nanochat_ray.model.gpt import GPT
from nanochat_ray.remote import Remote
from nanochat_ray.run_dir import pull_records

logger = logging.getLogger(__name__)

ROLLOUTS = "rollouts"
Guard = Callable[[], AbstractContextManager[None]]


class RolloutLog:
    """The log in a folder. `guard` gives the right to write, or raises."""

    def __init__(self, folder: Path, guard: Guard = nullcontext) -> None:
        self.folder, self._guard = folder, guard
        self._whole: dict[Path, int] = {}  # bytes of the files written to, up to the end of the last unit
        self._to_push: set[Path] = set()

    def append(self, done: FinishedUnit) -> None:
        """Write a unit down; when this returns it is on the disk. OSError with the file's name if it cannot be."""
        path = self._path(done.unit.split, done.unit.step)
        data = _as_bytes(done)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._guard():
            try:
                if path not in self._whole:
                    self._whole[path] = _whole_bytes(path)
                with open(path, "ab") as file:
                    file.truncate(self._whole[path])  # half a unit of a process that died, or of a full disk
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                what = f"{done.unit.name} not written to {path}, those before are kept: {error.strerror}"
                raise OSError(error.errno, what) from error
        self._whole[path] += len(data)
        self._to_push.add(path)

    def units(self, split: RolloutSplit, step: int) -> dict[int, tuple[RolloutGroup, ...]]:
        """The groups of the units of a step that are there, by the unit's number; of two the later one."""
        found: dict[int, tuple[RolloutGroup, ...]] = {}
        for lines, end in _read(self._path(split, step)):
            found[end["unit"]] = _groups(lines)
        return found

    def push(self) -> None:
        """Copy what was written since the last time to the run's store, if it has one."""
        if (remote := Remote.of(self.folder)) is not None and self._to_push:
            with self._guard():
                pass  # not held for as long as the store takes
            for path in sorted(self._to_push):
                remote.patient().push_log(path)
        self._to_push.clear()

    def pull(self) -> None:
        """Bring here what only the run's store has."""
        pull_records(self.folder)
        self._to_push.update(self.folder.glob("*.jsonl"))  # what a process that died may not have pushed

    def _path(self, split: RolloutSplit, step: int) -> Path:
        return self.folder / f"{split}_{step:06d}.jsonl"


def log_sha256(folder: Path) -> str:
    """A hash of a whole log."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.jsonl")):
        found.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()


class LoggedRollouts:
    """A source that samples nothing: units come from another run's log."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"no rollout log at {folder}: give the folder {ROLLOUTS} of a run's stage rl")
        self.log = RolloutLog(folder)

    def publish(self, version: int, model: GPT) -> None:
        return None

    def submit(self, units: Sequence[RolloutUnit]) -> None:
        return None

    def finished(self, units: Sequence[RolloutUnit]) -> Iterator[FinishedUnit]:
        """ValueError for a unit that the log does not have, or has of other prompts or seeds."""
        steps = {(unit.split, unit.step) for unit in units}
        there = {(split, step): self.log.units(split, step) for split, step in steps}
        for unit in units:
            groups = there[unit.split, unit.step].get(unit.number)
            if groups is None:
                raise ValueError(f"the log {self.log.folder} has no {unit.name}; replay with the settings of its run")
            if tuple(group.prompt for group in groups) != unit.prompts:
                raise ValueError(
                    f"{unit.name} in the log {self.log.folder} has other prompts or seeds; replay with the task and "
                    "the settings of its run"
                )
            yield FinishedUnit(unit, groups, by="log")

    def counts(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        return None


def _as_bytes(done: FinishedUnit) -> bytes:
    data = "".join(json.dumps(line) + "\n" for line in _lines(done)).encode()
    end = {
        "kind": "unit", "unit": done.unit.number, "version": done.unit.version, "by": done.by,
        "generate_s": done.generate_s, "score_s": done.score_s, "sha256": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip
    return data + json.dumps(end).encode() + b"\n"


def _lines(done: FinishedUnit) -> Iterator[dict[str, Any]]:
    number = done.unit.number
    for group in done.groups:
        prompt = group.prompt
        yield {
            "kind": "group", "unit": number, "prompt_id": prompt.id, "index": prompt.index, "seed": prompt.seed,
            "prompt_tokens": prompt.token_ids, "version": group.version, "set_aside": group.set_aside,
        }  # fmt: skip
        for rollout in group.rollouts:
            yield {
                "kind": "rollout", "unit": number, "prompt_id": prompt.id, "version": group.version,
                "seed": prompt.seed, "sample": rollout.sample, "reward": rollout.reward, "failure": rollout.failure,
                "finish_reason": rollout.finish_reason, "text": rollout.text, "tool_calls": rollout.tool_calls,
                "tokens": rollout.token_ids, "mask": rollout.mask, "logprobs": rollout.logprobs,
            }  # fmt: skip


def _groups(lines: Sequence[dict[str, Any]]) -> tuple[RolloutGroup, ...]:
    groups: list[tuple[dict[str, Any], list[ScoredRollout]]] = []
    for line in lines:
        if line["kind"] == "group":
            groups.append((line, []))
            continue
        groups[-1][1].append(
            ScoredRollout(
                line["sample"], tuple(line["tokens"]), tuple(line["mask"]), tuple(line["logprobs"]),
                line["finish_reason"], line["text"], tuple((asked, given) for asked, given in line["tool_calls"]),
                line["reward"], line["failure"],
            )
        )
    return tuple(
        RolloutGroup(
            RolloutPrompt(line["prompt_id"], line["index"], tuple(line["prompt_tokens"]), line["seed"]),
            line["version"], tuple(rollouts), line["set_aside"],
        )
        for line, rollouts in groups
    )


def _read(path: Path) -> Iterator[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """The lines of each unit, and the one that ends it. Units that are not as they were written are left out."""
    for data, last in _parts(path):
        sha256 = hashlib.sha256(data).hexdigest()
        if f'"sha256": "{sha256}"'.encode() not in last:
            which = last[:30].decode(errors="replace")
            logger.warning("%s: a unit is not as it was written and does not count: %s...", path, which)
            continue
        yield [json.loads(line) for line in data.splitlines()], json.loads(last)


def _whole_bytes(path: Path) -> int:
    """Where the last unit ends: behind the last line that says so."""
    return sum(len(data) + len(last) for data, last in _parts(path))


def _parts(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """The lines of each unit, and the one that ends it."""
    data = path.read_bytes() if path.exists() else b""
    begun = place = 0
    for line in data.splitlines(keepends=True):
        place += len(line)
        if line.startswith(b'{"kind": "unit"') and line.endswith(b"}\n"):
            yield data[begun : place - len(line)], line
            begun = place

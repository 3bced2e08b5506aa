"""The rollout log: every rollout of a run as a line of JSON, in one file per step that only grows.

`train_000012.jsonl` has what step 12 learned from, `val_000000.jsonl` what the evaluation before step 0 saw. A unit is
written at once: a line per group and per rollout, and last a line that says the unit is whole. What has no such line
does not count, so a crash leaves no half unit. Steps are trained on what their file says:
after a crash from the same rollouts, and a copy of the folder replays a run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from nanochat_ray.messages import FinishedUnit, RolloutGroup, RolloutPrompt, RolloutSplit, RolloutUnit, ScoredRollout
from nanochat_ray.model.gpt import GPT
from nanochat_ray.run_dir import pull_records, push_records

ROLLOUTS = "rollouts"
Guard = Callable[[], AbstractContextManager[None]]


class RolloutLog:
    """The log in a folder. `guard` gives the right to write, or raises."""

    def __init__(self, folder: Path, guard: Guard = nullcontext) -> None:
        self.folder, self._guard = folder, guard
        self._whole: dict[Path, int] = {}  # bytes of the files written to, up to the last whole unit

    def append(self, done: FinishedUnit) -> None:
        """Write a unit down; when this returns it is on the disk. OSError if it cannot be."""
        path = self._path(done.unit.split, done.unit.step)
        data = "".join(json.dumps(line) + "\n" for line in _lines(done)).encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._guard():
            if path not in self._whole:
                self._whole[path] = _whole_bytes(path)
            with open(path, "ab") as file:
                file.truncate(self._whole[path])  # half a unit of a process that died
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        self._whole[path] += len(data)

    def units(self, split: RolloutSplit, step: int) -> dict[int, tuple[RolloutGroup, ...]]:
        """The groups of the units of a step that are there, by the unit's number; of two the later one."""
        found: dict[int, tuple[RolloutGroup, ...]] = {}
        lines: list[dict[str, Any]] = []
        for line in _read(self._path(split, step)):
            if line["kind"] != "unit":
                lines.append(line)
            else:
                found[line["unit"]] = _groups(lines)
                lines = []
        return found

    def push(self) -> None:
        """Copy the log to the run's store, if it has one."""
        if self.folder.is_dir():
            push_records(self.folder)

    def pull(self) -> None:
        """Bring here what only the run's store has."""
        pull_records(self.folder)

    def _path(self, split: RolloutSplit, step: int) -> Path:
        return self.folder / f"{split}_{step:06d}.jsonl"


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
        """ValueError for a unit that the log does not have."""
        for unit in units:
            groups = self.log.units(unit.split, unit.step).get(unit.number)
            if groups is None:
                raise ValueError(f"the log {self.log.folder} has no {unit.name}; replay with the settings of its run")
            yield FinishedUnit(unit, groups, by="log")

    def counts(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        return None


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
    yield {
        "kind": "unit", "unit": number, "version": done.unit.version, "by": done.by,
        "generate_s": done.generate_s, "score_s": done.score_s,
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


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines up to the end of the last whole unit."""
    if path.exists():
        for line in path.read_bytes()[: _whole_bytes(path)].splitlines():
            yield json.loads(line)


def _whole_bytes(path: Path) -> int:
    """Where the last whole unit ends: behind the last line that says so."""
    if not path.exists():
        return 0
    end = place = 0
    for line in path.read_bytes().splitlines(keepends=True):
        place += len(line)
        if line.startswith(b'{"kind": "unit"') and line.endswith(b"}\n"):
            end = place
    return end

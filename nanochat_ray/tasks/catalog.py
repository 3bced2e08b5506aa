"""Tasks by name: the mixtures of finetuning and the tasks of chat evaluation.

A mixture is a list of specs `name[=path][*repeats]`; a task with `*k` stands in it k times. What each name is:

| spec | train | val |
|---|---|---|
| smoltalk | SmolTalk train | its test set |
| mmlu | MMLU auxiliary_train | first 5,200 of its test set |
| gsm8k | GSM8K train | first 420 of its test set |
| simple_spelling | 200,000 made words | 256 made from other seeds |
| spelling | 80,000 made letter counts | 256 made from other seeds |
| json=FILE | your conversations but the last twentieth (1 to 500) | that twentieth |
| world=FOLDER | the embedded world's conversations | its held-out ones |
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanochat_ray.tasks.arc import ARC
from nanochat_ray.tasks.custom_json import CustomJSON
from nanochat_ray.tasks.gsm8k import GSM8K
from nanochat_ray.tasks.humaneval import HumanEval
from nanochat_ray.tasks.mmlu import MMLU
from nanochat_ray.tasks.rows import TaskSources
from nanochat_ray.tasks.smoltalk import SmolTalk
from nanochat_ray.tasks.spelling import SimpleSpelling, SpellingBee, load_words
from nanochat_ray.tasks.task import Mixture, Task
from nanochat_ray.tasks.world import WorldConversations

Split = Literal["train", "val"]

SIMPLE_SPELLING_SIZE = 200_000
SPELLING_SIZE = 80_000
SPELLING_VAL_SIZE = 256
MMLU_VAL_SIZE = 5200
GSM8K_VAL_SIZE = 420
JSON_VAL_FRAC, JSON_VAL_MAX = 0.05, 500
IDENTITY_REPEATS = 2

NANOCHAT_VAL_MIXTURE = ("smoltalk", "mmlu", "gsm8k")
MIXTURE_NAMES = ("smoltalk", "mmlu", "gsm8k", "simple_spelling", "spelling", "json", "world")
SPEC = re.compile(r"(?P<name>[^=*]+)(=(?P<path>.+?))?(\*(?P<repeats>\d+))?")


@dataclass(frozen=True)
class TaskSpec:
    """One part of a mixture."""

    name: str
    path: str | None = None
    repeats: int = 1

    @staticmethod
    def parse(text: str) -> TaskSpec:
        """ValueError for a text that is no `name[=path][*repeats]`, or a name that is no task, with the nearest."""
        match = SPEC.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"task {text!r}: a spec is name[=path][*repeats], for instance gsm8k*4 or json=my.jsonl")
        name = match["name"].strip().lower()
        if name not in MIXTURE_NAMES:
            raise ValueError(f"unknown task {name!r} in {text!r}; {suggest(name, MIXTURE_NAMES)}")
        if (name in ("json", "world")) != (match["path"] is not None):
            wants = "needs a path, as in json=my.jsonl" if match["path"] is None else "takes no path"
            raise ValueError(f"task {text!r}: {name} {wants}")
        repeats = int(match["repeats"] or 1)
        if repeats < 1:
            raise ValueError(f"task {text!r}: repeats must be at least 1; leave the task out instead")
        return TaskSpec(name, match["path"], repeats)


def suggest(name: str, known: Sequence[str]) -> str:
    """Names that were perhaps meant, or all of them."""
    near = difflib.get_close_matches(name.lower(), [other.lower() for other in known], n=3)
    meant = [other for other in known if other.lower() in near]
    return f"did you mean {' or '.join(meant)}?" if meant else f"choose from {', '.join(known)}"


def make_task(spec: TaskSpec | str, split: Split, sources: TaskSources) -> Task:
    """The task of a spec, once, whatever its repeats. Raises ValueError, or TaskDataMissing (a FileNotFoundError)."""
    spec = TaskSpec.parse(spec) if isinstance(spec, str) else spec
    train = split == "train"
    if spec.name == "smoltalk":
        return SmolTalk("train" if train else "test", sources)
    if spec.name == "mmlu":
        return MMLU("auxiliary_train", sources) if train else MMLU("test", sources, stop=MMLU_VAL_SIZE)
    if spec.name == "gsm8k":
        return GSM8K("train", sources) if train else GSM8K("test", sources, stop=GSM8K_VAL_SIZE)
    if spec.name == "simple_spelling":
        size = SIMPLE_SPELLING_SIZE if train else SPELLING_VAL_SIZE
        return SimpleSpelling("train" if train else "test", load_words(sources), size)
    if spec.name == "spelling":
        size = SPELLING_SIZE if train else SPELLING_VAL_SIZE
        return SpellingBee("train" if train else "test", load_words(sources), size)
    assert spec.path is not None
    path = Path(spec.path).expanduser()
    return _json_task(path, train) if spec.name == "json" else _world_task(path, train)


def _json_task(path: Path, train: bool) -> Task:
    task = CustomJSON(path)
    n = len(task)
    held_out = min(max(1, int(n * JSON_VAL_FRAC)), JSON_VAL_MAX) if n > 1 else 0
    return task.view(stop=n - held_out) if train else task.view(start=n - held_out)


def _world_task(folder: Path, train: bool) -> Task:
    return WorldConversations(folder / ("sft_train.jsonl" if train else "sft_val.jsonl"))


def parse_mixture(specs: Sequence[str], split: Split, sources: TaskSources) -> Mixture:
    """The shuffled mixture of these specs. For "val" every task stands in it once, whatever its repeats.

    Raises ValueError for a mixture that is empty, be it for want of conversations.
    """
    parsed = [TaskSpec.parse(spec) for spec in specs]
    if split == "val":
        parsed = list(dict.fromkeys(TaskSpec(spec.name, spec.path) for spec in parsed))
    tasks = [task for spec in parsed for task in [make_task(spec, split, sources)] * spec.repeats]
    if not sum(len(task) for task in tasks):
        raise ValueError(f"the {split} mixture of {', '.join(specs) or 'no tasks'} holds no conversations")
    return Mixture(tasks)


def nanochat_mixture(mmlu_epochs: int, gsm8k_epochs: int, identity_file: Path | None = None) -> tuple[str, ...]:
    """nanochat's finetuning mixture as specs, in its order. Its validation mixture is NANOCHAT_VAL_MIXTURE."""
    identity = [f"json={identity_file}*{IDENTITY_REPEATS}"] if identity_file else []
    repeated = [f"{name}*{k}" for name, k in (("mmlu", mmlu_epochs), ("gsm8k", gsm8k_epochs)) if k]
    return ("smoltalk", *identity, *repeated, "simple_spelling", "spelling")


CHAT_TASKS: dict[str, Callable[[TaskSources], Task]] = {
    "ARC-Easy": lambda sources: ARC("ARC-Easy", "test", sources),
    "ARC-Challenge": lambda sources: ARC("ARC-Challenge", "test", sources),
    "MMLU": lambda sources: MMLU("test", sources),
    "GSM8K": lambda sources: GSM8K("test", sources),
    "HumanEval": HumanEval,
    "SpellingBee": lambda sources: SpellingBee("test", load_words(sources), SPELLING_VAL_SIZE),
}
"""The tasks of chat evaluation, in nanochat's order."""


def chat_task_names(names: str | None) -> list[str]:
    """The evaluation tasks of `A|B|C`, all of them for None. ValueError for an unknown one, with the nearest."""
    by_lower = {name.lower(): name for name in CHAT_TASKS}
    chosen = [name.strip() for name in names.split("|")] if names else list(CHAT_TASKS)
    for name in chosen:
        if name.lower() not in by_lower:
            raise ValueError(f"unknown evaluation task {name!r}; {suggest(name, list(CHAT_TASKS))}")
    return [by_lower[name.lower()] for name in chosen]

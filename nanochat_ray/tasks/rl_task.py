"""What reinforcement learning trains on: prompts, a reward for each completion, and the tools a completion may use.

| kind | prompts | reward |
|---|---|---|
| world | arithmetic of the embedded world: training numbers; for "val" the held-out ones | right or wrong |
| gsm8k | GSM8K, or your rows in a JSONL file (see tasks/prompts.py) | right or wrong, by `#### <number>` |
| file | those of a Python file (see tasks/task_file.py) | the file's |

"val" is for evaluation: a prompt of it is never trained on.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nanochat_ray.corpus.world.questions import HARD_FAMILY, is_right, question_pool, training_problems
from nanochat_ray.engine.calculator import calculate
from nanochat_ray.engine.tool_use import Tool
from nanochat_ray.messages import RolloutSplit
from nanochat_ray.tasks.gsm8k import GSM8K, extract_answer, reference_answer
from nanochat_ray.tasks.prompts import final_answer_prompt, numbered, open_prompt, parted, prompts_sha256
from nanochat_ray.tasks.rows import JsonlRows, TaskDataMissing, TaskSources
from nanochat_ray.tasks.task import Conversation
from nanochat_ray.tasks.task_file import load_task_file

WORLD_TRAIN, WORLD_TRAIN_SEED = 4096, 1
WORLD_VAL = {HARD_FAMILY: 128, "arithmetic_3": 43, "arithmetic_2": 43, "arithmetic_1": 42}
WORLD_VAL_SEED = 2
SPLITS: tuple[RolloutSplit, ...] = ("train", "val")

Reward = Callable[[Conversation, str], Awaitable[float] | float]


@dataclass(frozen=True)
class RLTask:
    """Prompts are conversations whose last message is a reference answer, each with its "id".

    A reward is any finite number; where completions are either right or wrong it is 1 or 0, and pass@k counts those of
    at least 1 as right.
    """

    name: str
    prompts: Callable[[RolloutSplit], Sequence[Conversation]]
    reward: Reward  # a plain function is called in a thread
    tools: tuple[Tool, ...] = (calculate,)


@dataclass(frozen=True)
class RLTaskSpec:
    """How to open a task, on any machine."""

    kind: Literal["world", "gsm8k", "file"]
    path: Path | None = None  # of the prompts, or of the task's file
    val_path: Path | None = None  # of prompts to evaluate on
    source_text: str | None = None  # of the task's file, which other machines do not have
    sources: TaskSources = field(default_factory=TaskSources)
    sha256: tuple[tuple[RolloutSplit, str], ...] = ()  # what the prompts of a split have to be

    def open(self) -> RLTask:
        """The task. Its prompts are read once per process; ValueError where they are others than those of `sha256`."""
        return _opened(self)

    def identity(self) -> dict[str, Any]:
        """What the training depends on: prompts and the file of the reward by their contents, wherever they lie."""
        task = self.open()
        found: dict[str, Any] = {"name": task.name}
        for split in SPLITS:
            prompts = task.prompts(split)
            found[split] = {"prompts": len(prompts), "sha256": prompts_sha256(prompts)}
        if self.kind == "file":
            found["file"] = hashlib.sha256(_text(self).encode()).hexdigest()
        return found


def rl_task_of(
    prompts: str | None, eval_prompts: str | None, task: str | None, world: bool, sources: TaskSources
) -> RLTaskSpec:
    """The task that the settings ask for: a task file, a file of prompts, the embedded world, else GSM8K.

    All of its prompts are read and checked. ValueError or FileNotFoundError for what a person got wrong.
    """
    if task and (prompts or eval_prompts):
        raise ValueError(f"--task {task} brings its own prompts; leave --prompts and --eval-prompts out")
    if eval_prompts and not prompts:
        raise ValueError(f"--eval-prompts {eval_prompts} goes with --prompts FILE.jsonl, the prompts to train on")
    if task:
        path = _existing(task, "--task", "a Python file with prompts and reward")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: a Python file in UTF-8 is needed ({error})") from error
        spec = RLTaskSpec("file", path, source_text=text)
    elif prompts:
        wanted = "a JSONL file with question and answer in each line"
        val_path = _existing(eval_prompts, "--eval-prompts", wanted) if eval_prompts else None
        spec = RLTaskSpec("gsm8k", _existing(prompts, "--prompts", wanted), val_path)
    else:
        spec = RLTaskSpec("world" if world else "gsm8k", sources=sources)
    try:
        opened = _open(spec)
        found = tuple((split, prompts_sha256(opened.prompts(split))) for split in SPLITS)
    except TaskDataMissing as error:
        raise TaskDataMissing(f"{error} Or give prompts with --prompts FILE.jsonl or --task FILE.py.") from error
    return dataclasses.replace(spec, sha256=found)


def _existing(name: str, flag: str, wanted: str) -> Path:
    path = Path(name).expanduser().absolute()
    if not path.is_file():
        raise FileNotFoundError(f"{flag} {name}: there is no such file; needed is {wanted}")
    return path


@functools.lru_cache(maxsize=4)
def _opened(spec: RLTaskSpec) -> RLTask:
    task = _open(spec)

    @functools.cache
    def prompts(split: RolloutSplit) -> Sequence[Conversation]:
        found = task.prompts(split)
        wanted = dict(spec.sha256).get(split)
        if wanted is not None and prompts_sha256(found) != wanted:
            raise ValueError(
                f"the {split} prompts of task {task.name} are not those that the job began with. They must be the same "
                f"in every process: give random a seed, sort what comes from sets, leave the files alone meanwhile"
            )
        return found

    return dataclasses.replace(task, prompts=prompts)


def _open(spec: RLTaskSpec) -> RLTask:
    if spec.kind == "world":
        return RLTask("world", _world_prompts, _world_reward)
    if spec.kind == "gsm8k":
        name = "GSM8K" if spec.path is None else "prompts"
        return RLTask(name, lambda split: _final_answer_prompts(spec, name, split), _final_answer_reward)
    assert spec.path is not None
    file = load_task_file(spec.path, _text(spec))
    return RLTask(file.name, file.prompts, file.module.reward, file.tools)


def _text(spec: RLTaskSpec) -> str:
    assert spec.path is not None
    return spec.path.read_text(encoding="utf-8") if spec.source_text is None else spec.source_text


def _world_prompts(split: RolloutSplit) -> tuple[Conversation, ...]:
    if split == "train":
        asked = training_problems(WORLD_TRAIN, WORLD_TRAIN_SEED)
    else:
        asked = [q for family, n in WORLD_VAL.items() for q in question_pool(family, n, WORLD_VAL_SEED)]
        random.Random(f"order {WORLD_VAL_SEED}").shuffle(asked)  # the first n are a mix too
    found = [{"id": q.id, "messages": q.messages, "family": q.family} for q in asked]
    return numbered(found, open_prompt, "world", split, lambda place: f"question {place} of the world")


async def _world_reward(conversation: Conversation, completion: str) -> float:
    return float(is_right(conversation["messages"], completion))


def _final_answer_prompts(spec: RLTaskSpec, name: str, split: RolloutSplit) -> tuple[Conversation, ...]:
    if spec.path is None:
        data = GSM8K("train" if split == "train" else "test", spec.sources)
        return numbered(data, final_answer_prompt, name, split, lambda place: f"GSM8K, {split} row {place}")
    path = spec.val_path if spec.val_path is not None and split == "val" else spec.path
    if not path.is_file():
        raise TaskDataMissing(f"no prompts at {path}: this process runs where the file is not, or it was moved")
    rows = JsonlRows(path)
    first, stop = 0, len(rows)
    if spec.val_path is None:
        try:
            cut = parted(len(rows))
        except ValueError as error:
            raise ValueError(f"{path}: {error} (--eval-prompts FILE.jsonl)") from error
        first, stop = (0, cut) if split == "train" else (cut, stop)
    values = (rows[i] for i in range(first, stop))
    lines = rows.numbers[first:stop].tolist() or [1]
    return numbered(values, final_answer_prompt, name, split, lambda place: f"{path}, line {lines[place]}")


async def _final_answer_reward(conversation: Conversation, completion: str) -> float:
    """1 where both final answers are the same string (see tasks/gsm8k.py), else 0."""
    found = extract_answer(completion)
    return float(found is not None and found == reference_answer(conversation))

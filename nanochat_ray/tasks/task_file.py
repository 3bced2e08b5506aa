"""A task of your own for reinforcement learning: one Python file, from anywhere (`--task FILE.py`).

What the file holds:

- `prompts`: a list, or a function of the split ("train" or "val") that gives one. A prompt is a question as a text, or
  `{"prompt": question, "answer": what the reward compares with}` with more keys if you like, or a conversation. They
  must come out the same in every process: give `random` a seed, sort what comes from sets.
- `eval_prompts`, if you like: the list to evaluate on. Without it, and with a plain list of prompts, the last twentieth
  of them (1 to 500) is kept for evaluation.
- `async def reward(conversation, completion)`: a number for what the model wrote, 1 for a right answer. What the prompt
  has besides its text stands in `conversation["answer"]` and so on. A plain `def` is called in a thread: write one if
  it blocks or computes for long. See tasks/rewards.py for what a completion's text is, and for what happens when a
  reward fails.
- `tools`, if you like: functions from the text of a python block, whatever the model has put there, to its output, or
  None to say nothing. Default is the calculator, `()` is none.

Other machines get the file's text alone: files beside it are not there, packages must be installed on all of them.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.abc
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from nanochat_ray.engine.calculator import calculate
from nanochat_ray.engine.tool_use import Tool
from nanochat_ray.messages import RolloutSplit
from nanochat_ray.tasks.prompts import numbered, open_prompt, parted
from nanochat_ray.tasks.task import Conversation


@dataclass(frozen=True)
class TaskFile:
    """The module that a task's file makes, and where in the file its names are."""

    path: Path
    module: ModuleType
    lines: dict[str, int]  # of the names at the top level

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def tools(self) -> tuple[Tool, ...]:
        return tuple(getattr(self.module, "tools", (calculate,)))

    def prompts(self, split: RolloutSplit) -> tuple[Conversation, ...]:
        """The prompts of a split. ValueError with file and line for what is none."""
        has_own = hasattr(self.module, "eval_prompts")
        source = "eval_prompts" if has_own and split == "val" else "prompts"
        values = self._values(source, split)
        first, stop = 0, len(values)
        if not has_own and not callable(self.module.prompts):
            try:
                cut = parted(len(values))
            except ValueError as error:
                raise ValueError(f"{self.where(source)}: {error} (eval_prompts)") from error
            first, stop = (0, cut) if split == "train" else (cut, stop)
        return numbered(
            values[first:stop], open_prompt, self.name, split,
            lambda place: f"{self.where(source)}: prompt {first + place} of {source}",
        )

    def where(self, name: str) -> str:
        return f"{self.path}, line {self.lines.get(name, 1)}"

    def _values(self, source: str, split: RolloutSplit) -> list[Any]:
        found = getattr(self.module, source)
        if callable(found):
            with _told_of(self.path, self.lines.get(source, 1)):
                found = found(split)
                found = list(found) if isinstance(found, Iterator) else found
        if isinstance(found, str | dict) or not isinstance(found, Iterable):
            raise ValueError(f"{self.where(source)}: {source} must be a list of prompts, not {type(found).__name__}")
        return list(found)


@functools.lru_cache(maxsize=4)
def load_task_file(path: Path, text: str) -> TaskFile:
    """The task that a file's text makes; `path` is its name for people. A text is run once per process.

    ValueError with file and line for what a person got wrong in it.
    """
    try:
        lines = _lines(ast.parse(text))
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise ValueError(f"{path}, line {line}: {getattr(error, 'msg', error)}") from error
    name = f"nanochat_ray_task_{hashlib.sha256(f'{path} {text}'.encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_loader(name, _FromText(path, text), origin=str(path))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        with _told_of(path):
            spec.loader.exec_module(module)
        task = TaskFile(path, module, lines)
        _check(task)
    except BaseException:
        del sys.modules[name]
        raise
    return task


class _FromText(importlib.abc.InspectLoader):
    """Imports a module from its text; a traceback still shows its lines."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text = path, text

    def get_source(self, fullname: str) -> str:
        return self.text

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.text, str(self.path))


def _lines(tree: ast.Module) -> dict[str, int]:
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[node.name] = node.lineno
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    found[target.id] = node.lineno
    return found


def _check(task: TaskFile) -> None:
    for name, form in (("prompts", "prompts = [...]"), ("reward", "async def reward(conversation, completion)")):
        if not hasattr(task.module, name):
            raise ValueError(f"{task.path}, line 1: a task file needs `{form}`; there is no {name} in it")
    reward = task.module.reward
    if not callable(reward):
        raise ValueError(f"{task.where('reward')}: reward must be a function, not {type(reward).__name__}")
    try:
        inspect.signature(reward).bind({}, "")
    except TypeError as error:
        raise ValueError(
            f"{task.where('reward')}: reward is called as reward(conversation, completion), but: {error}"
        ) from error
    tools = getattr(task.module, "tools", ())
    if not isinstance(tools, tuple | list) or not all(callable(tool) for tool in tools):
        raise ValueError(f"{task.where('tools')}: tools must be a tuple of functions, () for none, not {tools!r:.100}")


@contextlib.contextmanager
def _told_of(path: Path, line: int = 1) -> Iterator[None]:
    """What goes wrong in a task's file, as a ValueError that names the line; `line` where none of the file's ran."""
    try:
        yield
    except (Exception, SystemExit) as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        at = frames[-1].lineno if frames else line
        raise ValueError(f"{path}, line {at}: {type(error).__name__}: {error}") from error

"""What a task is: conversations by index, seen through a slice, and a grade for a completion. And mixtures of tasks."""

from __future__ import annotations

import copy
import operator
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, Self, TypeAlias

import numpy as np

Conversation: TypeAlias = dict[str, Any]
"""{"messages": [{"role", "content"}, ...]} and what the task needs to grade it (letters, entry_point, ...)."""

EvalType = Literal["categorical", "generative"]
MIXTURE_SEED = 42


class Task(ABC):
    """Conversations [start, stop) of a data set, every step-th one. A view, nothing is copied.

    `task[i]` is the same conversation at every call; a stop beyond the data is the data's end. IndexError outside of
    0 <= i < len(task), ValueError for a slice that makes no sense.
    """

    name: str
    eval_type: ClassVar[EvalType | None] = None  # None: not for evaluation

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1) -> None:
        if start < 0 or step < 1 or (stop is not None and stop < start):
            raise ValueError(f"not 0 <= start <= stop and 1 <= step: start {start}, stop {stop}, step {step}")
        self.start, self.stop, self.step = start, stop, step

    @abstractmethod
    def num_examples(self) -> int:
        """Conversations in the data, the slice left out of account."""

    @abstractmethod
    def get_example(self, index: int) -> Conversation:
        """Conversation number `index` of the data, the slice left out of account."""

    def __len__(self) -> int:
        n = self.num_examples()
        stop = n if self.stop is None else min(self.stop, n)
        return max(0, -(-(stop - self.start) // self.step))

    def __getitem__(self, i: int) -> Conversation:
        i = operator.index(i)
        if not 0 <= i < len(self):
            raise IndexError(f"index {i} of a task of {len(self)} conversations")
        return self.get_example(self.start + i * self.step)

    def __iter__(self) -> Iterator[Conversation]:
        return (self[i] for i in range(len(self)))

    def view(self, start: int = 0, stop: int | None = None, step: int = 1) -> Self:
        """The same data seen through another slice."""
        other = copy.copy(self)
        Task.__init__(other, start, stop, step)
        return other

    def extract(self, completion: str) -> str | None:
        """The part of a completion that is graded, for the record; None if there is no such part."""
        return completion.strip()

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the completion answers the conversation. ValueError for a task that is not for evaluation."""
        raise ValueError(f"{type(self).__name__} has no right answers to compare with")


class Joined(Task):
    """Several tasks as one: `order` holds global positions, counted through the tasks' views one after another."""

    name = "joined"

    def __init__(self, tasks: Sequence[Task], start: int = 0, stop: int | None = None, step: int = 1) -> None:
        super().__init__(start, stop, step)
        if not tasks:
            raise ValueError("no tasks to join")
        self.tasks = list(tasks)
        sizes = [len(task) for task in self.tasks]
        self.ends = np.cumsum(sizes)  # (tasks,) global position behind each task
        if self.ends[-1] > np.iinfo(np.int32).max:
            raise ValueError(f"{self.ends[-1]} conversations are more than the {np.iinfo(np.int32).max} of an index")
        self.order = self._order(int(self.ends[-1]))

    def _order(self, n: int) -> np.ndarray:
        return np.arange(n, dtype=np.int32)  # (n,)

    def num_examples(self) -> int:
        return len(self.order)

    def locate(self, index: int) -> tuple[int, int]:
        """Which task, and which of its conversations, stands at `index` of the whole."""
        position = int(self.order[index])
        task = int(np.searchsorted(self.ends, position, side="right"))
        return task, position - (int(self.ends[task - 1]) if task else 0)

    def get_example(self, index: int) -> Conversation:
        task, local = self.locate(index)
        return self.tasks[task][local]


class TaskSequence(Joined):
    """Tasks one after another, in order: a curriculum."""

    name = "sequence"


class Mixture(Joined):
    """Tasks shuffled into each other once, the same way everywhere. A task listed k times stands in it k times."""

    name = "mixture"

    def _order(self, n: int) -> np.ndarray:
        # Python's shuffle, not NumPy's: its stream is what nanochat's mixture order is made of.
        order = list(range(n))
        random.Random(MIXTURE_SEED).shuffle(order)
        return np.array(order, dtype=np.int32)  # (n,)

"""Views, mixtures and sequences."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest

from nanochat_ray.tasks.task import Mixture, Task, TaskSequence


class Numbers(Task):
    name = "numbers"

    def __init__(self, n: int, label: str = "a") -> None:
        super().__init__()
        self.n, self.label = n, label

    def num_examples(self) -> int:
        return self.n

    def get_example(self, index: int) -> dict:
        return {"at": (self.label, index)}


def at(task: Task) -> list:
    return [conversation["at"] for conversation in task]


def test_a_view_is_a_slice_of_the_same_data():
    task = Numbers(10)
    for start, stop, step in [(0, None, 1), (3, 7, 1), (2, 40, 3), (9, None, 5), (10, None, 1), (12, None, 1)]:
        assert at(task.view(start, stop, step)) == at(task)[start:stop:step]
    assert len(task) == 10  # the first is as it was


def test_an_index_is_an_integer_inside():
    task = Numbers(3)
    assert task[np.int64(2)] == task[2]
    for outside in (-1, 3):
        with pytest.raises(IndexError, match=f"index {outside} of a task of 3"):
            task[outside]
    with pytest.raises(TypeError):
        task["1"]


def test_a_task_stands_in_a_mixture_as_often_as_it_is_listed():
    a, b = Numbers(5, "a"), Numbers(7, "b").view(1, None, 2)
    mixture = Mixture([a, b, a])
    counts = Counter(at(mixture))
    assert counts == Counter(at(a) * 2 + at(b))
    assert at(mixture) != sorted(at(mixture))
    assert at(mixture) == at(Mixture([a, b, a]))  # the same every time
    assert mixture.order.dtype == np.int32


def test_known_mixture_order():
    mixture = Mixture([Numbers(3, "0"), Numbers(5, "1")])
    assert ["".join(map(str, pair)) for pair in at(mixture)] == ["10", "11", "13", "14", "02", "12", "00", "01"]


def test_empty_tasks_may_be_mixed_in():
    assert at(TaskSequence([Numbers(0, "x"), Numbers(2, "a"), Numbers(0, "y"), Numbers(1, "b")])) == [
        ("a", 0), ("a", 1), ("b", 0)
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no tasks"):
        Mixture([])


def test_a_mixture_survives_pickling():
    mixture = Mixture([Numbers(3), Numbers(4)])
    assert at(pickle.loads(pickle.dumps(mixture))) == at(mixture)


def test_a_task_without_answers_does_not_grade():
    with pytest.raises(ValueError, match="no right answers"):
        Numbers(1).evaluate({}, "x")

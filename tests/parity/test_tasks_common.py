"""Order of mixtures and sequences, slices, the row shuffle and the letter prompt, against recorded ones."""

from __future__ import annotations

import pytest

from nanochat_ray.tasks.multiple_choice import render_mc
from nanochat_ray.tasks.rows import permutation
from nanochat_ray.tasks.task import Conversation, Mixture, Task, TaskSequence
from tests.parity.goldens import load_json

GOLDEN = load_json("tasks_common")


class Numbered(Task):
    """Conversation i says which task it is of and that it is number i."""

    def __init__(self, number: int, n: int, start: int = 0, stop: int | None = None, step: int = 1) -> None:
        super().__init__(start, stop, step)
        self.number, self.n = number, n

    def num_examples(self) -> int:
        return self.n

    def get_example(self, index: int) -> Conversation:
        return {"at": [self.number, index]}


def test_mixture_order():
    case = GOLDEN["mixture"]
    mixture = Mixture([Numbered(k, n) for k, n in enumerate(case["sizes"])])
    assert len(mixture) == case["length"]
    assert [mixture[i]["at"] for i in range(50)] == case["first50"]


def test_mixture_of_slices_seen_through_a_slice():
    case = GOLDEN["sliced_mixture"]
    tasks = [Numbered(min(k, 2), **spec) for k, spec in enumerate(case["tasks"])]  # the third task is listed twice
    mixture = Mixture(tasks, **case["view"])
    assert len(mixture) == case["length"]
    assert [conversation["at"] for conversation in mixture] == case["order"]


def test_sequence():
    case = GOLDEN["sequence"]
    sequence = TaskSequence([Numbered(k, n) for k, n in enumerate(case["sizes"])])
    assert len(sequence) == sum(case["sizes"])
    assert {i: sequence[int(i)]["at"] for i in case["at"]} == case["at"]


@pytest.mark.parametrize("case", GOLDEN["slicing"], ids=lambda case: str(case["args"]))
def test_slicing(case):
    task = Numbered(0, case["n"], **case["args"])
    physical = [position for position in case["physical"] if position < case["n"]]  # a stop beyond the end is clamped
    assert len(task) == len(physical)
    assert [conversation["at"][1] for conversation in task] == physical
    for outside in (len(task), -1):
        with pytest.raises(IndexError):
            task[outside]


@pytest.mark.parametrize("case", GOLDEN["bad_slicing"], ids=lambda case: str(case["args"]))
def test_bad_slicing(case):
    with pytest.raises(ValueError):
        Numbered(0, 10, **case["args"])


@pytest.mark.parametrize("n", GOLDEN["shuffle_seed42"])
def test_row_order(n):
    assert permutation(int(n)).tolist() == GOLDEN["shuffle_seed42"][n]


@pytest.mark.parametrize("case", GOLDEN["render_mc"], ids=lambda case: case["question"][:20])
def test_letter_prompt(case):
    assert render_mc(case["question"], case["letters"], case["choices"]) == case["text"]

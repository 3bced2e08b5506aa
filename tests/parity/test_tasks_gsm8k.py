"""GSM8K: answers, worked answers cut into parts, row order, grades."""

from __future__ import annotations

import pytest

from nanochat_ray.tasks.gsm8k import GSM8K, extract_answer, split_calls
from nanochat_ray.tasks.rows import TaskSources, permutation
from tests.parity.goldens import load_json
from tests.real_data import needs_real_data, real_data

GOLDEN = load_json("tasks_gsm8k")


@pytest.mark.parametrize(("text", "answer"), GOLDEN["answer_extraction"])
def test_answer_extraction(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize("case", GOLDEN["part_splitting"], ids=lambda case: case["answer"] or "empty")
def test_part_splitting(case):
    assert split_calls(case["answer"]) == case["parts"]


@pytest.mark.parametrize("split", GOLDEN["splits"])
def test_row_order(split):
    case = GOLDEN["splits"][split]
    assert permutation(case["n"])[:20].tolist() == case["physical_rows"]


@needs_real_data
@pytest.mark.parametrize("split", GOLDEN["splits"])
def test_examples(split):
    case = GOLDEN["splits"][split]
    task = GSM8K(split, TaskSources(task_data=real_data()))
    assert len(task) == case["n"]
    assert [task[i] for i in range(len(case["examples"]))] == case["examples"]


@pytest.mark.parametrize("case", GOLDEN["evaluate"], ids=lambda case: f"{case['index']}-{case['response'][:20]}")
def test_grades(case):
    conversation = GOLDEN["splits"]["test"]["examples"][case["index"]]
    task = GSM8K.__new__(GSM8K)  # grading needs no data
    assert task.evaluate(conversation, case["response"]) == bool(case["correct"])
    assert task.reward(conversation, case["response"]) == case["reward"]

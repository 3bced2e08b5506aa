"""HumanEval: the program in a completion, the imports of a prompt, the text that is run.

The golden's `execution` and `outcomes` run programs; they come with the sandbox.
"""

from __future__ import annotations

import pytest

from nanochat_ray.tasks.humaneval import HumanEval, assemble_program, extract_imports, extract_program
from nanochat_ray.tasks.rows import TaskSources, permutation
from tests.parity.goldens import load_json
from tests.real_data import needs_real_data, real_data

GOLDEN = load_json("tasks_humaneval")
# Not recognised by the reference, wanted: other spellings of the tag, imports in parentheses over several lines.
BETTER_PROGRAMS = {"```py\nz=1\n```": "z=1", "```Python\nUpper=1\n```": "Upper=1"}
BETTER_IMPORTS = {"from x import (\n  a,\n  b)\nimport y\n": "from x import (\n  a,\n  b)\nimport y"}


@pytest.mark.parametrize(("completion", "program"), GOLDEN["extract_program"])
def test_program_in_completion(completion, program):
    assert extract_program(completion) == BETTER_PROGRAMS.get(completion, program)


@pytest.mark.parametrize(("prompt", "imports"), GOLDEN["extract_imports"])
def test_imports(prompt, imports):
    assert extract_imports(prompt) == BETTER_IMPORTS.get(prompt, imports)


@pytest.mark.parametrize("case", GOLDEN["programs"], ids=lambda case: case.get("entry_point", case.get("index")))
def test_program_text(case):
    if "index" in case:
        problem = GOLDEN["first3"][case["index"]]
        prompt = problem["messages"][0]["content"]
    else:
        problem, prompt = case, case["prompt"]
    assert assemble_program(prompt, case["completion"], problem["test"], problem["entry_point"]) == case["program"]


def test_row_order():
    assert permutation(GOLDEN["n"])[:20].tolist() == GOLDEN["physical_rows"]


@needs_real_data
def test_examples():
    task = HumanEval(TaskSources(task_data=real_data()))
    assert len(task) == GOLDEN["n"]
    assert [task[i] for i in range(3)] == GOLDEN["first3"]
    case = GOLDEN["programs"][0]
    assert task.program(task[case["index"]], case["completion"]) == case["program"]

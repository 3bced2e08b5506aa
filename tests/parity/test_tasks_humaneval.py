"""HumanEval: the program in a completion, the imports of a prompt, the text that is run, and how running it ends."""

from __future__ import annotations

import pytest

from nanochat_ray.sandbox import run_program
from nanochat_ray.tasks.humaneval import HumanEval, assemble_program, extract_imports, extract_program
from nanochat_ray.tasks.rows import TaskSources, permutation
from tests.parity.goldens import load_json
from tests.real_data import needs_real_data, real_data
from tests.sandbox.conftest import isolation  # noqa: F401  a fixture

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


# Other than the reference, on purpose: an early exit is no success, the module is not the main one, and what the
# reference takes away from a program it may try here, since it is isolated.
BETTER_ENDINGS = {
    "exit0": {"success": False, "error_kind": "SystemExit"},
    "exit3": {"error_kind": "SystemExit"},
    "main guard": {"stdout": ""},
    "system": {"success": True, "error_kind": None},
}


@pytest.mark.parametrize("case", GOLDEN["execution"], ids=lambda case: case["name"])
def test_execution(case, isolation):  # noqa: F811
    result = run_program(case["code"], case["limit_s"] or 5.0, isolation=isolation)
    wanted = case | BETTER_ENDINGS.get(case["name"], {})
    kind = None if result.timeout or result.error is None else result.error.split(":")[0]
    found = {"success": result.success, "stdout": result.stdout, "error_kind": kind, "timeout": result.timeout,
             "memory_exceeded": result.memory_exceeded}  # fmt: skip
    assert found == {name: wanted[name] for name in found}


@needs_real_data
@pytest.mark.parametrize("case", GOLDEN["outcomes"], ids=lambda case: f"{case['index']} {case['which']}")
def test_outcomes(case, isolation):  # noqa: F811
    task = HumanEval(TaskSources(task_data=real_data()))
    example = task[case["index"]]
    solution = example["messages"][1]["content"]
    answers = {
        "canonical": solution,
        "wrong": f"def {example['entry_point']}(*args):\n    return None",
        "broken": solution + "\n)",
    }
    assert run_program(task.program(example, answers[case["which"]]), isolation=isolation).success == case["success"]

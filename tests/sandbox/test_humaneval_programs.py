"""HumanEval's own solutions in the sandbox: all of them pass, and none does once it is mutilated.

Mutilations are of kinds that no test can take for right: the function gives back nothing or never what it should, or
raises, or is not there, or the program ends before its last statement.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from nanochat_ray import sandbox
from nanochat_ray.sandbox import ProgramResult
from nanochat_ray.tasks.humaneval import HumanEval
from nanochat_ray.tasks.rows import TaskSources
from tests.real_data import needs_real_data, real_data
from tests.sandbox.isolated import require

pytestmark = needs_real_data


@pytest.fixture(scope="module")
def task() -> HumanEval:
    require(sandbox.usable() or "bwrap")
    return HumanEval(TaskSources(task_data=real_data()))


def answers(task: HumanEval, change: Callable[[str, str], str] = lambda code, name: code) -> list[str]:
    """The program of each reference solution, changed."""
    changed = [change(example["messages"][1]["content"], example["entry_point"]) for example in task]
    return [task.program(example, f"```python\n{code}\n```") for example, code in zip(task, changed, strict=True)]


def with_body(code: str, name: str, body: str) -> str:
    """The code with another body in its function `name`."""
    tree = ast.parse(code)
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    function.body = ast.parse(body).body
    return ast.unparse(tree)


def with_other_results(code: str, name: str) -> str:
    """The code with a function that computes what is right, and gives back the opposite, or twice of it in a list."""
    right = "    right = _right(*args)\n    return not right if isinstance(right, bool) else [right, right]"
    return f"{code}\n_right = {name}\ndef {name}(*args):\n{right}"


MUTILATIONS: dict[str, tuple[Callable[[str, str], str], set[str]]] = {
    "gives nothing back": (lambda code, name: with_body(code, name, "pass"), {"failed"}),
    "gives another value": (with_other_results, {"failed"}),
    "raises": (lambda code, name: with_body(code, name, "raise ValueError"), {"failed"}),
    "exits": (lambda code, name: with_body(code, name, "import sys; sys.exit(0)"), {"failed"}),
    "leaves": (lambda code, name: with_body(code, name, "import os; os._exit(0)"), {"crashed"}),
    "is not there": (lambda code, name: code.replace(f"def {name}(", "def somewhere_else("), {"failed"}),
    "ends before the tests": (lambda code, name: f"{code}\nraise SystemExit(0)", {"failed"}),
    "leaves before the tests": (lambda code, name: f"{code}\nimport os\nos._exit(0)", {"crashed"}),
    "is cut off": (lambda code, name: code[: code.index(f"def {name}(") + 4], {"failed"}),
}


def test_reference_solutions_pass(task):
    results = sandbox.run_programs(answers(task))
    assert len(results) == 164
    assert [result for result in results if not (isinstance(result, ProgramResult) and result.success)] == []


def test_a_mutilation_of_each_fails(task):
    """Each problem with one kind, in turn."""
    kinds = list(MUTILATIONS)
    programs = {kind: answers(task, MUTILATIONS[kind][0]) for kind in kinds}
    asked = [(kinds[k % len(kinds)], k) for k in range(len(task))]
    results = sandbox.run_programs([programs[kind][k] for kind, k in asked])
    for (kind, k), result in zip(asked, results, strict=True):
        assert isinstance(result, ProgramResult) and result.outcome in MUTILATIONS[kind][1], (kind, k, result)


@pytest.mark.slow
def test_reference_solutions_pass_on_each_isolation(task, isolation):
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda code: sandbox.run_program(code, isolation=isolation), answers(task)))
    assert [result for result in results if not result.success] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", MUTILATIONS)
def test_every_mutilation_of_every_solution_fails(task, kind):
    change, outcomes = MUTILATIONS[kind]
    for k, result in enumerate(sandbox.run_programs(answers(task, change))):
        assert isinstance(result, ProgramResult) and result.outcome in outcomes, (k, result)


@pytest.mark.slow
def test_solutions_that_never_end_time_out(task):
    codes = answers(task, lambda code, name: with_body(code, name, "while True: pass"))[::20]
    assert {sandbox.run_program(code, 0.5).outcome for code in codes} == {"timeout"}

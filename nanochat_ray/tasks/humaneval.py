"""HumanEval (arXiv:2107.03374): functions to write from their signature and docstring, graded by running tests.

A completion becomes a program, which runs in the sandbox, never in a process that holds a GPU.
"""

from __future__ import annotations

import ast
import re
from typing import ClassVar

from nanochat_ray.sandbox import run_program
from nanochat_ray.tasks.rows import DataSet, TaskSources, open_rows
from nanochat_ray.tasks.task import Conversation, EvalType, Task

FENCE = re.compile(r"(`{3,})([^`]*)")
FENCE_BEHIND_TEXT = re.compile(r"[^`]*[^`\s][^`]*(`{3,})(python3?|py)?", re.IGNORECASE)
PYTHON_TAGS = ("", "python", "py", "python3")


def extract_program(completion: str) -> str:
    """The first fenced block of Python in a completion, stripped; without one the whole completion, stripped.

    Fences stand at the start of a line and are paired in order, so that the end of a block in another language does not
    pass for the start of a Python block. A block has at least one line, be it empty. Only where there is no such block
    does an opening fence behind other text of its line count.
    """
    lines = completion.split("\n")
    block = _first_block(lines, FENCE) or _first_block(lines, FENCE_BEHIND_TEXT)
    return "\n".join(block).strip() if block else completion.strip()


def _first_block(lines: list[str], opening: re.Pattern[str]) -> list[str] | None:
    first = 0
    while first < len(lines):
        fence = opening.fullmatch(lines[first].rstrip())
        first += 1
        end = next((k for k in range(first, len(lines)) if fence and lines[k].startswith(fence[1])), None)
        if fence is None or end is None:
            continue
        if end > first and (fence[2] or "").lower() in PYTHON_TAGS:
            return lines[first:end]
        first = end + 1
    return None


def extract_imports(prompt: str) -> str:
    """The import statements at the top of a prompt, one after another, whole even over several lines.

    Blank lines and comments between them are skipped, the first other line ends the search.
    """
    lines = prompt.split("\n")
    found: list[str] = []
    k = 0
    while k < len(lines):
        line = lines[k].strip()
        k += 1
        if not line or line.startswith("#"):
            continue
        if not line.startswith(("import ", "from ")):
            break
        statement, end = line, k
        while not _parses(statement) and end < len(lines):
            statement += "\n" + lines[end]
            end += 1
        if _parses(statement):
            found.append(statement.rstrip())
            k = end
        else:
            found.append(line)
    return "\n".join(found)


def _parses(statement: str) -> bool:
    try:
        ast.parse(statement)
    except SyntaxError:
        return False
    return True


def assemble_program(prompt: str, completion: str, test: str, entry_point: str) -> str:
    """What is run to grade a completion: the prompt's imports, the completion's code, the tests, and a call of them."""
    code = extract_program(completion)
    return f"{extract_imports(prompt)}\n\n{code}\n\n{test}\ncheck({entry_point})"


class HumanEval(Task):
    """The 164 problems. Extras: `entry_point`, `test`."""

    name = "HumanEval"
    eval_type: ClassVar[EvalType | None] = "generative"

    def __init__(self, sources: TaskSources, start: int = 0, stop: int | None = None, step: int = 1) -> None:
        super().__init__(start, stop, step)
        data = DataSet(
            "human_eval", "openai/openai_humaneval", "openai_humaneval", "test", local_file="human_eval/HumanEval.jsonl"
        )
        self.rows = open_rows(data, sources)

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        row = self.rows[index]
        return {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": f"{row['prompt']}\n{row['canonical_solution']}"},
            ],
            "entry_point": row["entry_point"],
            "test": row["test"],
        }

    def program(self, conversation: Conversation, completion: str) -> str:
        """The program whose success decides whether the completion solves the problem."""
        prompt = conversation["messages"][0]["content"]
        return assemble_program(prompt, completion, conversation["test"], conversation["entry_point"])

    def extract(self, completion: str) -> str | None:
        return extract_program(completion)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Run the tests here, in the sandbox. Raises SandboxUnavailable and SandboxFailed."""
        return run_program(self.program(conversation, completion)).success

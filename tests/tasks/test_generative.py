"""GSM8K's second score, and HumanEval's programs beyond the recorded cases."""

from __future__ import annotations

import pytest

from nanochat_ray.tasks.gsm8k import GSM8K
from nanochat_ray.tasks.humaneval import HumanEval, extract_imports, extract_program
from nanochat_ray.tasks.rows import TaskSources
from tests.tasks.conftest import write_jsonl


@pytest.fixture
def gsm8k(tmp_path, offline):
    write_jsonl(tmp_path / "gsm8k/test.jsonl", [{"question": "?", "answer": "<<9*2=18>>18\n#### 18"}])
    return GSM8K("test", TaskSources(tmp_path))


@pytest.mark.parametrize(
    ("completion", "strict", "numeric"),
    [
        ("#### 18", True, True), ("#### 18.", False, True), ("#### 18.00", False, True), ("#### 1,8", True, True),
        ("#### 19", False, False), ("18", False, False), ("#### .", False, False), ("#### 1.8.0", False, False),
    ],
)  # fmt: skip
def test_scores(gsm8k, completion, strict, numeric):
    assert gsm8k.evaluate(gsm8k[0], completion) is strict
    assert gsm8k.evaluate_numeric(gsm8k[0], completion) is numeric
    assert gsm8k.reward(gsm8k[0], completion) == float(strict)


def test_no_answer_is_no_match(gsm8k):
    unanswered = {"messages": [{}, {"content": [{"type": "text", "text": "I do not know"}]}]}
    assert not gsm8k.evaluate(unanswered, "nor do I")


@pytest.mark.parametrize("tag", ["python", "PYTHON", "py", "Python3", ""])
def test_tags(tag):
    assert extract_program(f"Here:\n```{tag}\nx = 1\n```\nDone.") == "x = 1"


def test_the_end_of_another_language_is_no_start():
    text = "Install:\n```bash\npip install x\n```\nthen\n```python\nimport x\n```"
    assert extract_program(text) == "import x"
    only_other = "```json\n{}\n```\ntext\n```yaml\na: 1\n```"
    assert extract_program(only_other) == only_other


def test_a_fence_in_a_string_is_code():
    assert extract_program('```python\ns = "```"\nt = 2\n```') == 's = "```"\nt = 2'


def test_a_longer_fence_holds_a_shorter():
    assert extract_program('````python\ns = """\n```\n"""\n````') == 's = """\n```\n"""'


def test_imports_over_lines():
    prompt = "from a import (\n    b,  # why\n    c,\n)\n\nimport d, \\\n    e\n\ndef f():\n    pass\nimport late\n"
    assert extract_imports(prompt) == "from a import (\n    b,  # why\n    c,\n)\nimport d, \\\n    e"


def test_a_completion_of_humaneval_becomes_a_program(tmp_path, offline):
    row = {"prompt": "def f():\n", "canonical_solution": "    return 1\n", "entry_point": "f", "test": "T"}
    write_jsonl(tmp_path / "human_eval/HumanEval.jsonl", [row])
    task = HumanEval(TaskSources(tmp_path))
    assert task[0]["messages"][1]["content"] == "def f():\n\n    return 1\n"
    assert task.program(task[0], "```\ndef f(): return 1\n```") == "\n\ndef f(): return 1\n\nT\ncheck(f)"
    assert task.extract("so:\n```\ndef f(): return 1\n```\nthat is all") == "def f(): return 1"

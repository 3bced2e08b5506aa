"""Spelling: the drawn words, letters, quotes and question marks, and the fixed lines of the worked answers."""

from __future__ import annotations

import hashlib
import re

import pytest

from nanochat_ray.tasks.rows import TaskSources
from nanochat_ray.tasks.spelling import TEST_SEED_OFFSET, SimpleSpelling, SpellingBee, load_words
from tests.parity.goldens import load_json
from tests.real_data import needs_real_data, real_data

GOLDEN = load_json("tasks_spelling")
BEE = [(split, i) for split, cases in GOLDEN["bee"].items() for i in range(len(cases))]
pytestmark = needs_real_data


@pytest.fixture(scope="module")
def words():
    path = real_data() / GOLDEN["word_list"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == load_json("inputs")["data_sha256"][GOLDEN["word_list"]]
    return load_words(TaskSources(task_data=real_data()))


def test_word_list(words):
    assert (len(words), words[-1]) == (GOLDEN["n_words"], GOLDEN["last_word"])
    assert TEST_SEED_OFFSET == GOLDEN["test_seed_offset"]
    assert SimpleSpelling("train", words).words[:10] == GOLDEN["shuffled_first10"]


def test_simple(words):
    for split, examples in GOLDEN["simple"].items():
        task = SimpleSpelling(split, words)
        assert [task[i] for i in range(len(examples))] == examples


@pytest.mark.parametrize(("split", "i"), BEE)
def test_bee(words, split, i):
    case = GOLDEN["bee"][split][i]
    user, assistant = (message["content"] for message in SpellingBee(split, words)[i]["messages"])
    assert user.endswith("?") == case["user_ends_with_question_mark"]
    assert user.endswith("??") == case["user_double_question_mark"]
    quoted = [f"{case[kind] or ''}{case[part]}{case[kind] or ''}" for kind, part in
              (("letter_quoted_with", "letter"), ("word_quoted_with", "word"))]
    for text in quoted:
        assert re.search(rf"(?<!['\"]){re.escape(text)}(?!['\"])", user), (text, user)
    assert [part["type"] for part in assistant] == ["text", "text", "python", "python_output", "text"]
    lines = assistant[0]["text"].split("\n")
    assert case["spelled_line"] in lines
    first = lines.index("1:" + case["count_lines"][0][2:])
    assert lines[first : first + len(case["count_lines"])] == case["count_lines"]
    assert lines[first + len(case["count_lines"])] == ""
    assert (assistant[2]["text"], assistant[3]["text"]) == (case["python"], case["python_output"])
    assert assistant[4]["text"].split("\n")[-1] == case["final_line"]


@pytest.mark.parametrize("case", GOLDEN["evaluate"], ids=lambda case: case["response"])
def test_grades(words, case):
    task = SpellingBee("test", words)
    assert task.evaluate(task[0], case["response"]) == bool(case["correct"])
    assert task.reward(task[0], case["response"]) == case["reward"]


def test_lengths(words):
    assert len(SpellingBee("train", words, size=37)) == GOLDEN["lengths"]["bee"]
    assert len(SpellingBee("train", words, size=37, start=3, stop=20, step=4)) == GOLDEN["lengths"]["sliced"]

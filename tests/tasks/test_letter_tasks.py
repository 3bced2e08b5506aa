"""ARC and MMLU: letter questions."""

from __future__ import annotations

import pytest

from nanochat_ray.tasks.arc import ARC
from nanochat_ray.tasks.mmlu import MMLU
from nanochat_ray.tasks.multiple_choice import render_mc
from nanochat_ray.tasks.rows import TaskSources
from tests.tasks.conftest import write_jsonl, write_parquet

ARC_ROW = {"question": "Hot?", "choices": {"text": ["ice", "sun", "moon"], "label": ["1", "2", "3"]}, "answerKey": "2"}
MMLU_ROW = {"question": "Two?", "choices": ["1", "2", "3", "4"], "answer": 1, "subject": "arithmetic"}


@pytest.fixture
def sources(tmp_path, offline):
    write_parquet(tmp_path / "arc/ARC-Easy/test.parquet", [ARC_ROW])
    write_jsonl(tmp_path / "mmlu/test.jsonl", [MMLU_ROW])
    write_jsonl(tmp_path / "mmlu/dev.jsonl", [MMLU_ROW | {"choices": ["1", "2", "3"]}])
    return TaskSources(tmp_path)


def test_arc_uses_the_stored_labels(sources):
    task = ARC("ARC-Easy", "test", sources)
    (conversation,) = task
    assert conversation["letters"] == ["1", "2", "3"]
    assert conversation["messages"][0]["content"] == render_mc("Hot?", ["1", "2", "3"], ["ice", "sun", "moon"])
    assert [task.evaluate(conversation, letter) for letter in "123"] == [False, True, False]
    with pytest.raises(ValueError, match="'A' is none of the letters"):
        task.evaluate(conversation, "A")


def test_mmlu(sources):
    task = MMLU("test", sources)
    (conversation,) = task
    assert (conversation["subject"], conversation["letters"]) == ("arithmetic", ["A", "B", "C", "D"])
    assert [task.evaluate(conversation, letter) for letter in "ABCD"] == [False, True, False, False]


def test_mmlu_has_four_choices(sources):
    with pytest.raises(ValueError, match="3 choices"):
        MMLU("dev", sources)[0]


def test_an_answer_is_one_of_the_letters(tmp_path, offline):
    write_jsonl(tmp_path / "arc/ARC-Challenge/test.jsonl", [ARC_ROW | {"answerKey": "B"}])
    with pytest.raises(ValueError, match="'B' is none of the letters"):
        ARC("ARC-Challenge", "test", TaskSources(tmp_path))[0]

"""MMLU (arXiv:2009.03300): questions of four choices from 57 subjects."""

from __future__ import annotations

from typing import Literal

from nanochat_ray.tasks.multiple_choice import LetterTask, letter_conversation
from nanochat_ray.tasks.rows import DataSet, TaskSources, open_rows
from nanochat_ray.tasks.task import Conversation

LETTERS = ("A", "B", "C", "D")


class MMLU(LetterTask):
    """MMLU; its train set is `auxiliary_train`, questions of the same form from other exams. Extra: `subject`."""

    name = "MMLU"

    def __init__(
        self,
        split: Literal["auxiliary_train", "dev", "validation", "test"],
        sources: TaskSources,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
    ) -> None:
        super().__init__(start, stop, step)
        self.rows = open_rows(DataSet("mmlu", "cais/mmlu", "all", split), sources)

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        row = self.rows[index]
        if len(row["choices"]) != len(LETTERS):
            raise ValueError(f"MMLU question {row['question']!r} has {len(row['choices'])} choices, not {len(LETTERS)}")
        conversation = letter_conversation(row["question"], LETTERS, row["choices"], LETTERS[row["answer"]])
        return conversation | {"subject": row["subject"]}

"""ARC (arXiv:1803.05457): science questions from school exams."""

from __future__ import annotations

from typing import Literal

from nanochat_ray.tasks.multiple_choice import LetterTask, letter_conversation
from nanochat_ray.tasks.rows import DataSet, TaskSources, open_rows
from nanochat_ray.tasks.task import Conversation


class ARC(LetterTask):
    """ARC-Easy or ARC-Challenge. The letters are the labels as stored: 1 to 4 at times, and 3 to 5 of them."""

    def __init__(
        self,
        subset: Literal["ARC-Easy", "ARC-Challenge"],
        split: Literal["train", "validation", "test"],
        sources: TaskSources,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
    ) -> None:
        super().__init__(start, stop, step)
        self.name = subset
        self.rows = open_rows(DataSet(f"arc/{subset}", "allenai/ai2_arc", subset, split), sources)

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        row = self.rows[index]
        choices = row["choices"]
        return letter_conversation(row["question"], choices["label"], choices["text"], row["answerKey"])

"""The embedded world as tasks: its conversations to finetune on, and its held-out questions, graded exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from nanochat_ray.corpus.world.questions import answer_span, is_right
from nanochat_ray.tasks.custom_json import CustomJSON
from nanochat_ray.tasks.rows import JsonlRows, TaskDataMissing
from nanochat_ray.tasks.task import Conversation, EvalType, Task


class WorldConversations(CustomJSON):
    """The world's finetuning conversations, from `sft_train.jsonl` or `sft_val.jsonl` of its folder."""

    name = "World"


class WorldQuestions(Task):
    """The held-out questions in the world's folder.

    Each conversation also carries "id", "family", "answer", "hard" and "unseen_fact" (see corpus/world/questions.py).
    Raises TaskDataMissing where there is no world.
    """

    name = "WorldQuestions"
    eval_type: ClassVar[EvalType | None] = "generative"

    def __init__(self, folder: Path, start: int = 0, stop: int | None = None, step: int = 1) -> None:
        super().__init__(start, stop, step)
        path = folder / "heldout.jsonl"
        if not path.is_file():
            raise TaskDataMissing(f"no held-out questions at {path}: needed is a folder that write_world has filled")
        self.rows = JsonlRows(path)

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        row: dict[str, Any] = self.rows[index]
        return row

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether both end the same: in the last `#### x`, else in the words of the last sentence."""
        return is_right(conversation["messages"], completion)

    def extract(self, completion: str) -> str:
        """What is compared."""
        return answer_span(completion)

    def reward(self, conversation: Conversation, completion: str) -> float:
        """1 for a right answer, else 0."""
        return float(self.evaluate(conversation, completion))

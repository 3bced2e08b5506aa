"""GSM8K (arXiv:2110.14168): word problems of grade school, with calculator calls in the worked answers."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import ClassVar, Literal

from nanochat_ray.tasks.rows import DataSet, TaskSources, open_rows
from nanochat_ray.tasks.task import Conversation, EvalType, Task

CALL = re.compile(r"(<<[^>]+>>)")
FINAL = re.compile(r"#### (-?[0-9.,]+)")


def split_calls(answer: str) -> list[dict[str, str]]:
    """The parts of a worked answer: `<<2*12=24>>` becomes a python part `2*12` and a python_output part `24`.

    Text around calls is kept even where it is empty. A call without "=" has an empty output.
    """
    parts = []
    for piece in CALL.split(answer):
        if piece.startswith("<<") and piece.endswith(">>"):
            expression, equals, result = piece[2:-2].rpartition("=")
            parts.append({"type": "python", "text": expression if equals else result})
            parts.append({"type": "python_output", "text": result if equals else ""})
        else:
            parts.append({"type": "text", "text": piece})
    return parts


def extract_answer(text: str) -> str | None:
    """The number behind the first `#### `, without its commas; None if there is none."""
    match = FINAL.search(text)
    return match.group(1).replace(",", "") if match else None


def reference_answer(conversation: Conversation) -> str | None:
    """The final answer that stands in the last part of the assistant's message."""
    return extract_answer(conversation["messages"][-1]["content"][-1]["text"])


class FinalAnswerTask(Task):
    """A task whose answers end in `#### <number>`."""

    eval_type: ClassVar[EvalType | None] = "generative"

    def extract(self, completion: str) -> str | None:
        return extract_answer(completion)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the two answers are the same string: `18.` is not `18`."""
        found = extract_answer(completion)
        return found is not None and found == reference_answer(conversation)

    def evaluate_numeric(self, conversation: Conversation, completion: str) -> bool:
        """Whether the two answers are the same number: `18.` and `18.00` are 18. Never the reported score."""
        found, wanted = _number(extract_answer(completion)), _number(reference_answer(conversation))
        return found is not None and found == wanted

    def reward(self, conversation: Conversation, completion: str) -> float:
        """1 for a right answer, else 0."""
        return float(self.evaluate(conversation, completion))


def _number(text: str | None) -> Decimal | None:
    try:
        return None if text is None else Decimal(text.rstrip("."))
    except InvalidOperation:
        return None


class GSM8K(FinalAnswerTask):
    name = "GSM8K"

    def __init__(
        self,
        split: Literal["train", "test"],
        sources: TaskSources,
        config: Literal["main", "socratic"] = "main",
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
    ) -> None:
        super().__init__(start, stop, step)
        self.rows = open_rows(DataSet("gsm8k", "openai/gsm8k", config, split), sources)

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        row = self.rows[index]
        return {
            "messages": [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": split_calls(row["answer"])},
            ]
        }

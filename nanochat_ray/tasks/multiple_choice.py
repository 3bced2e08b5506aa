"""Letter questions, for ARC and MMLU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from nanochat_ray.tasks.task import Conversation, EvalType, Task


def render_mc(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """The prompt of a letter question.

    The letter touches the "=" in front of it because " A" and "A" are different tokens, and the bare one is the answer.
    """
    options = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=False))
    return f"Multiple Choice question: {question}\n{options}\nRespond only with the letter of the correct answer."


def letter_conversation(question: str, letters: Sequence[str], choices: Sequence[str], answer: str) -> Conversation:
    """A question and its letter. ValueError if the answer is none of the letters."""
    if answer not in letters:
        raise ValueError(f"the answer {answer!r} is none of the letters {list(letters)} of {question!r}")
    return {
        "messages": [
            {"role": "user", "content": render_mc(question, letters, choices)},
            {"role": "assistant", "content": answer},
        ],
        "letters": list(letters),
    }


class LetterTask(Task):
    """A task whose answers are letters."""

    eval_type: ClassVar[EvalType | None] = "categorical"

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the letter is right. ValueError if it is none of the question's letters."""
        if completion not in conversation["letters"]:
            raise ValueError(f"{completion!r} is none of the letters {conversation['letters']}")
        return bool(completion == conversation["messages"][-1]["content"])

"""Your own conversations, one per line of a JSONL file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanochat_ray.tasks.rows import JsonlRows, TaskDataMissing
from nanochat_ray.tasks.task import Conversation, Task

PART_TYPES = ("text", "python", "python_output")


def conversation_problem(messages: Any) -> str | None:
    """What is wrong with a list of messages, None if nothing is.

    Wanted: at most one system message, in front; then at least two messages, user and assistant in turn, from the
    user on. Content is a string; the assistant's may be a list of parts {"type", "text"} instead.
    """
    if not isinstance(messages, list):
        return f"a list of messages is needed, not {type(messages).__name__}"
    for k, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            return f"message {k} needs the keys role and content: {message!r:.100}"
    first = 1 if messages and messages[0]["role"] == "system" else 0
    if len(messages) - first < 2:
        return f"at least two messages are needed besides the system's, not {len(messages) - first}"
    for k, message in enumerate(messages):
        wanted = ("user", "assistant")[(k - first) % 2]
        if k >= first and message["role"] != wanted:
            return f"message {k} is from {message['role']!r}, not from {wanted!r}"
        content = message["content"]
        parts = content if message["role"] == "assistant" and isinstance(content, list) else None
        if parts is None and not isinstance(content, str):
            return f"the content of message {k} is of type {type(content).__name__}, not a string"
        for part in parts or []:
            known = isinstance(part, dict) and part.get("type") in PART_TYPES
            if not known or not isinstance(part.get("text"), str):
                return f"message {k} has a part without a type of {', '.join(PART_TYPES)} and a text: {part!r:.100}"
    return None


def messages_of(row: Any) -> Any:
    """The messages of a line: the line itself, or what stands under "messages"."""
    return row["messages"] if isinstance(row, dict) and "messages" in row else row


class CustomJSON(Task):
    """Conversations of a JSONL file in file order. A line is a list of messages, or an object with "messages".

    Raises TaskDataMissing for a missing file (with `allow_missing` the task is empty instead), ValueError with file and
    line number for a line that is no conversation.
    """

    name = "CustomJSON"

    def __init__(
        self, path: Path, allow_missing: bool = False, start: int = 0, stop: int | None = None, step: int = 1
    ) -> None:
        super().__init__(start, stop, step)
        self.path = path
        self.rows: JsonlRows | list[Any] = []
        if path.is_file():
            self.rows = JsonlRows(path)
            for i, line in enumerate(self.rows.numbers):
                if problem := conversation_problem(messages_of(self.rows[i])):
                    raise ValueError(f"{path}, line {line}: {problem}")
        elif not allow_missing:
            raise TaskDataMissing(f"no conversations at {path}: needed is a JSONL file, one list of messages per line")

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        return {"messages": messages_of(self.rows[index])}

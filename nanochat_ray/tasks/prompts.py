"""Prompts of reinforcement learning: conversations with a reference answer last and an id of their own.

The list of a split is the same in every process: a rollout names its prompt by the place in it. So a list has a hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from nanochat_ray.messages import RolloutSplit
from nanochat_ray.tasks.catalog import JSON_VAL_FRAC, JSON_VAL_MAX
from nanochat_ray.tasks.custom_json import conversation_problem
from nanochat_ray.tasks.gsm8k import reference_answer, split_calls
from nanochat_ray.tasks.task import Conversation

Where = Callable[[int], str]  # from the place in a list to words for people: file and line


def open_prompt(value: Any) -> Conversation:
    """A prompt as people write it as a conversation. ValueError that says what is wrong with it.

    Three forms: a question; `{"prompt": question, "answer": anything}` with keys of your own beside it, all of which
    the reward finds in the conversation; a conversation, as its list of messages or as `{"messages": [...]}`. Where the
    last message is the user's, an empty answer is put behind it.
    """
    if isinstance(value, str):
        value = {"prompt": value}
    found = dict(value) if isinstance(value, Mapping) else {"messages": value}
    if "messages" not in found and isinstance(found.get("prompt"), str):
        found["messages"] = [_user(found["prompt"]), _assistant(str(found.get("answer", "")))]
    messages = found.get("messages")
    if not isinstance(messages, list | tuple):
        raise ValueError(f'a text, {{"prompt": text, ...}} or a list of messages is needed, not {value!r:.100}')
    found["messages"] = list(messages)
    if messages and _role(messages[-1]) == "user":
        found["messages"].append(_assistant(""))
    return _checked(found)


def final_answer_prompt(row: Any) -> Conversation:
    """A row whose answer ends in `#### <number>`: `{"question", "answer"}` as in GSM8K, or a conversation.

    ValueError for another row, also for one without such a number: its answers could not be told right from wrong.
    """
    if isinstance(row, Mapping) and "question" in row:
        question, answer = row["question"], row.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str):
            raise ValueError(f"question and answer must be texts: {dict(row)!r:.100}")
        rest = {key: value for key, value in row.items() if key not in ("question", "answer")}
        found = {**rest, "messages": [_user(question), _assistant(answer)]}
    elif isinstance(row, list) or (isinstance(row, Mapping) and "messages" in row):
        found = dict(row) if isinstance(row, Mapping) else {"messages": row}
    else:
        raise ValueError(f'{{"question", "answer"}} or a conversation is needed, not {row!r:.100}')
    found = _checked(found)
    last = found["messages"][-1]
    if isinstance(last["content"], str):
        last = _assistant(split_calls(last["content"]))
        found["messages"] = [*found["messages"][:-1], last]
    if not last["content"] or reference_answer(found) is None:
        raise ValueError(
            "its answer does not end in `#### <number>`, by which completions are graded; "
            "for any other reward write a task file (--task FILE.py)"
        )
    return found


def numbered(found: Iterable[Any], read: Callable[[Any], Conversation], name: str, split: RolloutSplit,
             where: Where) -> tuple[Conversation, ...]:  # fmt: skip
    """The prompts of a split, each with its "id": the one that it has, or `<name>/<split>/<place>`.

    ValueError with `where` for one that `read` refuses, an id that stands twice, values that JSON does not know, or
    for no prompts at all.
    """
    places: dict[str, int] = {}
    prompts = []
    for place, value in enumerate(found):
        try:
            conversation = read(value)
            conversation = {**conversation, "id": str(conversation.get("id", f"{name}/{split}/{place}"))}
            json.dumps(conversation)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where(place)}: {error}") from error
        first = places.setdefault(conversation["id"], place)
        if first != place:
            raise ValueError(f"{where(place)}: the id {conversation['id']!r} has also {where(first)}; ids name prompts")
        prompts.append(conversation)
    if not prompts:
        raise ValueError(f"{where(0)}: there are no prompts for {split}")
    return tuple(prompts)


def parted(n: int) -> int:
    """How many of n prompts training uses where none are given for evaluation: all but the last twentieth (1 to 500).

    ValueError for a single prompt.
    """
    if n < 2:
        raise ValueError(f"{n} prompts cannot be parted into some to train on and some to evaluate on; give both")
    return n - min(max(1, int(n * JSON_VAL_FRAC)), JSON_VAL_MAX)


def prompts_sha256(prompts: Iterable[Conversation]) -> str:
    """The hash of prompts, ids and references in their order."""
    digest = hashlib.sha256()
    for conversation in prompts:
        digest.update(json.dumps(conversation, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _checked(conversation: dict[str, Any]) -> Conversation:
    messages = conversation["messages"]
    if problem := conversation_problem(messages):
        raise ValueError(problem)
    if _role(messages[-1]) != "assistant":
        raise ValueError("the last message is the user's; the reference answer must follow it")
    return conversation


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _assistant(content: str | list[dict[str, str]]) -> dict[str, Any]:
    return {"role": "assistant", "content": content}

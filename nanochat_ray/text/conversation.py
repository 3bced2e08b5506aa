"""The chat format: conversations to token ids with a training mask, prompts for a reply, and replies back to parts.

A conversation is `{"messages": [{"role", "content"}, ...]}` or the list alone. An optional leading system message is
joined to the first user text; after it user and assistant alternate. User content is a string; assistant content a
string or a list of parts `{"type": "text" | "python" | "python_output", "text"}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nanochat_ray.text.tokenizer import Tokenizer

Part = dict[str, str]  # {"type", "text"}
Conversation = Mapping[str, Any] | Sequence[Mapping[str, Any]]

# Markers around an assistant's part, and whether markers and text are trained on. What a tool prints is not: the
# engine puts it there.
_PARTS: dict[str, tuple[str | None, str | None, int]] = {
    "text": (None, None, 1),
    "python": ("<|python_start|>", "<|python_end|>", 1),
    "python_output": ("<|output_start|>", "<|output_end|>", 0),
}


class Prompt(NamedTuple):
    """Ids that end where the assistant begins, and what had to go to stay within the limit."""

    ids: list[int]
    dropped_turns: int  # oldest pairs of question and answer left out
    dropped_tokens: int  # tokens cut from the start of the last question


class _Chat(NamedTuple):
    system: str | None
    turns: list[str | list[Part]]  # question (str), answer (parts), question, ...


def render(tokenizer: Tokenizer, conversation: Conversation, max_tokens: int = 2048) -> tuple[list[int], list[int]]:
    """Ids and mask of a conversation, both cut to the first `max_tokens`; mask 1 where the token is trained on.

    Raises ValueError naming what is wrong with the conversation. The conversation is not changed.
    """
    system, turns = _validated(conversation)
    ids, mask = [tokenizer.bos_id], [0]
    for k, turn in enumerate(turns):
        if isinstance(turn, str):
            question = _question(tokenizer, turn, system if k == 0 else None)
            ids += question
            mask += [0] * len(question)
        else:
            _append_answer(tokenizer, turn, ids, mask)
    return ids[:max_tokens], mask[:max_tokens]


def render_for_completion(tokenizer: Tokenizer, conversation: Conversation, max_tokens: int = 2048) -> list[int]:
    """The prompt that asks for a conversation's last answer: that answer is taken away, the reply's start marker added.

    Never more than `max_tokens` ids; see `render_prompt` for what goes first. ValueError if the last message is not
    the assistant's.
    """
    system, turns = _validated(conversation)
    if isinstance(turns[-1], str):
        raise ValueError("the last message is the user's: there is no answer to take away (render_prompt wants that)")
    return _prompt(tokenizer, system, turns[:-1], max_tokens).ids


def render_prompt(tokenizer: Tokenizer, conversation: Conversation, max_tokens: int = 2048) -> Prompt:
    """The prompt that asks for the next answer in a chat whose last message is the user's.

    Never more than `max_tokens` ids, markers always balanced: the oldest turns are dropped (the system text stays), and
    of a last question that is too long on its own the start is cut. ValueError if the last message is an answer.
    """
    system, turns = _validated(conversation)
    if not isinstance(turns[-1], str):
        raise ValueError("the last message is the assistant's: there is no question to answer")
    return _prompt(tokenizer, system, turns, max_tokens)


def parse_reply(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Part]:
    """The parts of a reply, given the ids after the assistant's start marker: the inverse of rendering one.

    For the history of a chat, so that tool calls are calls again when it is rendered. Reading stops at the end of the
    reply or at BOS. A part that is not closed (the reply ran out of room) ends there; a marker out of place is dropped.
    """
    special = tokenizer.special
    opening = {special["<|python_start|>"]: "python", special["<|output_start|>"]: "python_output"}
    closing = {"python": special["<|python_end|>"], "python_output": special["<|output_end|>"], "text": -1}
    ends = {tokenizer.bos_id, special["<|assistant_end|>"]}
    markers = set(special.values())
    parts: list[Part] = []
    kind = "text"
    piece: list[int] = []

    def finish() -> None:
        if piece or kind != "text":  # a tool part may be empty and still be one
            parts.append({"type": kind, "text": tokenizer.decode(piece)})

    for token in ids:
        if token in ends:
            break
        if token not in markers:
            piece.append(token)
        elif token in opening or token == closing[kind]:
            finish()
            kind, piece = opening.get(token, "text"), []
    finish()
    return parts


def colored(tokenizer: Tokenizer, ids: Sequence[int], mask: Sequence[int]) -> str:
    """The tokens for a terminal, between bars: green where trained on, red where not."""
    return "|".join(f"\x1b[{32 if m else 31}m{tokenizer.decode([t])}\x1b[0m" for t, m in zip(ids, mask, strict=True))


def _question(tokenizer: Tokenizer, text: str, system: str | None) -> list[int]:
    text = text if system is None else f"{system}\n\n{text}"
    return tokenizer.encode(text, prepend="<|user_start|>", append="<|user_end|>")


def _append_answer(tokenizer: Tokenizer, parts: list[Part], ids: list[int], mask: list[int]) -> None:
    ids.append(tokenizer.encode_special("<|assistant_start|>"))
    mask.append(0)
    for part in parts:
        before, after, trained = _PARTS[part["type"]]
        piece = tokenizer.encode(part["text"], prepend=before, append=after)
        ids += piece
        mask += [trained] * len(piece)
    ids.append(tokenizer.encode_special("<|assistant_end|>"))
    mask.append(1)


def _prompt(tokenizer: Tokenizer, system: str | None, turns: list[str | list[Part]], max_tokens: int) -> Prompt:
    if max_tokens < 5:
        raise ValueError(f"max_tokens {max_tokens} leaves no room for a question: its four markers need one more, 5")
    pieces: list[list[int]] = []
    for turn in turns:
        piece: list[int] = []
        if isinstance(turn, str):
            piece = _question(tokenizer, turn, None)
        else:
            _append_answer(tokenizer, turn, piece, [])
        pieces.append(piece)
    room = max_tokens - 2  # BOS and the start of the answer
    first = 0
    while True:
        question = turns[first]
        assert isinstance(question, str)
        head = _question(tokenizer, question, system)
        excess = len(head) + sum(map(len, pieces[first + 1 :])) - room
        if excess <= 0 or first == len(turns) - 1:
            break
        first += 2
    if excess > 0:
        head = [head[0], *head[1 + excess :]]
    ids = [tokenizer.bos_id, *head]
    for piece in pieces[first + 1 :]:
        ids += piece
    ids.append(tokenizer.encode_special("<|assistant_start|>"))
    return Prompt(ids, first // 2, max(excess, 0))


def _validated(conversation: Conversation) -> _Chat:
    """System text and turns of a conversation, as new lists; ValueError for anything that cannot be rendered."""
    messages: Any = conversation
    if isinstance(conversation, Mapping):
        if "messages" not in conversation:
            raise ValueError(f"a conversation needs the key 'messages', this one has {sorted(conversation)}")
        messages = conversation["messages"]
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ValueError(f"messages must be a list, not {type(messages).__name__}")
    for k, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"message {k} must be a mapping with role and content: {message!r:.100}")
    system = None
    rest = list(messages)
    if rest and rest[0]["role"] == "system":
        system = rest.pop(0)["content"]
        if not isinstance(system, str):
            raise ValueError(f"the system message's content must be a string, not {type(system).__name__}")
    if not rest:
        raise ValueError("a conversation needs at least one user message")
    turns: list[str | list[Part]] = []
    for k, message in enumerate(rest):
        role, content = message["role"], message["content"]
        expected = ("user", "assistant")[k % 2]
        if role != expected:
            raise ValueError(f"message {k + len(messages) - len(rest)} is from {role!r}, expected {expected!r}")
        turns.append(_user_text(content) if expected == "user" else _answer_parts(content))
    return _Chat(system, turns)


def _user_text(content: Any) -> str:
    if not isinstance(content, str):
        raise ValueError(f"a user's content must be a string, not {type(content).__name__}")
    return content


def _answer_parts(content: Any) -> list[Part]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise ValueError(f"an assistant's content must be a string or a list of parts, not {type(content).__name__}")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") not in _PARTS or not isinstance(part.get("text"), str):
            raise ValueError(f"a part needs a type of {', '.join(_PARTS)} and a text: {part!r:.100}")
    return list(content)

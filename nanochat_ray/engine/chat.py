"""A conversation with a model in plain text: history, streaming, and the command line's loop without its terminal."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any

from nanochat_ray.config import ChatSettings
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.stream_text import Brackets, StreamText
from nanochat_ray.messages import SamplingParams
from nanochat_ray.text.conversation import parse_reply, render_prompt
from nanochat_ray.text.tokenizer import Tokenizer


class ReplyText:
    """Tokens of a reply in, text for a terminal out: whole characters, a tool call as `[12*7 = 84]`, no markers."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._stream, self._brackets = StreamText(tokenizer), Brackets()
        self._openings = {tokenizer.encode_special(f"<|{block}_start|>") for block in ("python", "output")}

    def feed(self, token: int) -> str:
        """The text that the next token makes visible, often empty."""
        # What an opening marker ends was never closed: the model began the expression anew.
        begins = token in self._openings
        return self._brackets.feed([p for p in self._stream.feed(token) if p.kind == "text" or not begins])

    def finish(self) -> str:
        """What is still held back when the reply is over."""
        return self._brackets.feed([p for p in self._stream.finish() if p.text]) + self._brackets.finish()


class ChatSession:
    """The turns so far and the way to the next one."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, settings: ChatSettings) -> None:
        self.engine, self.tokenizer, self.settings = engine, tokenizer, settings
        self.clear()

    def clear(self) -> None:
        """Forget everything but the settings."""
        self.messages: list[dict[str, Any]] = []  # user and assistant in turns, the system text aside
        self.dropped_turns = 0  # pairs of question and answer that the last reply had to forget
        self.dropped_tokens = 0  # tokens cut from the start of the last question, too long on its own
        self._n_replies = 0

    @property
    def notice(self) -> str:
        """What the last reply had to leave out, in a sentence; empty if nothing."""
        lost = []
        if self.dropped_turns:
            lost.append(f"the oldest {f'{self.dropped_turns} questions' if self.dropped_turns > 1 else 'question'}")
        if self.dropped_tokens:
            lost.append(f"the first {self.dropped_tokens} tokens of the question")
        if not lost:
            return ""
        return f"(Forgotten, to fit the model's context of {self.engine.context} tokens: {' and '.join(lost)}.)"

    def reply(self, user_text: str) -> Generator[str, None, None]:
        """Pieces of the answer as they are decoded. `notice` is set at once, before the first piece.

        Question and answer enter the history when the answer ends, also when it is closed or interrupted in the middle;
        then with what there is of it, without a tool call that is not complete.
        """
        question = {"role": "user", "content": user_text}
        system = [{"role": "system", "content": self.settings.system}] if self.settings.system else []
        room = self.engine.context - min(self.settings.max_new_tokens, self.engine.context // 2)
        prompt = render_prompt(self.tokenizer, [*system, *self.messages, question], max_tokens=room)
        self.dropped_turns, self.dropped_tokens = prompt.dropped_turns, prompt.dropped_tokens
        self.messages = self.messages[2 * prompt.dropped_turns :]
        return self._stream(question, prompt.ids)

    def _stream(self, question: dict[str, Any], prompt: list[int]) -> Generator[str, None, None]:
        s = self.settings
        params = SamplingParams(
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            max_tokens=s.max_new_tokens,
            seed=secrets.randbits(32) if s.seed is None else s.seed + self._n_replies,
        )
        self._n_replies += 1
        text, ids = ReplyText(self.tokenizer), []
        try:
            for event in self.engine.generate([prompt], params):
                ids.append(event.token)
                if piece := text.feed(event.token):
                    yield piece
            if piece := text.finish():
                yield piece
        finally:
            if ids:
                parts = parse_reply(self.tokenizer, _without_open_block(self.tokenizer, ids))
                self.messages += [question, {"role": "assistant", "content": parts}]


def _without_open_block(tokenizer: Tokenizer, ids: Sequence[int]) -> Sequence[int]:
    """The ids before a tool block that begins and never ends; all of them if there is none."""
    starts, ends = (
        {tokenizer.encode_special(f"<|{block}_{edge}|>") for block in ("python", "output")} for edge in ("start", "end")
    )
    opened: int | None = None
    for at, token in enumerate(ids):
        if token in starts and opened is None:
            opened = at
        elif token in ends:
            opened = None
    return ids[:opened]


def chat_loop(session: ChatSession, read_line: Callable[[], str], write: Callable[[str], None]) -> None:
    """Answer lines until `quit`, `exit`, end of input or Ctrl-C at the prompt; Ctrl-C in an answer stops only that.

    `read_line` gives the next line or raises EOFError; `write` shows text at once. `clear` begins a new conversation.
    """
    while True:
        try:
            line = read_line().strip()
        except (EOFError, KeyboardInterrupt):
            write("\n")
            break
        command = line.lower()
        if command in ("quit", "exit"):
            break
        if command == "clear":
            session.clear()
            write("A new conversation.\n")
        elif line:
            try:
                with closing(session.reply(line)) as pieces:
                    if session.notice:
                        write(session.notice + "\n")
                    for piece in pieces:
                        write(piece)
                write("\n")
            except KeyboardInterrupt:
                write("\n(stopped)\n")
    write("Goodbye.\n")

"""From token events to OpenAI's answers: one JSON object, or server-sent events.

A chunk of a stream is written about once per token for every client, so it is put together from a prepared beginning
and end and the JSON of the new text.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from json.encoder import encode_basestring
from typing import Any

from nanochat_ray.engine.stream_text import Brackets
from nanochat_ray.messages import TokenEvent
from nanochat_ray.serve.answers import Answers, Sample, token_text
from nanochat_ray.serve.errors import json_bytes
from nanochat_ray.serve.plan import Plan
from nanochat_ray.text.tokenizer import Tokenizer


class ChatWriter(Answers):
    """`/v1/chat/completions`.

    Log-probabilities are listed of all tokens that have one but the terminal: also of tool calls, whose text is in the
    parts and not in the content, and of the tokens that made up a stop text.
    """

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, plan: Plan, with_usage: bool) -> None:
        super().__init__(plan, with_usage)
        self._logprobs = plan.params[0].logprobs is not None
        self._entries: list[list[dict[str, Any]]] = [[] for _ in self.samples]  # of all tokens
        self._n_sent = [0] * len(self.samples)  # of the entries
        self._began = False

    def feed(self, prompt: int, events: Sequence[TokenEvent]) -> bytes:
        chunks = []
        if not self._began:
            self._began = True
            role = '{"role":"assistant","content":""}'
            chunks = [self._chunk(index, role) for index in range(len(self.samples))]
        texts: dict[int, str] = {}  # not yet in a chunk: the tokens of one step apart are one chunk together
        for event in events:
            index = event.sample
            sample = self.samples[index]
            pieces = sample.feed(event)
            if self._logprobs and event.logprob is not None and not sample.is_end(event):
                self._entries[index].append(_entry(self._tokenizer, event))
            for piece in pieces:
                if piece.kind == "text":
                    texts[index] = texts.get(index, "") + piece.text
                    continue
                chunks += self._text_chunk(index, texts.pop(index, ""))
                part = f'{{"type":"{piece.kind}","text":{encode_basestring(piece.text)}}}'
                chunks.append(self._chunk(index, f'{{"parts":[{part}]}}'))
            if event.finish_reason is not None:
                chunks += self._text_chunk(index, texts.pop(index, ""))
                chunks.append(self._chunk(index, "{}", f'"{event.finish_reason}"'))
        for index, text in texts.items():
            chunks += self._text_chunk(index, text)
        return "".join(chunks).encode()

    def _text_chunk(self, index: int, text: str) -> list[str]:
        return [self._chunk(index, f'{{"content":{encode_basestring(text)}}}')] if text else []

    def _chunk(self, index: int, delta: str, reason: str = "null") -> str:
        logprobs = "null"
        if self._logprobs and self._n_sent[index] < len(self._entries[index]):
            new = self._entries[index][self._n_sent[index] :]
            self._n_sent[index] += len(new)
            logprobs = json_bytes({"content": new, "refusal": None}).decode()
        choice = f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{reason}}}'
        return self._before + choice + self._after

    def choice(self, index: int, sample: Sample) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": sample.content, "refusal": None, "parts": sample.parts},
            "logprobs": {"content": self._entries[index], "refusal": None} if self._logprobs else None,
            "finish_reason": sample.finish_reason,
        }


def _finite(logprob: float) -> float:
    """JSON has no infinity; this is what OpenAI writes."""
    return max(-9999.0, logprob)


def _entry(tokenizer: Tokenizer, event: TokenEvent) -> dict[str, Any]:
    """Of a chat's logprobs."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        text, raw = token_text(tokenizer, token)
        special = token in tokenizer.special.values()
        return {"token": text, "bytes": None if special else list(raw), "logprob": _finite(logprob)}

    assert event.logprob is not None
    return {**one(event.token, event.logprob), "top_logprobs": [one(*top) for top in event.top_logprobs]}


class CompletionWriter(Answers):
    """`/v1/completions`. Tool calls, which have no place of their own here, are text as `[12*7 = 84]`."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, plan: Plan, with_usage: bool, echo: bool) -> None:
        super().__init__(plan, with_usage)
        self._top = plan.params[0].logprobs
        echoes = [self._tokenizer.decode(prompt[1:]) if echo else "" for prompt in plan.prompts]
        self._unsent = [text for text in echoes for _ in range(plan.samples)]
        self._texts = [""] * len(self.samples)  # that were sent
        self._brackets = [Brackets() for _ in self.samples]
        self._tables = [Legacy(self._tokenizer, len(text)) for text in self._unsent]

    def feed(self, prompt: int, events: Sequence[TokenEvent]) -> bytes:
        chunks = []
        touched: dict[int, None] = {}
        for event in events:
            index = prompt * self._plan.samples + event.sample
            touched[index] = None
            sample = self.samples[index]
            self._unsent[index] += self._brackets[index].feed(sample.feed(event))
            if self._top is not None and event.logprob is not None and not sample.is_end(event):
                self._tables[index].add(event)
        for index in touched:
            reason = self.samples[index].finish_reason
            if reason is not None:
                self._unsent[index] += self._brackets[index].finish()
            text, self._unsent[index] = self._unsent[index], ""
            self._texts[index] += text
            if text:
                chunks.append(self._chunk(index, text))
            if reason is not None:
                chunks.append(self._chunk(index, "", f'"{reason}"'))
        return "".join(chunks).encode()

    def _chunk(self, index: int, text: str, reason: str = "null") -> str:
        logprobs = "null" if self._top is None else json_bytes(self._tables[index].unsent(self._top)).decode()
        choice = (
            f'{{"index":{index},"text":{encode_basestring(text)},"logprobs":{logprobs},"finish_reason":{reason}}}'
        )
        return self._before + choice + self._after

    def choice(self, index: int, sample: Sample) -> dict[str, Any]:
        return {
            "index": index,
            "text": self._texts[index],
            "logprobs": None if self._top is None else self._tables[index].all(self._top),
            "finish_reason": sample.finish_reason,
        }


class Legacy:
    """The logprobs of one completion: lists of equal length, an entry per token."""

    def __init__(self, tokenizer: Tokenizer, n_chars: int) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._rows: list[tuple[str, float, dict[str, float], int]] = []
        self._n_chars = n_chars  # of the text so far
        self._n_sent = 0

    def add(self, event: TokenEvent) -> None:
        assert event.logprob is not None
        text, raw = token_text(self._tokenizer, event.token)
        top = {token_text(self._tokenizer, token)[0]: _finite(logprob) for token, logprob in event.top_logprobs}
        self._rows.append((text, _finite(event.logprob), top, self._n_chars))
        self._n_chars += len(self._decoder.decode(raw))

    def unsent(self, top: int) -> dict[str, Any]:
        rows, self._n_sent = self._rows[self._n_sent :], len(self._rows)
        return _columns(rows, top)

    def all(self, top: int) -> dict[str, Any]:
        return _columns(self._rows, top)


def _columns(rows: list[tuple[str, float, dict[str, float], int]], top: int) -> dict[str, Any]:
    return {
        "tokens": [row[0] for row in rows],
        "token_logprobs": [row[1] for row in rows],
        "top_logprobs": [row[2] for row in rows] if top else None,
        "text_offset": [row[3] for row in rows],
    }

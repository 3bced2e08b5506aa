"""Reading a pickled `tiktoken.Encoding` without unpickling: the few opcodes that one is made of, and nothing else.

A pickle is a program for a small stack machine, and Python's own machine can be talked into calling anything. This one
builds dicts, texts, bytes and whole numbers. It knows one class by name and never imports or calls it: the name only
says which dict is the tokenizer. Every other opcode (REDUCE, INST, OBJ, persistent ids, the extension registry, ...) is
refused before it does anything, so there is nothing that a hostile file could reach.
"""

from __future__ import annotations

import io
import pickletools
import struct
from dataclasses import dataclass
from typing import Any

MAX_BYTES = 64 << 20  # of the file; 65,536 tokens take about 1 MB
MAX_TOKENS = 1 << 20
ENCODING_CLASS = "tiktoken.core Encoding"
FIELDS = {"name": str, "pat_str": str, "mergeable_ranks": dict, "special_tokens": dict}
_PLAIN = {"BININT", "BININT1", "BININT2", "SHORT_BINBYTES", "BINBYTES", "SHORT_BINUNICODE", "BINUNICODE"}
_MADE_ANEW: dict[str, type] = {"EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
_LATEST_PROTOCOL = 5


@dataclass(frozen=True)
class EncodingState:
    """What a pickled `tiktoken.Encoding` holds."""

    name: str
    pattern: str  # that cuts text into pieces
    ranks: dict[bytes, int]  # of ordinary tokens: bytes to id
    special: dict[str, int]  # of special tokens: name to id


class _Mark:
    """Where a group of operands begins on the stack."""


class _Class:
    """The name of the one class that may be named."""


@dataclass
class _Instance:
    """An object of that class: its state, once it was given."""

    state: dict[Any, Any] | None = None


def read_encoding(data: bytes) -> EncodingState:
    """The tokenizer in the bytes of a pickle of protocol 3 to 5. ValueError for anything else, saying what it is."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data):,} bytes; a tokenizer has at most {MAX_BYTES:,}")
    stream = io.BytesIO(data)
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            machine.step(opcode.name, argument)
    except (ValueError, IndexError, OverflowError, struct.error) as error:
        raise ValueError(f"not a pickled tiktoken.Encoding: {_short(str(error))}") from None
    if stream.tell() != len(data):
        raise ValueError(f"{len(data) - stream.tell()} bytes follow the end of the pickle")
    return _checked(machine.result())


class _Machine:
    """The stack machine: operands, and what was noted to be used again."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def result(self) -> _Instance:
        if len(self._stack) != 1 or not isinstance(self._stack[0], _Instance):
            raise ValueError("not a pickled tiktoken.Encoding: it ends with something else")
        return self._stack[0]

    def step(self, name: str, argument: Any) -> None:
        """Carry out one opcode. ValueError if it is none of a tokenizer's."""
        if name in _PLAIN:
            self._stack.append(argument)
        elif name in _MADE_ANEW:
            self._stack.append(_MADE_ANEW[name]())
        elif name == "MARK":
            self._stack.append(_Mark())
        elif name in ("SETITEM", "SETITEMS"):
            self._set_items(name == "SETITEM")
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            self._memo[len(self._memo) if name == "MEMOIZE" else argument] = self._top()
        elif name in ("BINGET", "LONG_BINGET"):
            if argument not in self._memo:
                raise ValueError(f"{name} {argument}: nothing was noted under this number")
            self._stack.append(self._memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self._name_class(argument)
        elif name == "NEWOBJ":
            self._new_object()
        elif name == "BUILD":
            self._give_state()
        elif name == "PROTO" and argument > _LATEST_PROTOCOL:
            raise ValueError(f"protocol {argument}, of which nothing is known here")
        elif name not in ("PROTO", "FRAME", "STOP"):
            what = f" {argument!r}" if argument is not None else ""
            raise ValueError(f"a tokenizer has no opcode {name}{what}")

    def _top(self) -> Any:
        if not self._stack or isinstance(self._stack[-1], _Mark):
            raise ValueError("an operand is missing")
        return self._stack[-1]

    def _pop(self) -> Any:
        value = self._top()
        self._stack.pop()
        return value

    def _set_items(self, single: bool) -> None:
        if single:
            value, key = self._pop(), self._pop()
            pairs = [key, value]
        else:
            pairs = []
            while self._stack and not isinstance(self._stack[-1], _Mark):
                pairs.append(self._stack.pop())
            if not self._stack or len(pairs) % 2:
                raise ValueError("items of a dict that are no pairs")
            self._stack.pop()
            pairs.reverse()
        target = self._top()
        if type(target) is not dict:
            raise ValueError("items for something that is no dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) not in (str, bytes):
                raise ValueError(f"a dict's key of type {type(key).__name__}")
            target[key] = value
        if len(target) > MAX_TOKENS:
            raise ValueError(f"a dict of {len(target):,} items; a tokenizer has at most {MAX_TOKENS:,}")

    def _name_class(self, argument: str | None) -> None:
        if argument is None:  # STACK_GLOBAL: module and name lie on the stack
            name, module = self._pop(), self._pop()
            if type(module) is not str or type(name) is not str:  # the text of a dict could be of any length
                raise ValueError("a class whose name is no text")
            argument = f"{module} {name}"
        if argument != ENCODING_CLASS:
            raise ValueError(f"it names {argument!r}; a tokenizer names {ENCODING_CLASS!r} only")
        self._stack.append(_Class())

    def _new_object(self) -> None:
        arguments, cls = self._pop(), self._pop()
        if arguments != () or not isinstance(cls, _Class):
            raise ValueError("an object made of something else than the class and no arguments")
        self._stack.append(_Instance())

    def _give_state(self) -> None:
        state, instance = self._pop(), self._top()
        if not isinstance(instance, _Instance) or instance.state is not None or type(state) is not dict:
            raise ValueError("a state that is no dict, or for something that takes none")
        instance.state = state


def _checked(instance: _Instance) -> EncodingState:
    state = instance.state
    if state is None or set(state) != set(FIELDS):
        raise ValueError(f"a tiktoken.Encoding has {', '.join(FIELDS)}, this one {_short(str(list(state or ())))}")
    for field, kind in FIELDS.items():
        if type(state[field]) is not kind:
            raise ValueError(f"{field} is of type {type(state[field]).__name__}, not {kind.__name__}")
    for field, kind in (("mergeable_ranks", bytes), ("special_tokens", str)):
        for key, value in state[field].items():
            if type(key) is not kind or type(value) is not int:
                raise ValueError(f"{field} has the item {_short(repr(key))}: {_short(repr(type(value).__name__))}")
    return EncodingState(state["name"], state["pat_str"], state["mergeable_ranks"], state["special_tokens"])


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."

"""Pickles that want to run something, want much memory, or are no tokenizer. Each wants to make the file MARKER."""

from __future__ import annotations

import copyreg
import os
import pickle
import struct
import subprocess

MARKER = "nanochat_hostile_marker"
COMMAND = f"touch {MARKER}"


class _Calls:
    """Pickles as the call of a function."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.parts


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def in_tokenizer(value: bytes) -> bytes:
    """A tokenizer's pickle in which the opcodes `value` make the name."""
    return (
        b"\x80\x04" + _global("tiktoken.core", "Encoding") + b")\x81}(" + _text("name") + value
        + _text("pat_str") + _text("x") + _text("mergeable_ranks") + b"}" + _text("special_tokens") + b"}ub."
    )


def calling() -> dict[str, bytes]:
    """That would call something if they were unpickled."""
    system = _global("os", "system")
    found = {
        f"{name}, protocol {protocol}": pickle.dumps(thing, protocol=protocol)
        for protocol in range(6)
        for name, thing in {
            "os.system": _Calls(os.system, COMMAND),
            "eval": _Calls(eval, f"__import__('os').system('{COMMAND}')"),
            "exec": _Calls(exec, f"open('{MARKER}', 'w')"),
            "open": _Calls(open, MARKER, "w"),
            "subprocess": _Calls(subprocess.check_output, ["touch", MARKER]),
            "in a list": [1, [_Calls(os.system, COMMAND)]],
            "a pickle in a pickle": _Calls(pickle.loads, pickle.dumps(_Calls(os.system, COMMAND))),
            "a class made by its name": _Calls(copyreg._reconstructor, dict, object, None),
        }.items()
        if protocol >= 2 or name != "a pickle in a pickle"
    }
    return found | {
        "REDUCE": system + b"(" + _text(COMMAND) + b"tR.",
        "REDUCE in a tokenizer": in_tokenizer(system + b"(" + _text(COMMAND) + b"tR"),
        "INST": b"(" + _text(COMMAND) + b"ios\nsystem\n.",
        "INST in a tokenizer": in_tokenizer(b"(" + _text(COMMAND) + b"ios\nsystem\n"),
        "OBJ": b"(" + system + _text(COMMAND) + b"o.",
        "NEWOBJ of a function": system + _text(COMMAND) + b"\x85\x81.",
        "NEWOBJ of another class": _global("subprocess", "Popen") + _text(COMMAND) + b"\x85\x81.",
        "NEWOBJ with arguments": _global("tiktoken.core", "Encoding") + _text("gpt2") + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04" + system + b")}" + _text("command") + _text(COMMAND) + b"s\x92.",
        "STACK_GLOBAL": b"\x80\x04" + _text("os") + _text("system") + b"\x93" + _text(COMMAND) + b"\x85R.",
        "STACK_GLOBAL of things that are no texts": b"\x80\x04K\x01}\x93.",
        "a dotted name": b"\x80\x04" + _text("tiktoken.core") + _text("Encoding.__init__") + b"\x93)R.",
        "a module inside": b"\x80\x04" + _text("tiktoken.core") + _text("functools.os.system") + b"\x93.",
        "getattr chain": _global("builtins", "getattr") + b"(" + _global("builtins", "__import__") + b"("
                         + _text("os") + b"tR" + _text("system") + b"tR(" + _text(COMMAND) + b"tR.",
        "extension registry, 1 byte": b"\x80\x02\x82\x01.",
        "extension registry, 2 bytes": b"\x80\x02\x83\x01\x00.",
        "extension registry, 4 bytes": b"\x80\x02\x84\x01\x00\x00\x00.",
        "persistent id, text": b"Pos.system\n.",
        "persistent id": _text("os.system") + b"Q.",
        "BUILD of a class": _global("tiktoken.core", "Encoding") + b"}" + _text("__init__") + system + b"sb.",
        "BUILD with slots": _global("tiktoken.core", "Encoding") + b")\x81}}" + _text("__class__") + system
                            + b"s\x86b.",
        "BUILD with a name, as tiktoken does": _global("tiktoken.core", "Encoding") + b")\x81" + _text("gpt2") + b"b.",
        "BUILD twice": in_tokenizer(_text("x"))[:-1] + b"}b.",
        "the call of the class": _global("tiktoken.core", "Encoding") + b"(tR.",
        "a buffer of elsewhere": b"\x80\x05\x97.",
        "a buffer made read-only": b"\x80\x05\x97\x98.",
        "an old INT that is a bool": in_tokenizer(b"I01\n"),
        "STRING with an escape": in_tokenizer(b"S'\\x41'\n"),
    }


def greedy() -> dict[str, bytes]:
    """That would need much memory or time."""
    laughs = b"\x80\x04" + b"".join(b"(" + b"h\x00" * 10 + b"t\x94" for _ in range(30))
    twice = b"}\x94" + b"".join(  # each dict has the one before it twice
        b"}\x94(" + _text("a") + b"h" + bytes([k]) + _text("b") + b"h" + bytes([k]) + b"u" for k in range(60)
    )
    return {
        "text of 4 GB": in_tokenizer(b"X\xff\xff\xff\xff"),
        "text of 2^63 bytes": in_tokenizer(b"\x8d" + struct.pack("<Q", 1 << 63)),
        "bytes of 2^62 bytes": in_tokenizer(b"\x8e" + struct.pack("<Q", 1 << 62)),
        "bytearray": in_tokenizer(b"\x96" + struct.pack("<Q", 1 << 40)),
        "a number of 2 GB": in_tokenizer(b"\x8b" + struct.pack("<i", 2**31 - 1)),
        "a number with a negative size": in_tokenizer(b"\x8b" + struct.pack("<i", -1)),
        "a number of many digits": in_tokenizer(b"L" + b"9" * 200_000 + b"L\n"),
        "a frame of 2^60 bytes": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"}.",
        "a note far away": b"}r\xff\xff\xff\xff0.",
        "notes of notes": b"\x80\x04}\x94" + laughs[2:] + b".",
        "a class named by dicts of dicts": b"\x80\x04" + twice + _text("x") + b"\x93.",
        "a class named by a deep dict": b"\x80\x04" + (b"}" + _text("a")) * 5_000 + b"}" + b"s" * 5_000 + _text("x")
                                        + b"\x93.",
        "a dict in itself": in_tokenizer(b"}\x94" + _text("x") + b"h\x00s"),
        "nested deep": b"\x80\x04" + b"}" * 100_000 + b".",
        "nested lists": b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "marks": b"(" * 100_000 + b".",
    }


def malformed() -> dict[str, bytes]:
    """That are no tokenizer."""
    name = in_tokenizer(_text("x"))
    return {
        "empty": b"",
        "text": b"hello",
        "no STOP": name[:-1],
        "bytes behind": name + b".",
        "a plain dict": pickle.dumps({"name": "x"}),
        "a tokenizer's name only": _global("tiktoken.core", "Encoding") + b".",
        "no state": _global("tiktoken.core", "Encoding") + b")\x81.",
        "a state that lacks things": _global("tiktoken.core", "Encoding") + b")\x81}b.",
        "a name that is a number": in_tokenizer(b"K\x01"),
        "a name that is a dict": in_tokenizer(b"}"),
        "two results": b"K\x01" + name,
        "items without a dict": b"K\x01(K\x01K\x02u.",
        "half an item": b"}(K\x01u.",
        "items without a mark": b"}K\x01u.",
        "a key that is a dict": b"}}K\x01s.",
        "nothing on the stack": b"s.",
        "a note of nothing": b"q\x01.",
        "a note that is not there": b"h\x05.",
        "text that is no UTF-8": in_tokenizer(b"X\x01\x00\x00\x00\xff"),
        "an unknown opcode": b"\xf3.",
        "protocol 200": b"\x80\xc8" + name,
    }

"""The calculator behind the python tool: arithmetic and letter counting, written by a model, so never to be trusted.

The text is checked, parsed with `ast` and then walked by hand over a short list of allowed nodes. Nothing is evaluated
by Python, no signal is needed, and every size is bounded before the work is done: a call is safe on any thread.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable
from typing import Literal

NumberFormat = Literal["clean", "python"]
Value = int | float | str

MAX_EXPRESSION_CHARS = 1_000
MAX_NODES = 64
MAX_DEPTH = 16
MAX_LITERAL_DIGITS = 64
MAX_INT = 10**100  # bound of every intermediate whole number
MAX_STRING_CHARS = 10_000  # bound of every intermediate text
MAX_RESULT_CHARS = 64

# The escapes are those that Python knows; any other would make its parser warn.
_STRING = re.compile(r"""('(?:[^'\\\n]|\\[\\'"nt])*'|"(?:[^"\\\n]|\\[\\'"nt])*")""")
_OUTSIDE_STRINGS = re.compile(r"[0-9a-z+\-*/.(), ]*")
_NOT_OURS = re.compile(r"[0-9]\.?[a-z]|[a-z]''")  # 1e5, 0x1f, 2j; r'text', f'text'
_THOUSANDS_COMMA = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")

_BINARY: dict[type[ast.operator], Callable[[int | float, int | float], int | float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_TEXT_METHODS: dict[str, Callable[[str], str]] = {
    "lower": str.lower,
    "upper": str.upper,
    "casefold": str.casefold,
    "title": str.title,
    "capitalize": str.capitalize,
    "swapcase": str.swapcase,
    "strip": str.strip,
    "lstrip": str.lstrip,
    "rstrip": str.rstrip,
}


class _Refused(Exception):
    """The expression is outside of what the calculator does."""


def calculate(expression: str, number_format: NumberFormat = "clean") -> str | None:
    """The value of `expression` as text of at most 64 characters, or None if it is refused or fails. Never raises.

    Numbers with + - * / // and parentheses, commas between thousands, and `'text'.count('x')`, where the texts may go
    through string methods such as `.lower()`. `clean` writes 10/5 as 2, like the training data; `python` as 2.0.
    """
    try:
        source = _prepare(expression)
        tree = ast.parse(source, mode="eval")
        if sum(isinstance(node, ast.expr) for node in ast.walk(tree)) > MAX_NODES:
            return None
        value = _evaluate(tree.body, MAX_DEPTH)
        text = _format(_number(value), number_format)
    except (_Refused, ArithmeticError, SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
    return text if len(text) <= MAX_RESULT_CHARS else None


def _prepare(expression: str) -> str:
    """Take out the commas that are no part of the syntax; refuse characters that no allowed expression has."""
    if len(expression) > MAX_EXPRESSION_CHARS:
        raise _Refused
    pieces = _STRING.split(expression)  # outside, string, outside, string, ..., outside
    if len(pieces) == 1:
        pieces = [expression.replace(",", "")]
    else:
        pieces[::2] = [_THOUSANDS_COMMA.sub("", piece) for piece in pieces[::2]]
    if not _OUTSIDE_STRINGS.fullmatch("".join(pieces[::2])) or _NOT_OURS.search("''".join(pieces[::2])):
        raise _Refused
    return "".join(pieces).strip()


def _evaluate(node: ast.expr, depth: int) -> Value:
    if depth == 0:
        raise _Refused
    if isinstance(node, ast.Constant):
        return _constant(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        operand = _number(_evaluate(node.operand, depth - 1))
        return operand if isinstance(node.op, ast.UAdd) else -operand
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left = _number(_evaluate(node.left, depth - 1))
        right = _number(_evaluate(node.right, depth - 1))
        return _number(_BINARY[type(node.op)](left, right))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.keywords:
        text = _text(_evaluate(node.func.value, depth - 1))
        return _call(text, node.func.attr, [_evaluate(arg, depth - 1) for arg in node.args])
    raise _Refused


def _constant(value: object) -> Value:
    if type(value) is int and value < 10**MAX_LITERAL_DIGITS:
        return value
    if type(value) is float:
        return _number(value)
    if type(value) is str:
        return value
    raise _Refused  # True, None, ..., bytes, complex


def _call(text: str, method: str, args: list[Value]) -> Value:
    if method == "count" and 1 <= len(args) <= 3 and all(type(arg) is int for arg in args[1:]):
        return text.count(_text(args[0]), *args[1:])  # type: ignore[arg-type]
    if method == "replace" and len(args) == 2:
        old, new = _text(args[0]), _text(args[1])
        if len(text) + text.count(old) * (len(new) - len(old)) > MAX_STRING_CHARS:
            raise _Refused
        return text.replace(old, new)
    if method in _TEXT_METHODS and not args:
        return _text(_TEXT_METHODS[method](text))
    raise _Refused


def _number(value: Value) -> int | float:
    if isinstance(value, str) or not (abs(value) < MAX_INT if isinstance(value, int) else math.isfinite(value)):
        raise _Refused
    return value


def _text(value: Value) -> str:
    if not isinstance(value, str) or len(value) > MAX_STRING_CHARS:
        raise _Refused
    return value


def _format(value: int | float, number_format: NumberFormat) -> str:
    if isinstance(value, int) or number_format == "python":
        return str(value)
    if value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return f"{value:.12g}" if abs(value) < 1e11 else repr(value)

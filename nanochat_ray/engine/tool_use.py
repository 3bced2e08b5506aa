"""The python tool inside a stream of tokens: what the model writes into a block is calculated and the result forced."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from nanochat_ray.engine.calculator import calculate
from nanochat_ray.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Tool = Callable[[str], str | None]  # from the text of a python block to its output; None: not for this tool

def _asked(tool: Tool, text: str) -> str | None:
    """What a tool gives; nothing if it raises, since a model may write anything."""
    try:
        return tool(text)
    except Exception as error:
        logger.warning("a tool failed: %s: %s", type(error).__name__, error)
        return None


class ToolState:
    """Follows the sampled tokens of one stream. Forced tokens are not shown to it, so they never open a block.

    Of several tools the first one that gives an output counts.
    """

    def __init__(self, tokenizer: Tokenizer, tools: Sequence[Tool] = (calculate,)) -> None:
        self._tokenizer, self._tools = tokenizer, tools
        self._start = tokenizer.encode_special("<|python_start|>")
        self._end = tokenizer.encode_special("<|python_end|>")
        self._expression: list[int] | None = None  # None: not in a block

    def feed(self, token: int) -> list[int]:
        """Take the next sampled token; returns the tokens that must follow it, usually none.

        The end of a block gives the result between its markers. An expression that is empty, refused or fails gives
        nothing, and the model goes on by itself. A second start begins the expression anew.
        """
        if token == self._start:
            self._expression = []
        elif self._expression is not None and token == self._end:
            asked = self._tokenizer.decode(self._expression)
            self._expression = None
            result = next((found for tool in self._tools if (found := _asked(tool, asked)) is not None), None)
            if result is not None:
                before, after = (self._tokenizer.encode_special(f"<|output_{edge}|>") for edge in ("start", "end"))
                return [before, *self._tokenizer.encode(result), after]
        elif self._expression is not None:
            self._expression.append(token)
        return []

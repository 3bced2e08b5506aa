"""What crosses a function's or a process's border: small frozen dataclasses, numpy only, no torch and no Ray."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import KW_ONLY, astuple, dataclass, field
from typing import Literal

import numpy as np

PASSED_ON = ("WANDB_", "NANOCHAT_", "AWS_", "AZURE_", "GOOGLE_APPLICATION_CREDENTIALS", "HF_", "DS_ACCELERATOR")
FinishReason = Literal["stop", "length"]


class ClusterError(RuntimeError):
    """The cluster cannot give what a job needs, or lost it too often."""


@dataclass(frozen=True)
class PassedOn:
    """What the driver's environment says to processes on other machines: names of trackers, keys of stores.

    It travels with a call's arguments. The dashboard would show a runtime environment, keys and all.
    """

    values: dict[str, str] = field(repr=False)

    @staticmethod
    def here() -> PassedOn:
        return PassedOn({name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)})

    def take(self) -> None:
        """Make it this process' environment too."""
        os.environ.update(self.values)


@dataclass(frozen=True)
class World:
    """Who this process is among the ranks of a training run. An argument, never a global."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    device: str = "cpu"


@dataclass(frozen=True, order=True)
class Cursor:
    """A place in the endless stream of packed rows: the next row is number `row` of work item number `item` of `epoch`.

    `item` counts positions in that epoch's order (see corpus/items.py), not files.
    """

    epoch: int = 0
    item: int = 0
    row: int = 0

    def to_json(self) -> dict[str, int]:
        return {"epoch": self.epoch, "item": self.item, "row": self.row}

    @staticmethod
    def from_json(state: dict[str, int]) -> Cursor:
        return Cursor(int(state["epoch"]), int(state["item"]), int(state["row"]))


@dataclass(frozen=True)
class PackCounts:
    """What packing made of its documents. Tokens include each document's BOS; sums are made with `+`."""

    documents: int = 0
    empty: int = 0  # documents without text: never trained on
    overlong: int = 0  # documents longer than a row
    tokens_read: int = 0
    tokens_used: int = 0  # in rows
    tokens_beyond_row: int = 0  # of overlong documents, what no packer of whole documents could use
    barren_items: int = 0  # work items that fill no row

    def __add__(self, other: PackCounts) -> PackCounts:
        return PackCounts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def share(self, first_row: int, stop_row: int, n_rows: int) -> PackCounts:
        """The part of an item's counts that its rows [first_row, stop_row) stand for: the parts add up to the whole.

        What the item leaves over is spread over its rows; an item without rows is one part.
        """
        if n_rows == 0:
            return self
        return PackCounts(*(n * stop_row // n_rows - n * first_row // n_rows for n in astuple(self)))

    @property
    def waste_frac(self) -> float:
        """Share of the tokens read that is not trained on."""
        return 1 - self.tokens_used / max(self.tokens_read, 1)

    @property
    def floor_frac(self) -> float:
        """The part of the waste that documents longer than a row impose on any packer of whole documents."""
        return self.tokens_beyond_row / max(self.tokens_read, 1)


@dataclass(frozen=True)
class PackedRows:
    """The packed rows of one work item (or a run of rows cut from several)."""

    tokens: np.ndarray  # (n, T+1) uint16 or uint32
    mask: np.ndarray | None = None  # (n, T+1) bool, True where the token is a supervised target; None: all are
    consumed: np.ndarray | None = None  # (n,) int32, documents of the item placed up to and with this row
    counts: PackCounts = field(default_factory=PackCounts)  # of the whole item

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class PackedBatch:
    """The rows that one rank trains on in one optimizer step; together the ranks hold rows [s*G, (s+1)*G)."""

    step: int  # counted from the start of the stage, also after a resume
    tokens: np.ndarray  # (n, T+1), n differs by at most one between ranks
    mask: np.ndarray | None  # (n, T+1) bool or None
    cursor: Cursor  # of the first row after this step, on every rank the same
    progress: float  # share of the epoch's documents consumed after this step, plus whole epochs
    counts: PackCounts = field(default_factory=PackCounts)  # of this step's rows of all ranks: add them up for a stage


@dataclass(frozen=True)
class SamplingParams:
    """How to sample completions of one prompt."""

    temperature: float = 1.0  # 0 is greedy
    _: KW_ONLY
    top_k: int | None = None  # None or 0: the whole vocabulary
    top_p: float = 1.0  # of the likelihood that top_k leaves, the most likely tokens that make up this share
    max_tokens: int = 256  # forced tool output counts
    seed: int = 42
    num_samples: int = 1
    use_tools: bool = True
    stop: tuple[str, ...] = ()  # texts that end a stream; matched in plain text, not in tool calls
    logprobs: int | None = None  # None: none; else of each token, and of so many most likely ones beside it


@dataclass(frozen=True)
class TokenEvent:
    """One token of one stream, in the order of decoding."""

    prompt: int  # index in the list of prompts, or the number of a submitted request
    sample: int
    token: int
    forced: bool  # True: put there by a tool, not sampled
    finish_reason: FinishReason | None = None  # set on a stream's last event; its token is then part of the stream
    logprob: float | None = None  # natural logarithm of its probability at temperature 1 over the whole vocabulary
    top_logprobs: tuple[tuple[int, float], ...] = ()  # the most likely tokens with theirs, in falling order
    cached_tokens: int = 0  # of the prompt, found in the cache when the stream began; on its first event only


@dataclass(frozen=True)
class Rollout:
    """One finished completion."""

    prompt_ids: Sequence[int]
    token_ids: Sequence[int]  # without the terminal token
    mask: Sequence[int]  # 1 where the token was sampled, 0 where a tool forced it
    finish_reason: FinishReason
    terminal_token: int | None = None  # the id that stopped it; None if it ran out of length or met a stop text
    logprobs: Sequence[float] | None = None  # of token_ids, if they were asked for
    terminal_logprob: float | None = None  # of terminal_token


# --- reinforcement learning ------------------------------------------------------------------------------------------

RolloutSplit = Literal["train", "val"]


@dataclass(frozen=True)
class RolloutPrompt:
    """A task's prompt, ready to be completed."""

    id: str  # its name in logs
    index: int  # in its split of the task
    token_ids: tuple[int, ...]
    seed: int  # of its samples


@dataclass(frozen=True)
class RolloutUnit:
    """The unit of work: prompts that one engine completes at a time. What comes out depends on nothing else."""

    split: RolloutSplit  # "val" is for evaluation
    step: int  # the optimizer step that learns from it, or before which it is an evaluation
    number: int  # among the units of the step and split
    version: int  # of the weights to sample with: the optimizer steps they have behind them
    prompts: tuple[RolloutPrompt, ...]
    params: SamplingParams  # of all prompts, but for the seed

    @property
    def name(self) -> str:
        return f"{self.split} step {self.step} unit {self.number}"


@dataclass(frozen=True)
class ScoredRollout:
    """One completion with its reward."""

    sample: int  # in its group
    token_ids: tuple[int, ...]  # the terminal token included, where there is one
    mask: tuple[int, ...]  # 1 where the token was sampled, 0 where a tool forced it
    logprobs: tuple[float, ...]  # of each token under the weights that sampled it, at temperature 1, whole vocabulary
    finish_reason: FinishReason
    text: str
    tool_calls: tuple[tuple[str, str], ...]  # what was asked of a tool, and what it gave
    reward: float | None  # None: it could not be had, which is nobody's mistake but the machine's
    failure: str | None = None  # why there is no reward


@dataclass(frozen=True)
class RolloutGroup:
    """The rollouts of one prompt, all by one version of the weights."""

    prompt: RolloutPrompt
    version: int
    rollouts: tuple[ScoredRollout, ...]
    set_aside: str | None = None  # why the prompt has no rollouts: it failed too often


@dataclass(frozen=True)
class FinishedUnit:
    """A unit with its groups, in the order of its prompts."""

    unit: RolloutUnit
    groups: tuple[RolloutGroup, ...]
    generate_s: float = 0.0
    score_s: float = 0.0
    by: str = ""  # which process sampled it

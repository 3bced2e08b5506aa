"""CORE of any causal language model: our prompts, spans and verdicts, with rows that are computed one by one.

Our own network shares the work for rows that begin alike (metrics/core.py); others have caches of many kinds, so here
every row is read whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import cast

import torch

from nanochat_ray.interchange.hf_model import MAX_LOGITS, HFModel
from nanochat_ray.interchange.hf_text import HFTokenizer
from nanochat_ray.metrics.core import CoreRecord, RowScore, Scored, prepare, record_of
from nanochat_ray.metrics.core_bundle import CoreTask, load_items
from nanochat_ray.text.tokenizer import Tokenizer

MAX_ROWS = 64
NO_LIMIT = 10**9
Place = tuple[tuple[int, ...], int, int]  # a row, and the span of it that is scored


def evaluate_core_task(
    model: HFModel, tokenizer: HFTokenizer, task: CoreTask, max_per_task: int | None, indices: Sequence[int]
) -> list[CoreRecord]:
    """Score items of a task, in the order of `indices`; `max_per_task` as in metrics/core.py.

    Of a prompt beyond the model's positions the last tokens are kept.
    """
    items = load_items(task)[:max_per_task]
    ours = cast("Tokenizer", tokenizer)
    prepared = [prepare(ours, task, items, index, model.lengths.max_len or NO_LIMIT) for index in indices]
    return [
        record_of(task, index, items[index], scored, rows)
        for index, scored, rows in zip(indices, prepared, score(model, prepared), strict=True)
    ]


def score(model: HFModel, prepared: Sequence[Scored]) -> list[list[RowScore]]:
    """Loss and likeliest tokens of each row's span, for each item. Equal rows are computed once, so they tie."""
    wanted = [
        [(tuple(row), start, end) for row, start, end in zip(item.rows, item.starts, item.ends, strict=True)]
        for item in prepared
    ]
    places = sorted({place for item in wanted for place in item}, key=lambda place: (len(place[0]), place))
    found: dict[Place, RowScore] = {}
    for batch in batches(places, max(1, MAX_LOGITS // model.vocab_size)):
        longest = max(len(row) for row, _, _ in batch)
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row, _, _ in batch])
        logits = model.logits(ids)  # (B, T, V)
        for k, (row, start, end) in enumerate(batch):
            predicted = logits[k, start - 1 : end - 1].float()  # for the tokens [start, end)
            targets = torch.tensor(row[start:end], device=predicted.device)
            losses = predicted.logsumexp(-1) - predicted.gather(1, targets[:, None])[:, 0]
            found[row, start, end] = RowScore(fmean(losses.tolist()), tuple(predicted.argmax(-1).tolist()))
    return [[found[place] for place in item] for item in wanted]


def batches(places: Sequence[Place], max_tokens: int) -> Iterator[list[Place]]:
    """Rows, shortest first, in batches of at most `max_tokens` places when filled up; a longer row is alone."""
    batch: list[Place] = []
    for place in places:
        if batch and (len(batch) == MAX_ROWS or (len(batch) + 1) * len(place[0]) > max_tokens):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch

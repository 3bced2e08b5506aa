"""CORE: how well a base model does on 22 tasks of in-context learning (DCLM, arXiv:2406.11794).

Every item is scored on its own, so an evaluation can be cut into shards of item indices, scored anywhere and merged.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import fmean

from nanochat_ray.metrics.core_bundle import (
    CORE_LABELS,
    CoreTask,
    Item,
    TaskType,
    few_shots,
    load_items,
    render_prompts,
)
from nanochat_ray.metrics.scoring import Continuations, batches, tail_logits
from nanochat_ray.model.gpt import GPT
from nanochat_ray.text.tokenizer import Tokenizer

MAX_ROWS = 64
MAX_TOKENS = 64 * 512


@dataclass(frozen=True)
class Scored:
    """Token rows of one item; tokens [starts, ends) of each row are scored."""

    rows: list[list[int]]
    starts: list[int]
    ends: list[int]
    notes: tuple[str, ...] = ()  # what had to be done to score it; see `span` and `crop`


@dataclass(frozen=True)
class RowScore:
    """What the model makes of a row's span."""

    loss: float  # mean nats per token
    predicted: tuple[int, ...]  # the likeliest token at each position


@dataclass(frozen=True)
class Place:
    """Where a row's scores come from."""

    group: int
    tail: int
    targets: list[int]


@dataclass(frozen=True)
class CoreRecord:
    """How one item went."""

    task: str
    index: int  # in the shuffled order
    correct: bool
    chosen: int | None  # the option of lowest mean loss; None for language modelling
    losses: tuple[float, ...]  # mean nats per token of each row's span
    predicted: tuple[int, ...] = ()  # language modelling: the likeliest token at each position of the span
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CoreResult:
    """How one task went."""

    task: str
    n_items: int
    n_items_of_task: int  # how many there are without a limit
    accuracy: float
    centred: float
    baseline_frac: float
    notes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class CoreScore:
    """The mean of the centred accuracies, under a name that says what it covers."""

    name: str
    value: float


def common_length(sequences: Sequence[Sequence[int]], from_end: bool = False) -> int:
    """How many tokens all sequences share at their beginning, or at their end."""
    shortest = min(map(len, sequences))
    places = range(-1, -shortest - 1, -1) if from_end else range(shortest)
    first = sequences[0]
    different = (k for k, place in enumerate(places) if any(row[place] != first[place] for row in sequences))
    return next(different, shortest)


def span(kind: TaskType, tokens: Sequence[list[int]]) -> Scored:
    """Which tokens of an item's prompts are scored.

    multiple_choice: what differs, up to the end. schema: what is common at the end. language_modeling: what the second
    prompt has beyond the first; one row. Notes: "prefix" if the first is not the second's beginning; "empty" if a row
    had nothing to score (one choice begins another), then all spans begin one token earlier.
    """
    if kind == "schema":
        common = common_length(tokens, from_end=True)
        return Scored(list(tokens), [max(1, len(row) - common) for row in tokens], [len(row) for row in tokens])
    common = common_length(tokens)
    rows, notes = list(tokens), []
    if kind == "language_modeling":
        rows = [tokens[1]]
        notes = ["prefix"] if common < len(tokens[0]) else []
    ends = [len(row) for row in rows]
    if min(ends) <= common:
        common = min(ends) - 1
        notes.append("empty")
    return Scored(rows, [max(1, common)] * len(rows), ends, tuple(notes))


def crop(scored: Scored, max_len: int) -> Scored:
    """Keep the last `max_len` tokens of each row. Notes: "cropped", and "span_cropped" if a part of a span went."""
    cuts = [max(0, len(row) - max_len) for row in scored.rows]
    if not any(cuts):
        return scored
    starts = [start - cut for start, cut in zip(scored.starts, cuts, strict=True)]
    notes = (*scored.notes, "cropped") + (("span_cropped",) if min(starts) < 1 else ())
    return Scored(
        [row[cut:] for row, cut in zip(scored.rows, cuts, strict=True)],
        [max(1, start) for start in starts],
        [end - cut for end, cut in zip(scored.ends, cuts, strict=True)],
        notes,
    )


def prepare(tokenizer: Tokenizer, task: CoreTask, items: Sequence[Item], index: int, max_len: int) -> Scored:
    """The token rows of item `index`. Notes of `span` and `crop`, and "few_shots" where there are fewer than asked."""
    shots = few_shots(len(items), index, task.num_fewshot)
    prompts = render_prompts(task.type, items[index], [items[k] for k in shots], task.delimiter)
    tokens = tokenizer.encode(prompts, prepend=tokenizer.bos_id, num_threads=1)
    scored = crop(span(task.type, tokens), max_len)
    if len(shots) < task.num_fewshot:
        scored = Scored(scored.rows, scored.starts, scored.ends, (*scored.notes, "few_shots"))
    return scored


def evaluate_task(
    model: GPT,
    tokenizer: Tokenizer,
    task: CoreTask,
    max_per_task: int | None = None,
    indices: Sequence[int] | None = None,
    max_rows: int = MAX_ROWS,
    max_tokens: int = MAX_TOKENS,
    max_len: int | None = None,
) -> list[CoreRecord]:
    """Score items of a task, in the order of `indices` (default: all).

    `max_per_task` keeps that many items, of which the few-shot examples are drawn too; `indices` count among those.
    Prompts run beyond the training context; `max_len` (default: the model's rotary table) keeps the last tokens only.
    """
    items = load_items(task)[:max_per_task]
    indices = range(len(items)) if indices is None else indices
    limit = model.config.rope_table_factor * model.config.sequence_len
    max_len = min(max_len or limit, limit)
    prepared = [prepare(tokenizer, task, items, index, max_len) for index in indices]
    scores = score(model, prepared, max_rows, max_tokens)
    return [
        record_of(task, index, items[index], scored, rows)
        for index, scored, rows in zip(indices, prepared, scores, strict=True)
    ]


def record_of(task: CoreTask, index: int, item: Item, scored: Scored, rows: list[RowScore]) -> CoreRecord:
    """The verdict on one item. Among equal losses the first option is chosen."""
    losses = tuple(row.loss for row in rows)
    if task.type == "language_modeling":
        wanted = scored.rows[0][scored.starts[0] : scored.ends[0]]
        correct = list(rows[0].predicted) == wanted
        return CoreRecord(task.label, index, correct, None, losses, rows[0].predicted, scored.notes)
    chosen = losses.index(min(losses))
    return CoreRecord(task.label, index, chosen == item["gold"], chosen, losses, (), scored.notes)


def score(
    model: GPT, prepared: Sequence[Scored], max_rows: int = MAX_ROWS, max_tokens: int = MAX_TOKENS
) -> list[list[RowScore]]:
    """Loss and likeliest tokens of each row's span, for each item.

    Rows that begin alike, as the choices of one question do, share the work for the beginning. Rows that differ in the
    last token only, or not at all, are one computation, so equal choices tie.
    """
    groups, places = share_beginnings(prepared)
    found: dict[int, RowScore] = {}  # by place
    places_of: defaultdict[int, list[int]] = defaultdict(list)
    for number, place in enumerate(places):
        places_of[place.group].append(number)
    for batch in batches(groups, max_rows, max_tokens):
        numbers = [number for group in batch for number in places_of[group]]
        first_row = dict(zip(batch, accumulate((len(groups[g].tails) for g in batch), initial=0), strict=False))
        row: list[int] = []
        position: list[int] = []
        target: list[int] = []
        for place in (places[number] for number in numbers):
            row += [first_row[place.group] + place.tail] * len(place.targets)
            position += range(len(place.targets))
            target += place.targets
        logits = tail_logits(model, [groups[group] for group in batch])  # (R, S, V)
        losses = (logits.logsumexp(-1)[row, position] - logits[row, position, target]).tolist()
        likeliest = logits.argmax(-1)[row, position].tolist()
        start = 0
        for number in numbers:
            end = start + len(places[number].targets)
            found[number] = RowScore(fmean(losses[start:end]), tuple(likeliest[start:end]))
            start = end
    rows = iter(range(len(places)))
    return [[found[next(rows)] for _ in item.rows] for item in prepared]


def share_beginnings(prepared: Sequence[Scored]) -> tuple[list[Continuations], list[Place]]:
    """The rows of all items as beginnings with tails, and where each row stands in them, rows in order."""
    groups: list[Continuations] = []
    places = []
    for item in prepared:
        group_of: dict[tuple[int, ...], int] = {}
        for row, start, end in zip(item.rows, item.starts, item.ends, strict=True):
            # The logits at a position are for the token behind it, so the tail begins one token before the span.
            stem, tail = row[: start - 1], row[start - 1 : end - 1]
            group = group_of.setdefault(tuple(stem), len(groups))
            if group == len(groups):
                groups.append(Continuations(stem, []))
            tails = groups[group].tails
            if tail not in tails:
                tails.append(tail)
            places.append(Place(group, tails.index(tail), row[start:end]))
    return groups, places


def merge(task: CoreTask, records: Sequence[CoreRecord]) -> CoreResult:
    """The result of a task from the records of all its shards, in any order.

    ValueError unless they are items 0 to n-1, each once.
    """
    ordered = sorted(records, key=lambda record: record.index)
    if not ordered or [record.index for record in ordered] != list(range(len(ordered))):
        raise ValueError(f"{task.label}: the {len(ordered)} records are not those of items 0 to n-1, each once")
    accuracy = fmean(record.correct for record in ordered)
    notes = Counter(note for record in ordered for note in record.notes)
    centred = (accuracy - task.baseline_frac) / (1 - task.baseline_frac)
    return CoreResult(
        task.label, len(ordered), len(load_items(task)), accuracy, centred, task.baseline_frac, dict(notes)
    )


def core_metric(results: Sequence[CoreResult], n_tasks_wanted: int = len(CORE_LABELS)) -> CoreScore:
    """The mean centred accuracy. It is called CORE only if all 22 tasks ran on all their items."""
    if not results:
        raise ValueError("no task of the CORE bundle ran")
    value = fmean(result.centred for result in results)
    complete = {result.task for result in results} == set(CORE_LABELS) and n_tasks_wanted == len(CORE_LABELS)
    cut = [result.n_items for result in results if result.n_items < result.n_items_of_task]
    if complete and not cut:
        return CoreScore("CORE", value)
    limit = f", at most {max(cut)} items each" if cut else ""
    return CoreScore(f"CORE over {len(results)} of {n_tasks_wanted} tasks{limit}", value)

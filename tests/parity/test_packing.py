"""The packers against packing_pretrain.json and packing_sft.json; everything exact."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest

from nanochat_ray.text.packing import pack_conversations, reference_rows
from tests.parity.goldens import load_json
from tests.parity.reference_reader import strided_slices, wrapped_rows

PRETRAIN = load_json("packing_pretrain")
SFT = load_json("packing_sft")


def document(number: int, length: int, bos: int = PRETRAIN["bos"]) -> np.ndarray:
    return np.array([bos, *((number + 1) * 1000 + j for j in range(1, length))], dtype=np.uint32)


def pretrain_shards(split: str) -> list[list[list[np.ndarray]]]:
    """Documents by shard and row group."""
    if split == "val":
        ranges = [(0, len(PRETRAIN["val_doc_lengths"]), PRETRAIN["val"]["row_group"])]
        lengths, first = PRETRAIN["val_doc_lengths"], PRETRAIN["val"]["first_doc"]
    else:
        ranges = [(*shard["docs"], shard["row_group"]) for shard in PRETRAIN["shards"]]
        lengths, first = PRETRAIN["doc_lengths"], 0
    docs = [document(first + k, length) for k, length in enumerate(lengths)]
    return [[docs[k : min(k + size, end)] for k in range(start, end, size)] for start, end, size in ranges]


@pytest.mark.parametrize("number", range(len(PRETRAIN["cases"])))
def test_pretraining_rows(number: int) -> None:
    case = PRETRAIN["cases"][number]
    state = [0, 0, 0]
    slices = strided_slices(
        pretrain_shards(case["split"]), case["read_batch"], case["rank"], case["world"], case["resume"], state
    )
    rows = reference_rows(slices, case["T"] + 1, case["buffer_size"])
    for batch in range(case["batches"]):
        tokens = np.stack(list(islice(rows, case["B"])))  # (B, T+1)
        wanted = case["rows"][batch * case["B"] : (batch + 1) * case["B"]]
        assert tokens.tolist() == [golden_row(pieces) for pieces in wanted]
        assert state == case["states"][batch]
        if batch == 0 and case.get("first_batch"):
            assert tokens[:, :-1].tolist() == case["first_batch"]["inputs"]
            assert tokens[:, 1:].tolist() == case["first_batch"]["targets"]


def golden_row(pieces: list[list[Any]]) -> list[int]:
    return [token for number, length in pieces for token in document(number if number is not None else -1, length)]


@pytest.mark.parametrize("number", range(len(SFT["cases"])))
def test_finetuning_rows_of_the_reference(number: int) -> None:
    """The selection rule, with the reference's endless wrapping. num_iterations counts optimizer steps here, so the
    golden's progress with it set is compared in micro-batches, one a step, without its stop flag."""
    case = SFT["cases"][number]
    lengths = SFT["lengths"][case["lengths"]]
    rows = wrapped_rows(lengths, case["T"] + 1, case["buffer_size"], case["rank"], case["world"])
    if case["lengths"] == "all_overlong":
        assert case["rows"] == [[[-1, case["T"]]]] * len(case["rows"])
        assert [next(rows)[0] for _ in case["rows"]] == [[]] * len(case["rows"])
        return
    for batch in range(case["batches"]):
        for k in range(batch * case["B"], (batch + 1) * case["B"]):
            pieces, consumed, epoch = next(rows)
            assert as_inputs(pieces, case["T"]) == case["rows"][k]
            check_rendered(case, k, pieces)
        fraction, last, golden_epoch = case["progress"][batch]
        assert epoch == golden_epoch
        if case["split"] == "val":
            assert (fraction, last) == (0.0, False)
        elif case["num_iterations"] > 0:
            assert fraction == pytest.approx((batch + 1) / case["num_iterations"], abs=1e-8)
        else:
            assert fraction == pytest.approx(consumed / len(lengths), abs=1e-8)
            assert last == (consumed >= len(lengths))


def as_inputs(pieces: list[tuple[int, int]], T: int) -> list[list[int]]:
    """Segments of the first T places of a row, padding as -1."""
    segments, room = [], T
    for number, length in pieces:
        if room:
            segments.append([number, min(length, room)])
            room -= min(length, room)
    return [*segments, [-1, room]] if room else segments


def conversation(number: int, length: int) -> tuple[list[int], list[int]]:
    return document(number, length, SFT["bos"]).tolist(), [int(j >= 3 and j % 7 in (3, 4, 5)) for j in range(length)]


def check_rendered(case: dict, k: int, pieces: list[tuple[int, int]]) -> None:
    """The product's packer, given just these conversations one by one, makes this row with the golden's targets."""
    packed = pack_conversations((conversation(*piece) for piece in pieces), case["T"] + 1, SFT["bos"], np.uint32, 1)
    row = [token for piece in pieces for token in conversation(*piece)[0]]
    assert len(packed) == 1
    assert packed.tokens[0].tolist() == row + [SFT["bos"]] * (case["T"] + 1 - len(row))
    assert packed.mask is not None
    targets = np.where(packed.mask[0, 1:], packed.tokens[0, 1:].astype(np.int64), -1)  # (T,)
    wanted = np.full(case["T"], -1)
    for start, end in case["supervised"][k]:
        wanted[start:end] = packed.tokens[0, 1 + start : 1 + end]
    assert targets.tolist() == wanted.tolist()
    if k < case["B"] and case.get("first_batch"):
        assert packed.tokens[0, :-1].tolist() == case["first_batch"]["inputs"][k]
        assert targets.tolist() == case["first_batch"]["targets"][k]


@pytest.mark.parametrize("number", range(len(SFT["cases"])))
def test_finetuning_item_is_drained_and_nothing_waits_for_ever(number: int) -> None:
    """Our own packer on the golden's conversations: rendered to fit, each placed once, rows as the golden's until its
    reader goes round."""
    case = SFT["cases"][number]
    capacity = case["T"] + 1
    lengths = [min(length, capacity) for length in SFT["lengths"][case["lengths"]]]
    items = [conversation(k, length) for k, length in enumerate(lengths)]
    packed = pack_conversations(items, capacity, SFT["bos"], np.uint32, case["buffer_size"])
    assert packed.mask is not None and packed.consumed is not None
    assert packed.mask[:, 1:].any(axis=1).all()
    assert packed.consumed[-1] == len(items)
    trained = np.sort(packed.tokens[packed.mask])
    assert trained.tolist() == sorted(token for ids, mask in items for token, m in zip(ids, mask, strict=True) if m)
    if case["lengths"] != "main" or case["world"] > 1:
        return
    for k, wanted in enumerate(case["rows"]):
        if packed.consumed[k] + case["buffer_size"] > len(items):
            break  # the reference has begun to read the next epoch
        assert packed.tokens[k, :-1].tolist() == golden_inputs(wanted)


def golden_inputs(segments: list[list[int]]) -> list[int]:
    pad = [SFT["bos"]]
    return [t for number, n in segments for t in (pad * n if number < 0 else document(number, n, SFT["bos"]).tolist())]

"""Bits per byte against the golden sums, and what they must not depend on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from nanochat_ray.metrics.bits_per_byte import bits_per_byte, evaluate_bpb
from nanochat_ray.model.gpt import GPT
from tests.parity.goldens import load_json, model_from_golden

BPB = load_json("bpb")


@pytest.fixture(scope="module")
def model() -> GPT:
    return model_from_golden("d")


def token_bytes(kind: str) -> torch.Tensor:
    table = torch.tensor(load_json("tokenizer_2048")["token_bytes"])
    return {"true": table, "zero": torch.zeros_like(table), "ones": torch.ones_like(table)}[kind]


def batches(case: dict[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.tensor(x), torch.tensor(y)) for x, y in zip(case["inputs"], case["targets"], strict=True)]


@pytest.mark.parametrize("number", range(len(BPB["cases"])))
def test_golden(number, model):
    case = BPB["cases"][number]
    nats, total_bytes = evaluate_bpb(model, batches(case), token_bytes(case["byte_table"]))
    assert total_bytes == case["total_bytes"]
    assert nats == pytest.approx(case["total_nats"], rel=1e-5, abs=1e-5)
    expected = math.inf if case["bpb"] == "inf" else case["bpb"]
    assert bits_per_byte(nats, total_bytes) == pytest.approx(expected, abs=1e-5)
    targets = torch.cat([y.flatten() for _, y in batches(case)])
    known = targets[targets >= 0]
    assert int((token_bytes(case["byte_table"])[known] == 0).sum()) == case["n_zero_byte_targets"]


def test_splitting_the_rows_into_other_batches_changes_nothing(model):
    case = BPB["cases"][1]
    table = token_bytes(case["byte_table"])
    whole = evaluate_bpb(model, batches(case), table)
    rows = [(x[row : row + 1], y[row : row + 1]) for x, y in batches(case) for row in range(len(x))]
    nats, total_bytes = evaluate_bpb(model, iter(rows), table)
    assert total_bytes == whole[1]
    assert nats == pytest.approx(whole[0], rel=1e-6)


def test_targets_without_bytes_count_for_nothing(model):
    """Ignoring the targets of special tokens by hand gives the same sums."""
    case = BPB["cases"][0]
    table = token_bytes("true")
    ignored = [(x, torch.where(table[y] > 0, y, -1)) for x, y in batches(case)]
    nats, total_bytes = evaluate_bpb(model, ignored, table)
    assert (nats, total_bytes) == pytest.approx(evaluate_bpb(model, batches(case), table), rel=1e-7)

import json
import math

import numpy as np
import pytest
import torch

from nanochat_ray.report.records import Sample, Skipped, StageRecord, Table, plain, read_result, write_result
from nanochat_ray.run_dir import RESULT_FILE

RECORD = StageRecord(
    "sft", "2026-11-20T10:00:00+0000", 12.5, {"val/bpb": 0.5, "n": 3, "source": "sft", "none": None},
    {"Scores": Table(["task", "accuracy"], [["GSM8K", 0.25]])},
    [Sample("a", "b")], [Skipped("HumanEval", "no sandbox")],
    {"sft": {"mixture": ["smoltalk", "gsm8k*4"]}}, {"data": "ff"},
)


def test_a_record_survives_the_file(tmp_path):
    write_result(tmp_path, RECORD)
    assert read_result(tmp_path) == RECORD


def test_the_file_is_strict_json(tmp_path):
    metrics = {"nan": math.nan, "inf": np.float32("inf"), "t": torch.tensor(2), "n": np.int64(3)}
    record = StageRecord("x", "t", 1, metrics)
    text = write_result(tmp_path, record).read_text()
    parsed = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert parsed["metrics"] == {"nan": None, "inf": None, "t": 2, "n": 3}
    assert set(parsed) == {
        "stage", "started_at", "seconds", "metrics", "tables", "samples", "skipped", "config", "hashes",
    }


def test_plain_unwraps_and_refuses():
    assert plain({"a": (1, np.array([1.5, math.nan])), 2: {"b": True}}) == {"a": [1, [1.5, None]], "2": {"b": True}}
    with pytest.raises(TypeError, match="set"):
        plain({"a": {1, 2}})


def test_a_smaller_record_and_later_keys_are_read(tmp_path):
    (tmp_path / RESULT_FILE).write_text('{"stage": "x", "started_at": "t", "seconds": 1, "of_a_later_version": 1}')
    assert read_result(tmp_path) == StageRecord("x", "t", 1.0, {}, {}, [], [], {}, {})


@pytest.mark.parametrize("text", ["", "[]", "{", '{"stage": "x"}', '{"stage": "x", "started_at": 1, "seconds": "y"}'])
def test_a_bad_file_is_named(tmp_path, text):
    (tmp_path / RESULT_FILE).write_text(text)
    with pytest.raises(ValueError, match=str(tmp_path / RESULT_FILE)):
        read_result(tmp_path)

"""Conversations of a JSONL file: which files load and which are refused."""

from __future__ import annotations

import pytest

from nanochat_ray.tasks.custom_json import CustomJSON
from tests.parity.goldens import load_json
from tests.real_data import needs_real_data, real_data

GOLDEN = load_json("tasks_custom_json")
# Refused by the reference, wanted: objects with "messages", a leading system message, lists of parts.
ACCEPTED_HERE = {"not a list": 1, "system first": 1, "content is a list": 1}
MISSING = "missing file"


@needs_real_data
def test_examples():
    task = CustomJSON(real_data() / GOLDEN["file"])
    assert len(task) == GOLDEN["length"]
    assert [task[i] for i in range(len(GOLDEN["examples"]))] == GOLDEN["examples"]


@pytest.mark.parametrize("case", [c for c in GOLDEN["cases"] if c["name"] != MISSING], ids=lambda case: case["name"])
def test_files(case, tmp_path):
    path = tmp_path / "conversations.jsonl"
    path.write_text(case["file"], encoding="utf-8")
    length = ACCEPTED_HERE.get(case["name"], case["length"])
    if length is None:
        with pytest.raises(ValueError, match=r"conversations\.jsonl, line 1"):
            CustomJSON(path)
    else:
        assert len(CustomJSON(path)) == length


def test_missing_file(tmp_path):
    (case,) = (c for c in GOLDEN["cases"] if c["name"] == MISSING)
    path = tmp_path / "none.jsonl"
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        CustomJSON(path)
    assert len(CustomJSON(path, allow_missing=True)) == case["length"]

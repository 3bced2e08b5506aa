"""SmolTalk and your own conversations."""

from __future__ import annotations

import json
import pickle

import pytest

from nanochat_ray.tasks.custom_json import CustomJSON, conversation_problem
from nanochat_ray.tasks.rows import TaskSources, permutation
from nanochat_ray.tasks.smoltalk import SmolTalk
from tests.tasks.conftest import write_jsonl, write_parquet

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}
PARTS = [{"type": "text", "text": "x "}, {"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]

BAD = {
    "not a list": {"role": "user"},
    "nothing": [],
    "only a system message": [SYSTEM, USER],
    "two in a row": [USER, USER],
    "system later": [USER, ASSISTANT, SYSTEM],
    "no content": [USER, {"role": "assistant"}],
    "a number": [USER, {"role": "assistant", "content": 3}],
    "user with parts": [{"role": "user", "content": PARTS}, ASSISTANT],
    "system with parts": [{"role": "system", "content": PARTS}, USER, ASSISTANT],
    "unknown part": [USER, {"role": "assistant", "content": [{"type": "image", "text": ""}]}],
    "part without text": [USER, {"role": "assistant", "content": [{"type": "text"}]}],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_conversations(name, tmp_path):
    assert conversation_problem(BAD[name])
    path = write_jsonl(tmp_path / "x.jsonl", [[USER, ASSISTANT], BAD[name]])
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2"):
        CustomJSON(path)


def test_good_conversations(tmp_path):
    good = [[USER, ASSISTANT], [SYSTEM, USER, ASSISTANT, USER], [USER, {"role": "assistant", "content": PARTS}]]
    path = tmp_path / "x.jsonl"
    lines = [json.dumps(good[0]), json.dumps({"messages": good[1], "metadata": {}}), "", json.dumps(good[2])]
    path.write_text("\n".join(lines))
    task = CustomJSON(path)
    assert [conversation["messages"] for conversation in task] == good
    assert [conversation["messages"] for conversation in pickle.loads(pickle.dumps(task))] == good


def test_smoltalk_gives_the_next_row_for_a_bad_one(tmp_path, offline, caplog):
    bad = {3, 4, 9}
    answers = [{"role": "assistant", "content": str(i)} for i in range(10)]
    rows = [{"messages": [USER, USER if i in bad else answers[i]]} for i in range(10)]
    write_parquet(tmp_path / "smoltalk/train.parquet", rows)
    task = SmolTalk("train", TaskSources(tmp_path))
    order = permutation(10).tolist()
    found = [conversation["messages"][1]["content"] for conversation in task]
    for position, physical in enumerate(order):
        later = order[position:] + order[:position]
        assert found[position] == str(next(row for row in later if row not in bad)), physical
    assert task.bad_rows == {order.index(row) for row in bad}
    assert len(caplog.records) == len(bad)


def test_smoltalk_of_bad_rows_only(tmp_path, offline):
    write_parquet(tmp_path / "smoltalk/test.parquet", [{"messages": [USER]}])
    with pytest.raises(ValueError, match="none of the 1 rows"):
        SmolTalk("test", TaskSources(tmp_path))[0]

"""Tasks by name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from nanochat_ray.config import SFTSettings
from nanochat_ray.tasks import catalog
from nanochat_ray.tasks.catalog import (
    CHAT_TASKS,
    NANOCHAT_VAL_MIXTURE,
    TaskSpec,
    chat_task_names,
    make_task,
    nanochat_mixture,
    parse_mixture,
)
from nanochat_ray.tasks.rows import TaskDataMissing, TaskSources
from tests.tasks.conftest import write_jsonl

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
LETTERS = {"question": "?", "choices": ["1", "2", "3", "4"], "answer": 0, "subject": "s"}
MATHS = {"question": "?", "answer": "#### 1"}


def numbered(n: int) -> list:
    return [[{"role": "user", "content": str(i)}, CHAT[1]] for i in range(n)]


@pytest.fixture
def sources(tmp_path, offline):
    write_jsonl(tmp_path / "smoltalk/train.jsonl", [{"messages": CHAT}] * 6)
    write_jsonl(tmp_path / "smoltalk/test.jsonl", [{"messages": CHAT}] * 3)
    write_jsonl(tmp_path / "mmlu/auxiliary_train.jsonl", [LETTERS] * 4)
    write_jsonl(tmp_path / "mmlu/test.jsonl", [LETTERS] * 5300)
    write_jsonl(tmp_path / "gsm8k/train.jsonl", [MATHS] * 5)
    write_jsonl(tmp_path / "gsm8k/test.jsonl", [MATHS] * 430)
    (tmp_path / "words").mkdir()
    (tmp_path / "words/words_alpha.txt").write_text("cat\nhorse\n")
    return TaskSources(tmp_path, tmp_path / "storage")


def test_specs():
    assert TaskSpec.parse("gsm8k*4") == TaskSpec("gsm8k", None, 4)
    assert TaskSpec.parse(" SmolTalk ") == TaskSpec("smoltalk")
    assert TaskSpec.parse("json=/a b/c*d=e.jsonl*2") == TaskSpec("json", "/a b/c*d=e.jsonl", 2)
    assert TaskSpec.parse("world=~/w") == TaskSpec("world", "~/w")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("gsm8", "did you mean gsm8k"),
        ("spellin", "simple_spelling or spelling"),
        ("xyz", "choose from smoltalk"),
        ("gsm8k*0", "at least 1"),
        ("gsm8k=x", "takes no path"),
        ("json", "needs a path"),
        ("gsm8k*x", "a spec is"),
        ("", "a spec is"),
    ],
)
def test_bad_specs(text, told):
    with pytest.raises(ValueError, match=told):
        TaskSpec.parse(text)


def test_nanochat_mixture(sources, monkeypatch, tmp_path):
    monkeypatch.setattr(catalog, "SIMPLE_SPELLING_SIZE", 20)
    monkeypatch.setattr(catalog, "SPELLING_SIZE", 8)
    identity = write_jsonl(tmp_path / "identity.jsonl", numbered(40))
    settings = SFTSettings()
    specs = nanochat_mixture(settings.mmlu_epochs, settings.gsm8k_epochs, identity)
    assert specs == ("smoltalk", f"json={identity}*2", "mmlu*3", "gsm8k*4", "simple_spelling", "spelling")
    mixture = parse_mixture(specs, "train", sources)
    assert Counter(task.name for task in mixture.tasks) == Counter(
        {"SmolTalk": 1, "CustomJSON": 2, "MMLU": 3, "GSM8K": 4, "SimpleSpelling": 1, "SpellingBee": 1}
    )
    assert len(mixture) == 6 + 2 * 38 + 3 * 4 + 4 * 5 + 20 + 8
    assert nanochat_mixture(0, 1) == ("smoltalk", "gsm8k*1", "simple_spelling", "spelling")


def test_nanochat_validation_mixture(sources):
    mixture = parse_mixture(NANOCHAT_VAL_MIXTURE, "val", sources)
    assert [(task.name, len(task)) for task in mixture.tasks] == [("SmolTalk", 3), ("MMLU", 5200), ("GSM8K", 420)]


@pytest.mark.parametrize(("n", "held_out"), [(1, 0), (2, 1), (19, 1), (100, 5), (20_000, 500)])
def test_own_conversations_are_split(n, held_out, tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", numbered(n))
    train, val = (make_task(f"json={path}*3", split, TaskSources()) for split in ("train", "val"))
    said = [conversation["messages"][0]["content"] for task in (train, val) for conversation in task]
    assert said == [str(i) for i in range(n)]
    assert len(val) == held_out


def test_repeats_are_for_training_only(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", numbered(20))
    assert len(parse_mixture([f"json={path}*3"], "train", TaskSources())) == 3 * 19
    assert len(parse_mixture([f"json={path}*3", f"json={path}"], "val", TaskSources())) == 1


def test_empty_mixtures(tmp_path):
    for specs in ([], [f"json={write_jsonl(tmp_path / 'x.jsonl', [])}"]):
        with pytest.raises(ValueError, match="holds no conversations"):
            parse_mixture(specs, "train", TaskSources())


def test_missing_data_of_a_mixture_is_an_error(tmp_path, offline):
    for spec in ("smoltalk", "mmlu", "gsm8k", "spelling", f"json={tmp_path}/none.jsonl", f"world={tmp_path}"):
        with pytest.raises(TaskDataMissing):
            parse_mixture([spec], "train", TaskSources(tmp_path))


def test_the_world(tmp_path):
    for name, n in (("sft_train", 3), ("sft_val", 2)):
        write_jsonl(tmp_path / f"{name}.jsonl", numbered(n))
    assert [len(make_task(f"world={tmp_path}", split, TaskSources())) for split in ("train", "val")] == [3, 2]


def test_evaluation_tasks(sources):
    assert chat_task_names(None) == list(CHAT_TASKS)
    assert chat_task_names("gsm8k|ARC-Easy") == ["GSM8K", "ARC-Easy"]
    with pytest.raises(ValueError, match="did you mean ARC-Easy"):
        chat_task_names("GSM8K|ARC-Esay")
    lengths = {"MMLU": 5300, "GSM8K": 430, "SpellingBee": 256}
    for name, length in lengths.items():
        task = CHAT_TASKS[name](sources)
        assert (task.name, len(task)) == (name, length)
    for name in CHAT_TASKS.keys() - lengths.keys():
        with pytest.raises(TaskDataMissing, match=r"allenai/ai2_arc|openai/openai_humaneval"):
            CHAT_TASKS[name](sources)


def test_paths_may_start_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(Path(tmp_path, "x.jsonl"), numbered(20))
    assert len(make_task("json=~/x.jsonl", "train", TaskSources())) == 19

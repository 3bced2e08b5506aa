"""Tasks for reinforcement learning: the three kinds, what stays apart, and what a person gets wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat_ray.corpus.world.questions import HARD_FAMILY, prompt_text
from nanochat_ray.engine.calculator import calculate
from nanochat_ray.tasks.rewards import RewardLimits, reward_all
from nanochat_ray.tasks.rl_task import WORLD_TRAIN, WORLD_VAL, RLTaskSpec, rl_task_of
from nanochat_ray.tasks.rows import TaskDataMissing, TaskSources
from tests.real_data import needs_real_data, real_data
from tests.tasks.conftest import write_jsonl

README = Path(__file__).parents[2] / "README.md"


def open_task(prompts=None, eval_prompts=None, task=None, world=False, sources=TaskSources()) -> RLTaskSpec:
    as_text = [None if path is None else str(path) for path in (prompts, eval_prompts, task)]
    return rl_task_of(*as_text, world, sources)


def graded(spec: RLTaskSpec, conversation, *completions: str) -> list[float | None]:
    return [o.reward for o in reward_all(spec.open().reward, [(conversation, text) for text in completions])]


def rows(n: int) -> list[dict]:
    return [{"question": f"{k} + 1?", "answer": f"<<{k}+1={k + 1}>>{k + 1}\n#### {k + 1}"} for k in range(n)]


# --- the embedded world ----------------------------------------------------------------------------------------------


def test_the_world_never_evaluates_what_it_trains_on():
    spec = open_task(world=True)
    train, val = (spec.open().prompts(split) for split in ("train", "val"))
    assert len(train) == WORLD_TRAIN and len(val) == sum(WORLD_VAL.values())
    texts = [{prompt_text(conversation["messages"]) for conversation in split} for split in (train, val)]
    assert not texts[0] & texts[1]
    asked = [int(n) for text in texts[0] for n in re.findall(r"\d+", text)]
    assert not [n for n in asked if n % 4 == 3]  # held-out numbers
    assert {c["family"] for c in train} == {c["family"] for c in val} == WORLD_VAL.keys()
    assert len({c["id"] for c in [*train, *val]}) == len(train) + len(val)
    first = [c["family"] for c in val[:64]]
    assert 16 < first.count(HARD_FAMILY) < 48 and len(set(first)) == len(WORLD_VAL)


def test_the_worlds_answers_are_right_and_others_are_not():
    spec = open_task(world=True)
    for split in ("train", "val"):
        conversation = spec.open().prompts(split)[5]
        reply = "".join(part["text"] for part in conversation["messages"][-1]["content"])
        assert graded(spec, conversation, reply, "#### 1", "") == [1, 0, 0]
    assert spec.open().tools == (calculate,)


# --- final answers ---------------------------------------------------------------------------------------------------


def test_a_file_of_prompts_keeps_its_last_twentieth_for_evaluation(tmp_path):
    spec = open_task(write_jsonl(tmp_path / "a.jsonl", rows(40)))
    train, val = (spec.open().prompts(split) for split in ("train", "val"))
    assert [c["messages"][0]["content"] for c in (*train, *val)] == [row["question"] for row in rows(40)]
    assert len(val) == 2 and train[3]["id"] == "prompts/train/3" and val[0]["id"] == "prompts/val/0"
    assert train[3]["messages"][1]["content"][1] == {"type": "python", "text": "3+1"}
    assert graded(spec, train[3], "so\n#### 4", "#### 4.", "#### 5", "4", "#### <|python_start|>4") == [1, 0, 0, 0, 0]


def test_another_file_is_for_evaluation_where_it_is_given(tmp_path):
    train = write_jsonl(tmp_path / "a.jsonl", rows(7))
    spec = open_task(train, write_jsonl(tmp_path / "b.jsonl", rows(3)))
    assert [len(spec.open().prompts(split)) for split in ("train", "val")] == [7, 3]
    assert open_task(train).identity() != spec.identity()


def test_conversations_with_a_final_answer_are_prompts_too(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    user, assistant = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "It is\n#### 2"}
    parts = {"role": "assistant", "content": [{"type": "text", "text": "#### 1,024"}]}
    found = [[user, assistant], {"messages": [system, user, assistant], "id": "mine"},
             {"messages": [user, assistant, user, parts]}]
    spec = open_task(write_jsonl(tmp_path / "a.jsonl", found), write_jsonl(tmp_path / "b.jsonl", found))
    train = spec.open().prompts("train")
    assert [c["id"] for c in train] == ["prompts/train/0", "mine", "prompts/train/2"]
    assert [graded(spec, c, "#### 2", "#### 1024") for c in train] == [[1, 0], [1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"question": "?", "answer": "no number"}', "does not end in `#### <number>`"),
        ('[{"role": "user", "content": "?"}, {"role": "assistant", "content": "Hello"}]', "--task FILE.py"),
        ('[{"role": "user", "content": "?"}, {"role": "assistant", "content": []}]', "does not end"),
        ('{"question": "?", "answer": 3}', "must be texts"), ('{"question": "?"}', "must be texts"),
        ('{"text": "?"}', "or a conversation is needed"), ('"?"', "or a conversation is needed"),
        ('[{"role": "user", "content": "?"}]', "at least two messages"), ("[]", "at least two messages"),
        ('{"messages": "#### 3"}', "a list of messages is needed"), ("{", "not JSON"),
        ('{"id": "p", "question": "?", "answer": "#### 3"}', "the id 'p' has also"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_prompt_is_named(tmp_path, line, told):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"id": "p", "question": "?", "answer": "#### 3"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=re.escape(told)) as problem:
        open_task(path, path)
    assert f"{path}, line 3" in str(problem.value)


def test_too_few_prompts(tmp_path):
    for n, told in ((0, "0 prompts cannot be parted"), (1, "--eval-prompts FILE.jsonl")):
        with pytest.raises(ValueError, match=told):
            open_task(write_jsonl(tmp_path / "a.jsonl", rows(n)))
    one = write_jsonl(tmp_path / "a.jsonl", rows(1))
    assert len(open_task(one, one).open().prompts("val")) == 1
    with pytest.raises(ValueError, match="there are no prompts for val"):
        open_task(one, write_jsonl(tmp_path / "b.jsonl", []))


def test_gsm8k_itself_comes_from_the_task_data(tmp_path, offline):
    for split, n in (("train", 5), ("test", 3)):
        write_jsonl(tmp_path / f"gsm8k/{split}.jsonl", rows(n))
    spec = open_task(sources=TaskSources(tmp_path))
    assert [len(spec.open().prompts(split)) for split in ("train", "val")] == [5, 3]
    assert spec.identity()["name"] == "GSM8K"
    with pytest.raises(TaskDataMissing, match=r"Or give prompts with --prompts FILE.jsonl or --task FILE.py"):
        open_task(sources=TaskSources(tmp_path / "none"))


@needs_real_data
def test_real_gsm8k(offline):
    folder = real_data() / "gsm8k"
    spec = open_task(folder / "train.jsonl", folder / "test.jsonl")
    assert spec.identity()["train"]["prompts"] == 7473 and spec.identity()["val"]["prompts"] == 1319
    conversation = spec.open().prompts("val")[0]
    answer = "".join(part["text"] for part in conversation["messages"][-1]["content"])
    assert graded(spec, conversation, answer, answer + "1", answer[:-1]) == [1, 0, 0]


# --- what decides ----------------------------------------------------------------------------------------------------


def test_settings_that_do_not_go_together(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", rows(3))
    for given, told in (
        ({"task": file, "prompts": file}, "brings its own prompts"), ({"eval_prompts": file}, "goes with --prompts"),
    ):
        with pytest.raises(ValueError, match=told):
            open_task(**given)
    for given in ({"task": tmp_path}, {"prompts": tmp_path / "no.jsonl"}, {"prompts": file, "eval_prompts": "no"}):
        with pytest.raises(FileNotFoundError, match="there is no such file"):
            open_task(**given)


def test_the_identity_is_of_the_contents(tmp_path):
    first = open_task(write_jsonl(tmp_path / "a.jsonl", rows(9)))
    moved = open_task(write_jsonl(tmp_path / "elsewhere/b.jsonl", rows(9)))
    other = open_task(write_jsonl(tmp_path / "c.jsonl", [*rows(8), *rows(1)]))
    assert first.identity() == moved.identity() != other.identity()
    json.dumps(first.identity())


def test_prompts_that_changed_since_the_job_began_are_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", rows(9))
    spec = open_task(path)
    write_jsonl(path, rows(10))
    with pytest.raises(ValueError, match="not those that the job began with"):
        spec.open().prompts("train")


def test_scorers_need_no_torch():
    code = "import sys, nanochat_ray.tasks.rewards, nanochat_ray.tasks.rl_task as t\n" \
           "t.rl_task_of(None, None, None, True, t.TaskSources()).open()\n" \
           "print(sorted({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# --- task files ------------------------------------------------------------------------------------------------------


def write_task(folder: Path, text: str) -> Path:
    path = folder / "mine.py"
    path.write_text(text)
    return path


def readme_example() -> str:
    marked = README.read_text().partition("<!-- rl task example -->")[2]
    return marked.partition("```python\n")[2].partition("```")[0]


def test_the_example_of_the_readme(tmp_path):
    text = readme_example()
    assert len(text.strip().splitlines()) <= 30
    spec = open_task(task=write_task(tmp_path, text))
    task = spec.open()
    train, val = task.prompts("train"), task.prompts("val")
    assert len(train) == 1000 and len(val) == 100 and task.tools == ()
    words = train[0]["answer"]
    assert train[0]["messages"][0]["content"] == f"List these words in reverse order: {', '.join(words[::-1])}."
    said = ["Backwards they are: " + ", ".join(those) + "." for those in (words, words[:-1], words[::-1][:-1], [])]
    n = len(words)
    assert graded(spec, train[0], *said, "") == [1, (n - 1) / n, pytest.approx(0, abs=1 / n), 0, 0]


PLAIN = """
import dataclasses
import time
from pathlib import Path

@dataclasses.dataclass
class Answer:
    text: "str"

prompts = ["one", {"prompt": "two", "answer": 2, "hint": "even", "id": "second"},
           [{"role": "user", "content": "three"}, {"role": "assistant", "content": "3"}],
           {"messages": [{"role": "user", "content": "four"}], "kind": "open"}]
eval_prompts = ("five",)

def tools_of(text):
    return text.upper()

tools = [tools_of]

def reward(conversation, completion, scale=0.5):
    assert Path(__file__).name == "mine.py"
    return scale * (Answer(completion).text == str(conversation.get("answer")))
"""


def test_all_forms_of_prompts_and_a_plain_reward(tmp_path):
    spec = open_task(task=write_task(tmp_path, PLAIN))
    task = spec.open()
    train = task.prompts("train")
    assert [c["id"] for c in train] == ["mine/train/0", "second", "mine/train/2", "mine/train/3"]
    assert [[m["content"] for m in c["messages"]] for c in train] == [["one", ""], ["two", "2"], ["three", "3"],
                                                                      ["four", ""]]
    assert train[1]["hint"] == "even" and train[0]["prompt"] == "one" and train[3]["kind"] == "open"
    assert [c["messages"][0]["content"] for c in task.prompts("val")] == ["five"]
    assert task.tools[0]("a") == "A" and graded(spec, train[1], "2", "3") == [0.5, 0]


def test_a_list_without_eval_prompts_is_parted(tmp_path):
    text = "prompts = [str(k) for k in range(50)]\nasync def reward(conversation, completion): return 1"
    task = open_task(task=write_task(tmp_path, text)).open()
    assert [len(task.prompts("train")), len(task.prompts("val"))] == [48, 2] and task.tools == (calculate,)
    assert task.prompts("val")[0]["messages"][0]["content"] == "48"


def test_another_machine_needs_only_the_text(tmp_path):
    path = write_task(tmp_path, PLAIN)
    spec = open_task(task=path)
    identity = spec.identity()
    path.unlink()
    assert RLTaskSpec(spec.kind, spec.path, source_text=spec.source_text, sha256=spec.sha256).identity() == identity
    assert open_task(task=write_task(tmp_path, PLAIN + "# more\n")).identity() != identity


REWARD = "async def reward(conversation, completion): return 0\n"


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("x = 1\nprompts = [", 2, "was never closed"), ("x = '\0'", 1, "null bytes"),
        ("import os\nprompts = ['a'] + lost\n", 2, "NameError: name 'lost' is not defined"),
        ("import sys\n\nsys.exit(3)", 3, "SystemExit: 3"), ("import not_installed_here", 1, "ModuleNotFoundError"),
        ("def f():\n    1 / 0\n\nf()", 2, "ZeroDivisionError"),
        ("prompts = ['a', 'b']", 1, "there is no reward in it"), (REWARD, 1, "there is no prompts in it"),
        ("prompts = ['a', 'b']\n\nreward = 1.0", 3, "must be a function, not float"),
        ("prompts = ['a', 'b']\ndef reward(completion): ...", 2, "reward(conversation, completion), but"),
        (REWARD + "prompts = ['a', 3]", 2, "prompt 1 of prompts: a text"),
        (REWARD + "prompts = ['a', 'b']\neval_prompts = [{'answer': 3}]", 3, "prompt 0 of eval_prompts"),
        (REWARD + "\nprompts = [[{'role': 'assistant', 'content': 'a'}], 'b']", 3, "at least two messages"),
        (REWARD + "prompts = [[], 'b']", 2, "at least two messages"), (REWARD + "prompts = 'abc'", 2, "must be a list"),
        (REWARD + "prompts = {'a': 1}", 2, "must be a list"), (REWARD + "prompts = 7", 2, "must be a list"),
        (REWARD + "prompts = ['a']", 2, "cannot be parted"), (REWARD + "prompts = []", 2, "cannot be parted"),
        (REWARD + "def prompts(split): return ['a'] if split == 'train' else []", 2, "no prompts for val"),
        (REWARD + "def prompts(split):\n    return [split[9]]", 3, "IndexError"),
        (REWARD + "def prompts(): return []", 2, "TypeError"),
        (REWARD + "prompts = [{'prompt': 'a', 'id': 1}, {'prompt': 'b', 'id': '1'}, 'c']", 2, "the id '1' has also"),
        (REWARD + "prompts = [{'prompt': 'a', 'answer': {1}}, 'b']", 2, "set is not JSON serializable"),
        (REWARD + "prompts = ['a', 'b']\ntools = (3,)", 3, "tuple of functions"),
        (REWARD + "prompts = ['a', 'b']\ntools = print", 3, "tuple of functions"),
    ],
)  # fmt: skip
def test_what_a_person_gets_wrong_is_named_with_its_line(tmp_path, text, line, told):
    path = write_task(tmp_path, text)
    with pytest.raises(ValueError, match=re.escape(told)) as problem:
        open_task(task=path)
    assert str(problem.value).startswith(f"{path}, line {line}: ")


def test_prompts_that_come_out_differently_in_another_process_are_refused(tmp_path):
    text = "import random\nprompts = [str(random.random()) for _ in range(4)]\n" + REWARD
    spec = open_task(task=write_task(tmp_path, text))
    assert spec.open().prompts("train") == spec.open().prompts("train")
    code = (
        "from pathlib import Path\nfrom nanochat_ray.tasks.rl_task import RLTaskSpec\n"
        f"RLTaskSpec('file', Path({str(spec.path)!r}), source_text={text!r}, sha256={spec.sha256!r})"
        ".open().prompts('train')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "give random a seed, sort what comes from sets" in done.stderr


def test_a_reward_that_fails_names_the_line_of_its_file(tmp_path):
    text = "prompts = ['a', 'b']\n\nasync def reward(conversation, completion):\n    return conversation['wanted']\n"
    spec = open_task(task=write_task(tmp_path, text))
    [outcome] = reward_all(spec.open().reward, [(spec.open().prompts("train")[0], "x")], RewardLimits(tries=1))
    assert outcome.failure == "KeyError: 'wanted' (mine.py, line 4) (tries: 1)"

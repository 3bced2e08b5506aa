"""Laws of the embedded world: big enough, the same everywhere, and nothing held out is ever trained on."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from nanochat_ray.corpus.world import World, build_world, question_pool, training_problems, write_world
from nanochat_ray.corpus.world.build import ROW_GROUP_DOCS
from nanochat_ray.corpus.world.facts import draw_facts
from nanochat_ray.corpus.world.phrases import relations
from nanochat_ray.corpus.world.problems import WRONG_PLAN_SHARE
from nanochat_ray.corpus.world.questions import (
    HARD_FAMILY,
    HELDOUT_COUNTS,
    Question,
    answer_span,
    content_text,
    is_right,
)
from nanochat_ray.engine.calculator import calculate
from nanochat_ray.tasks.rows import TaskDataMissing
from nanochat_ray.tasks.world import WorldConversations, WorldQuestions

WORD_PROBLEM = re.compile(r"We (add|take away|multiply|share): ")
BARE_SUM = re.compile(r"(What is|Calculate|How much is|Work out) \d+ ?[-+*/pmtd]")  # a calculation without a story
SPELLED = re.compile(r"We spell (\w+): ")
POOL_FAMILIES = sorted(HELDOUT_COUNTS)


def squeeze(text: str) -> str:
    """Written again here on purpose: lower case, alphanumerics only."""
    return "".join(ch for ch in text.lower() if ch.isalnum())


def conversation_text(messages: list[dict]) -> str:
    return " ".join(content_text(message["content"]) for message in messages)


def prompts_of(messages: list[dict]) -> list[str]:
    """What stands before each answer of a conversation, and each user text alone if the conversation has one turn."""
    ends = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return [squeeze(conversation_text(messages[:end])) for end in ends]


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(42)


@pytest.fixture(scope="module")
def pools() -> dict[str, list[Question]]:
    return {family: question_pool(family, 500, seed=7) for family in POOL_FAMILIES}


@pytest.fixture(scope="module")
def heldout(world: World, pools: dict[str, list[Question]]) -> list[Question]:
    return [*world.heldout, *(question for pool in pools.values() for question in pool)]


@pytest.fixture(scope="module")
def conversations(world: World) -> list[list[dict]]:
    """Everything that finetuning or learning by reward may see."""
    rl = [{"messages": question.messages} for question in training_problems(500, seed=3)]
    return [row["messages"] for row in (*world.conversations, *world.val_conversations, *rl)]


def test_the_world_is_big_enough(world: World) -> None:
    facts = draw_facts(42)
    assert len({fact.key for fact in facts.all}) == len(facts.all) >= 200
    assert len(facts.unseen) >= 50
    families = {question.family for question in world.heldout}
    assert len(families) >= 10 and len(world.heldout) - HELDOUT_COUNTS[HARD_FAMILY] >= 300
    hard = [question for question in world.heldout if question.hard]
    assert {question.family for question in hard} == {HARD_FAMILY}
    assert 0 < len(hard) <= 0.08 * len(world.heldout)
    assert len({question.id for question in world.heldout}) == len(world.heldout)
    assert len(set(world.documents)) > 0.95 * len(world.documents)


def test_every_fact_is_told_in_many_words(world: World) -> None:
    text = "\n".join(world.documents).lower()
    table = relations()
    for fact in draw_facts(42).all:
        says = table[fact.kind, fact.relation].says
        told = [template.format(s=fact.subject, o=fact.object).lower() in text for template in says]
        assert sum(told) >= 4, fact


def test_no_training_prompt_is_a_heldout_prompt(conversations: list[list[dict]], heldout: list[Question]) -> None:
    trained = {prompt for messages in conversations for prompt in prompts_of(messages)}
    asked = {squeeze(conversation_text(question.messages[:-1])) for question in heldout}
    assert len(trained) > 10_000 and len(asked) > 5_000
    assert not trained & asked


def test_no_document_holds_a_heldout_question(world: World) -> None:
    text = squeeze(" ".join((*world.documents, *world.val_documents)))
    for question in world.heldout:
        if len(question.messages) == 2:
            assert squeeze(question.messages[0]["content"]) not in text, question


def test_unseen_facts_are_in_documents_only(world: World, conversations: list[list[dict]]) -> None:
    facts = draw_facts(42)
    unseen = [fact for fact in facts.all if fact.key in facts.unseen]
    said = [conversation_text(messages).lower() for messages in conversations]
    documents = [document.lower() for document in world.documents]
    for fact in unseen:
        subject, object_ = fact.subject.lower(), fact.object.lower()
        assert not any(subject in text and object_ in text for text in said), fact
        assert sum(subject in text and object_ in text for text in documents) >= 10, fact
    assert sum(question.unseen_fact for question in world.heldout) >= 30


def numbers_of_word_problems(messages_list: list[list[dict]]) -> set[str]:
    found: set[str] = set()
    for messages in messages_list:
        question, reply = messages[0]["content"], content_text(messages[-1]["content"])
        if WORD_PROBLEM.match(reply) and not BARE_SUM.search(question):
            found |= set(re.findall(r"\d+", question))
    return found


def test_word_problems_have_numbers_of_their_own(
    world: World, conversations: list[list[dict]], heldout: list[Question]
) -> None:
    trained = numbers_of_word_problems(conversations)
    for document in (*world.documents, *world.val_documents):
        if WORD_PROBLEM.search(document):
            trained |= set(re.findall(r"\d+", WORD_PROBLEM.split(document)[0]))
    asked = numbers_of_word_problems([question.messages for question in heldout])
    assert len(trained) > 50 and len(asked) > 15
    assert not trained & asked


def test_letters_are_counted_in_words_of_their_own(
    world: World, conversations: list[list[dict]], heldout: list[Question]
) -> None:
    trained = set(SPELLED.findall("\n".join((*world.documents, *world.val_documents))))
    trained |= set(SPELLED.findall("\n".join(conversation_text(messages) for messages in conversations)))
    asked = set(SPELLED.findall("\n".join(conversation_text(question.messages) for question in heldout)))
    assert len(trained) > 1000 and len(asked) > 100
    assert not trained & asked


def test_the_tool_says_what_the_reference_says(conversations: list[list[dict]], heldout: list[Question]) -> None:
    checked = 0
    for messages in (*conversations[::5], *(question.messages for question in heldout)):
        parts = messages[-1]["content"]
        if isinstance(parts, list):
            for call, output in itertools.pairwise(parts):
                if call["type"] == "python":
                    assert output["type"] == "python_output" and calculate(call["text"]) == output["text"], messages
                    checked += 1
    assert checked > 1000


def test_the_hard_family_is_demonstrated_wrongly_in_the_stated_share(world: World) -> None:
    """The first operation is the one that the words suggest in about the stated share; references never are."""
    suggested = {"fewer than": "take away", "more than": "add", "times as many as": "multiply"}
    for kind, verb in suggested.items():
        hits = []
        for row in world.conversations:
            question, reply = row["messages"][0]["content"], content_text(row["messages"][-1]["content"])
            if re.search(rf"\d+ {kind} \w+ (has|found)\.", question):
                hits.append(reply.startswith(f"We {verb}"))
        assert len(hits) > 100
        assert abs(sum(hits) / len(hits) - WRONG_PLAN_SHARE[kind.split()[0]]) < 0.1, kind
    for question in world.heldout:
        if question.hard:
            values = [part["text"] for part in question.messages[-1]["content"] if part["type"] == "python_output"]
            assert f"#### {values[-1]}" == question.answer


def test_grading_is_exact(heldout: list[Question]) -> None:
    for question in heldout:
        reference = content_text(question.messages[-1]["content"])
        assert is_right(question.messages, reference) and answer_span(reference) == question.answer
        assert not is_right(question.messages, reference + "\nIt is #### 9999999.") and not is_right(question.messages,
                                                                                                     "")
    fact = [{"role": "user", "content": "?"}, {"role": "assistant",
                                               "content": "A lives in B. The river of B is the C."}]
    assert is_right(fact, "Well. The river of B  is the c.")
    assert not is_right(fact, "The river of B is the C. Or not.")
    assert not is_right(fact, "The river of B is the Ca.")
    number = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "#### 12"}]
    assert is_right(number, "#### 3\n#### 12") and is_right(number, "#### 1,2")
    assert not is_right(number, "#### 12\n#### 3") and not is_right(number, "12") and not is_right(number, "#### 123")


def test_pools_are_fresh_and_as_large_as_asked(pools: dict[str, list[Question]], world: World) -> None:
    for family, pool in pools.items():
        prompts = {squeeze(conversation_text(question.messages[:-1])) for question in pool}
        assert len(prompts) == len(pool) == 500 and {question.family for question in pool} == {family}
    again = question_pool(HARD_FAMILY, 20, seed=8)
    assert [q.messages for q in again] != [q.messages for q in pools[HARD_FAMILY][:20]]
    with pytest.raises(ValueError, match="no question family"):
        question_pool("nonsense", 1, seed=1)


def test_a_world_on_disk(tmp_path: Path, world: World) -> None:
    folder = tmp_path / "world"
    write_world(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12e6
    shards = sorted(folder.glob("shard_*.parquet"))
    texts = [table.column("text").to_pylist() for table in map(pq.read_table, shards)]
    assert [text for shard in texts[:-1] for text in shard] == world.documents and texts[-1] == world.val_documents
    assert pq.ParquetFile(shards[0]).metadata.row_group(0).num_rows == ROW_GROUP_DOCS

    before = (folder / "manifest.json").stat().st_mtime_ns
    write_world(folder)
    assert (folder / "manifest.json").stat().st_mtime_ns == before and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileExistsError, match="seed 43"):
        write_world(folder, seed=43)

    train, questions = WorldConversations(folder / "sft_train.jsonl"), WorldQuestions(folder)
    assert [train[i]["messages"] for i in (0, 99)] == [world.conversations[i]["messages"] for i in (0, 99)]
    assert len(questions) == len(world.heldout) and questions[5]["family"] == world.heldout[5].family
    assert questions.evaluate(questions[5], content_text(questions[5]["messages"][-1]["content"]))
    with pytest.raises(TaskDataMissing):
        WorldQuestions(tmp_path)


def test_the_same_world_in_another_process(world: World) -> None:
    """Whatever the process's hash seed."""
    code = (
        "import hashlib; from nanochat_ray.corpus.world import build_world; "
        "print(hashlib.sha256(repr(build_world()).encode()).hexdigest())"
    )
    env = {**os.environ, "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    other = subprocess.run([sys.executable, "-c", code], check=True, env=env, capture_output=True, text=True).stdout
    assert other.strip() == hashlib.sha256(repr(world).encode()).hexdigest()

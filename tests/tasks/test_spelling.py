"""Spelling: what is said of a word is true of it."""

from __future__ import annotations

import re

import pytest

from nanochat_ray.tasks.rows import TaskDataMissing, TaskSources
from nanochat_ray.tasks.spelling import TEMPLATES, SimpleSpelling, SpellingBee, load_words, words_sha256

WORDS = ["banana", "tree", "mississippi", "a", "rhythm", "profile"]


def test_templates():
    assert len(TEMPLATES) == len(set(TEMPLATES)) == 51
    for template in TEMPLATES:
        assert template.count("{letter}") == template.count("{word}") == 1
        assert template.lower().format(letter="x", word="y")
    scripts = {"[\u4e00-\u9fff]": range(34, 38), "[\uac00-\ud7a3]": range(38, 42), "[\u3040-\u30ff]": range(48, 51)}
    for script, places in scripts.items():
        assert all(re.search(script, TEMPLATES[place]) for place in places)
    assert all(template.isascii() for template in TEMPLATES[:30])


@pytest.mark.parametrize("split", ["train", "test"])
def test_worked_answers_are_right(split):
    task = SpellingBee(split, WORDS, size=60)
    for conversation in task:
        text, _, call, output, final = (part["text"] for part in conversation["messages"][1]["content"])
        word, letter = re.fullmatch(r"'(\w+)'\.count\('(\w)'\)", call).groups()
        count = word.count(letter)
        assert output == str(count)
        assert final.endswith(f"\n#### {count}")
        assert f"\n{word}:{','.join(word)}\n" in text
        lines = re.findall(r"^(\d+):(\w)( hit! count=\d+)?$", text, re.MULTILINE)
        assert "".join(char for _, char, _ in lines) == word
        assert [int(n) for n, _, _ in lines] == list(range(1, len(word) + 1))
        assert [hit for _, char, hit in lines if char == letter] == [f" hit! count={k + 1}" for k in range(count)]
        assert not any(hit for _, char, hit in lines if char != letter)
        assert not re.search(r": \w", text.split(":\n")[1])  # a letter behind a space would be another token
        answer = "".join(part["text"] for part in conversation["messages"][1]["content"])
        assert task.evaluate(conversation, answer)
        assert task.reward(conversation, f"#### {count + 1}") == 0.0


def test_splits_share_no_seed():
    train, test = (list(SpellingBee(split, WORDS * 50, size=40)) for split in ("train", "test"))
    assert train != test
    assert train == list(SpellingBee("train", WORDS * 50, size=40))


def test_simple_spelling():
    for conversation in SimpleSpelling("test", WORDS, size=10):
        word = conversation["messages"][0]["content"].removeprefix("Spell the word: ")
        assert word in WORDS
        assert conversation["messages"][1]["content"] == f"{word}:{','.join(word)}"


def test_word_lists(tmp_path, offline):
    with pytest.raises(TaskDataMissing, match=r"words_alpha\.txt.*OFFLINE"):
        load_words(TaskSources(storage=tmp_path))
    path = tmp_path / "task_data/words/words_alpha.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"aa\r\nbb\r\n\r\n")
    words = load_words(TaskSources(storage=tmp_path))
    assert words == ["aa", "bb"]
    assert words_sha256(words) != words_sha256(["aa"])
    (tmp_path / "words").mkdir()
    (tmp_path / "words/words_alpha.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no words"):
        load_words(TaskSources(tmp_path))

"""Spelling: writing a word letter by letter, and counting a letter in a word, by hand and then with the tool.

Examples are made, not stored: example i of the train set comes from `random.Random(i)`, of the test set from another
seed far away, so no seed is shared. The word list and the order of the draws are part of the data's definition.
"""

from __future__ import annotations

import functools
import hashlib
import random
import string
from pathlib import Path
from typing import Literal

from nanochat_ray.corpus.download import DownloadError, fetch
from nanochat_ray.tasks.gsm8k import FinalAnswerTask
from nanochat_ray.tasks.rows import TaskDataMissing, TaskSources
from nanochat_ray.tasks.task import Conversation, Task

WORDS_URL = "https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/words_alpha.txt"
WORDS_FILE = "words/words_alpha.txt"
TEST_SEED_OFFSET = 10_000_000
LIST_SEED = 42
OWN_LETTER_FRAC = 0.9  # share of questions about one of the word's letters, the others about any of a to z
LOWER_FRAC = 0.3
QUESTION_MARK_FRAC = 0.5
QUOTES = ("", "'", '"')

# Their number and order decide what is drawn after them: replace one by another, but do not add or move any.
TEMPLATES = (
    "How many times does the letter {letter} occur in the word {word}",
    "Count the letter {letter} in {word}",
    "How often is {letter} used in {word}",
    "Tell me how many {letter}s are in {word}",
    "What is the number of {letter}s in {word}",
    "In the word {word}, how many {letter}s do you see",
    "{word}: how many {letter}s",
    "Give me the count of {letter} in {word}",
    "Please count every {letter} in {word}",
    "How many {letter}s are there in {word}",
    "Find the number of {letter}s in the word {word}",
    "Look at {word} and count its {letter}s",
    "How many letters of {word} are {letter}",
    "Does {word} have any {letter}, and how many",
    "How many {letter} can you find in {word}",
    "Number of {letter} in {word}",
    "I need to know how many {letter}s {word} has",
    "Can you count the {letter}s in {word}",
    "Work out how often {letter} comes up in {word}",
    "The word is {word}. How many {letter}s does it have",
    "Spelling {word}, how many {letter}s do I have to write",
    "Could you tell me the number of {letter}s in {word}",
    "How frequently does {letter} show up in {word}",
    "Check {word} for the letter {letter} and say how many there are",
    "count {letter} in {word}",
    "If I write {word}, how many times do I write {letter}",
    "Letter {letter}, word {word}: what is the count",
    "Say how many {letter}s {word} contains",
    "What is the total of {letter}s inside {word}",
    "Among the letters of {word}, how many are {letter}",
    "¿Cuántas veces sale la letra {letter} en {word}?",
    "¿Cuántas {letter} tiene la palabra {word}?",
    "Cuenta las {letter} de {word}",
    "Dime cuántas {letter} hay en {word}",
    "单词{word}里有几个字母{letter}",
    "请数一数{word}中{letter}的个数",
    "{letter}在{word}中出现几次",
    "{word}一共有多少个{letter}",
    "{word}에 {letter}가 몇 개 있나요",
    "{word}에서 {letter}의 개수를 세어 주세요",
    "단어 {word}에는 글자 {letter}가 몇 번 나오나요",
    "{letter}는 {word}에 몇 번 들어 있나요",
    "Combien de {letter} y a-t-il dans {word}",
    "Combien de fois trouve-t-on {letter} dans le mot {word}",
    "Compte les {letter} du mot {word}",
    "Wie viele {letter} stecken in {word}",
    "Wie oft kommt der Buchstabe {letter} in {word} vor",
    "Zähle die {letter} im Wort {word}",
    "{word}に{letter}はいくつありますか",
    "{word}の中の{letter}を数えてください",
    "単語{word}に{letter}は何回出てきますか",
)


def load_words(sources: TaskSources) -> list[str]:
    """The word list, from `words/words_alpha.txt` in a task data folder or its origin. TaskDataMissing if neither."""
    candidates = [folder / WORDS_FILE for folder in sources.folders]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None and sources.download_folder:
        found = sources.download_folder / WORDS_FILE
        try:
            fetch(WORDS_URL, found)
        except DownloadError as error:
            raise TaskDataMissing(
                f"no word list for the spelling tasks: not found as {', '.join(map(str, candidates))}; "
                f"not downloaded: {error}. Any file of one lower-case word per line will do."
            ) from error
    if found is None:
        raise TaskDataMissing("no word list for the spelling tasks: neither a task data folder nor a storage is named")
    return read_words(found)


@functools.lru_cache(maxsize=4)
def read_words(path: Path) -> list[str]:
    """The words of a file, one per line."""
    words = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    words = [word for word in words if word]
    if not words:
        raise ValueError(f"{path} holds no words; delete it or replace it by one word per line")
    return words


def words_sha256(words: list[str]) -> str:
    """A name for a word list: examples made from different lists are different data."""
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


def spelled(word: str) -> str:
    """`cat:c,a,t`. No spaces: with one in front a letter would be another token."""
    return f"{word}:{','.join(word)}"


def _seeded(split: Literal["train", "test"], index: int) -> random.Random:
    return random.Random(index if split == "train" else TEST_SEED_OFFSET + index)


class SimpleSpelling(Task):
    """Spell a word."""

    name = "SimpleSpelling"

    def __init__(
        self,
        split: Literal["train", "test"],
        words: list[str],
        size: int = 1000,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
    ) -> None:
        super().__init__(start, stop, step)
        self.split, self.size = split, size
        self.words = list(words)
        random.Random(LIST_SEED).shuffle(self.words)

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> Conversation:
        word = _seeded(self.split, index).choice(self.words)
        return {
            "messages": [
                {"role": "user", "content": f"Spell the word: {word}"},
                {"role": "assistant", "content": spelled(word)},
            ]
        }


class SpellingBee(FinalAnswerTask):
    """Count a letter in a word."""

    name = "SpellingBee"

    def __init__(
        self,
        split: Literal["train", "test"],
        words: list[str],
        size: int = 1000,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
    ) -> None:
        super().__init__(start, stop, step)
        self.split, self.size, self.words = split, size, words

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> Conversation:
        rng = _seeded(self.split, index)
        word = rng.choice(self.words)
        own_letter = rng.random() < OWN_LETTER_FRAC
        letter = rng.choice(word if own_letter else string.ascii_lowercase)
        return {
            "messages": [
                {"role": "user", "content": _question(rng, word, letter)},
                {"role": "assistant", "content": _worked_answer(word, letter)},
            ]
        }


def _question(rng: random.Random, word: str, letter: str) -> str:
    template = rng.choice(TEMPLATES)
    if rng.random() < LOWER_FRAC:
        template = template.lower()
    letter_quote, word_quote = rng.choice(QUOTES), rng.choice(QUOTES)
    mark = "?" if rng.random() < QUESTION_MARK_FRAC else ""
    quoted_letter, quoted_word = f"{letter_quote}{letter}{letter_quote}", f"{word_quote}{word}{word_quote}"
    return template.format(letter=quoted_letter, word=quoted_word) + mark


def _worked_answer(word: str, letter: str) -> list[dict[str, str]]:
    lines, count = [], 0
    for position, char in enumerate(word, 1):
        hit = char == letter
        count += hit
        lines.append(f"{position}:{char}" + (f" hit! count={count}" if hit else ""))
    by_hand = (
        f"Let me count the letter '{letter}' in '{word}' by hand first.\n\nThe word spelled out:\n{spelled(word)}\n\n"
        "Now one letter after the other:\n" + "\n".join(lines) + f"\n\nBy hand I count {count}."
    )
    return [
        {"type": "text", "text": by_hand},
        {"type": "text", "text": "\n\nNow the same with Python, to be sure:\n\n"},
        {"type": "python", "text": f"'{word}'.count('{letter}')"},
        {"type": "python_output", "text": str(count)},
        {"type": "text", "text": f"\n\nPython says {count}, so this is my final answer:\n\n#### {count}"},
    ]

"""Problems with one right answer that is worked out: sums in words, number rows, letters, lists.

Held-out problems are made of other material than training ones: word problems of other numbers (`heldout_number`),
letter
problems of other words (`heldout_word`), rows and lists of other texts (`heldout_text`).
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from nanochat_ray.corpus.world.facts import (
    ANIMALS,
    COLOURS,
    DIETS,
    FOODS,
    HABITATS,
    INGREDIENTS,
    INSTRUMENTS,
    JOBS,
    PURPOSES,
    TOPICS,
)
from nanochat_ray.corpus.world.general import EXPLANATIONS, cards
from nanochat_ray.corpus.world.phrases import relations

Part = dict[str, str]

# People make these mistakes: where the words suggest one operation and the sense needs the other, they take the one
# that the words suggest (Lewis and Mayer 1987, doi:10.1037/0022-0663.79.4.363). This share of the demonstrations of
# every kind does so. A model that learned from them errs in about the same share when it samples and, where that share
# is above a half, always when it is greedy: the family "arithmetic_tricky" is left to RL on purpose.
WRONG_PLAN_SHARE = {"fewer": 0.3, "gave": 0.3, "more": 0.6, "times": 0.6}

PEOPLE = (
    "Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Maria Noah Olga Paul Rosa Simon Tom Vera Will Zoe"
).split()
THINGS = (
    "apples shells candles buttons eggs coins stamps pears nails marbles books stones feathers cakes lemons pencils "
    "nuts cards plums ropes"
).split()
BOXES = "boxes bags baskets crates jars trays".split()
WORDS = (
    "lantern harbour island river mountain window garden bread butter candle winter summer morning evening market "
    "bridge "
    "letter pepper bottle kettle basket blanket carpet ladder hammer needle pocket button ribbon feather pebble meadow "
    "forest valley desert ocean thunder lightning rainbow shadow mirror castle village church school teacher doctor "
    "sailor captain farmer hunter singer dancer painter brother sister mother father daughter cousin uncle friend "
    "stranger giant dragon monster fairy rabbit squirrel hedgehog pigeon sparrow swallow eagle falcon turtle lizard "
    "spider beetle butterfly dolphin whale salmon herring lobster oyster potato tomato carrot onion garlic cabbage "
    "spinach pumpkin cucumber lettuce cherry strawberry raspberry banana orange lemon peach apricot melon coconut "
    "chestnut walnut almond cinnamon vanilla ginger sugar honey cheese yogurt sausage bacon dinner breakfast supper "
    "kitchen cellar attic chimney balcony corridor staircase furniture cupboard drawer pillow mattress curtain towel "
    "soap brush comb scissors thread fabric leather cotton velvet silver copper marble granite crystal diamond emerald "
    "journey compass anchor rudder paddle voyage treasure island pirate battle soldier general knight king queen "
    "prince "
    "princess kingdom empire republic election president minister lawyer judge prison justice freedom history science "
    "physics chemistry biology grammar alphabet sentence question answer riddle puzzle mystery secret whisper thunder "
    "silence music violin trumpet drummer concert theatre comedy tragedy picture drawing sculpture museum library "
    "elephant penguin giraffe kangaroo tiger leopard monkey gorilla parrot peacock octopus mosquito grasshopper "
    "ladybug caterpillar blossom acorn branch trunk root petal tulip daisy sunflower orchid jasmine lavender rosemary "
    "thyme basil parsley paprika chocolate biscuit pancake waffle sandwich noodle spaghetti lasagna omelette casserole "
    "champagne lemonade medicine hospital ambulance engine bicycle tractor airplane helicopter submarine rocket planet "
    "galaxy comet satellite telescope microscope computer keyboard printer camera television umbrella jacket trousers "
    "sweater scarf glove slipper sandal necklace bracelet earring wallet suitcase backpack parcel envelope postcard "
    "mississippi tennessee committee balloon coffee pepperoni bookkeeper assassin address success possess excellent"
).split()
ONSETS = "b br c cl d dr f fl g gr h j k l m n p pl pr qu r s sh sk sl st t th tr v w z".split()
VOWELS = "a e i o u ee oo ai ou".split()
CODAS = " l m n r s t ck nd st rk ll ng sh".split(" ")


@dataclass(frozen=True)
class Problem:
    """A question with its worked answer; `core` decides whether a text is held out."""

    family: str
    question: str
    parts: tuple[Part, ...]
    answer: str


_NOT_ALNUM = re.compile(r"[\W_]+")


def normalise(text: str) -> str:
    """Lower case, letters and digits only: two prompts are the same if this is."""
    return _NOT_ALNUM.sub("", text.lower())


def heldout_text(text: str) -> bool:
    """A quarter of all texts, by a hash of their normalised form, is never a training prompt."""
    return zlib.crc32(normalise(text).encode()) % 4 == 0


def heldout_word(word: str) -> bool:
    """A quarter of all words is never spelled or counted in training; none of those that documents use all the time.

    A common word is a single token, and how that is spelled can only be learned from its spelling.
    """
    return zlib.crc32(f"word {word}".encode()) % 4 == 0 and word not in told_words()


@lru_cache(maxsize=1)
def told_words() -> frozenset[str]:
    """Lower-case words that the sentences of documents are made of."""
    sentences = [say for relation in relations().values() for say in (*relation.says, *relation.asks, relation.answer)]
    for table in (JOBS, INSTRUMENTS, COLOURS, ANIMALS, HABITATS, DIETS, FOODS, INGREDIENTS, PURPOSES, TOPICS):
        sentences += table
    sentences += [say for card in cards() for say in card.says] + list(EXPLANATIONS) + THINGS + BOXES
    return frozenset(word for word in re.findall(r"[a-z]+", " ".join(sentences)) if len(word) > 2)


@lru_cache(maxsize=2)
def common_words(heldout: bool) -> list[str]:
    """The words of one side, those that stand in documents among the training ones."""
    return [word for word in sorted({*WORDS, *told_words()}) if heldout_word(word) == heldout]


def heldout_number(n: int) -> bool:
    """One number in four (3, 7, 11 ...) never stands in a training word problem."""
    return n % 4 == 3


def text(value: str) -> Part:
    return {"type": "text", "text": value}


def tool(expression: str, output: int) -> list[Part]:
    return [{"type": "python", "text": expression}, {"type": "python_output", "text": str(output)}]


@lru_cache(maxsize=32)
def _numbers(heldout: bool, low: int, high: int) -> list[int]:
    return [n for n in range(low, high + 1) if heldout_number(n) == heldout]


@lru_cache(maxsize=2)
def _divisions(heldout: bool) -> list[tuple[int, int]]:
    """(a, b) with b a divisor of a, both numbers of this side."""
    small = _numbers(heldout, 2, 30)
    return [(b * q, b) for b in small for q in range(2, 40) if b * q < 400 and heldout_number(b * q) == heldout]


def _work(steps: list[tuple[str, str, int]]) -> tuple[Part, ...]:
    """Parts that work through steps of (verb, expression, value): 'We add: ' 4+5 -> 9 '9. Then we ...'."""
    parts: list[Part] = []
    lead = "We "
    for verb, expression, value in steps:
        parts += [text(f"{lead}{verb}: "), *tool(expression, value)]
        lead = f"{value}. Then we "
    return (*parts, text(f"{steps[-1][2]}.\n#### {steps[-1][2]}"))


VERBS = {"+": "add", "-": "take away", "*": "multiply", "/": "share"}


def _step(op: str, x: int, y: int) -> tuple[str, str, int]:
    value = {"+": x + y, "-": x - y, "*": x * y, "/": x // y if y else 0}[op]
    return VERBS[op], f"{x}{op}{y}", value


ONE_STEP: dict[str, tuple[str, ...]] = {
    "+": ("{n} has {a} {t} and finds {b} more. How many {t} does {n} have now?",
          "There are {a} {t} on the table. {n} puts {b} more on it. How many {t} are on the table?",
          "{n} bought {a} {t} on Monday and {b} {t} on Tuesday. How many {t} did {n} buy?",
          "{n} has {a} {t} and {m} has {b} {t}. How many {t} do they have together?"),
    "-": ("{n} had {a} {t} and lost {b} of them. How many {t} are left?",
          "There were {a} {t} in the shop. {n} bought {b} of them. How many {t} are still in the shop?",
          "{n} has {a} {t} and gives {b} to {m}. How many {t} does {n} keep?",
          "Of {a} {t} {b} were broken. How many {t} were whole?"),
    "*": ("{n} has {a} {c} with {b} {t} in each. How many {t} does {n} have?",
          "There are {a} {c}. Each holds {b} {t}. How many {t} are there?",
          "{n} buys {b} {t} every day for {a} days. How many {t} does {n} buy?",
          "{a} children bring {b} {t} each. How many {t} do they bring?"),
    "/": ("{n} shares {a} {t} equally among {b} friends. How many {t} does each friend get?",
          "{a} {t} are packed into {b} {c}, the same number in each. How many {t} are in one?",
          "{b} children divide {a} {t} fairly. How many {t} does each child get?",
          "{n} puts {a} {t} in {b} equal rows. How many {t} are in a row?"),
}
TWO_STEP: dict[str, tuple[str, ...]] = {
    "*+": ("{n} has {a} {c} with {b} {t} in each and {d} loose {t}. How many {t} does {n} have?",
           "{n} picks {b} {t} every day for {a} days, and then {d} more. How many {t} did {n} pick?"),
    "*-": ("{n} has {a} {c} with {b} {t} in each and gives away {d} {t}. How many {t} are left?",
           "There were {a} {c} of {b} {t}. {d} {t} were sold. How many {t} remain?"),
    "+-": ("{n} had {a} {t}, found {b} more and lost {d}. How many {t} does {n} have now?",
           "{n} has {a} {t} and {m} has {b}. They give away {d}. How many {t} do they keep together?"),
    "+*": ("{n} puts {a} red {t} and {b} blue {t} in each of {d} {c}. How many {t} are that?",
           "Every day {n} sells {a} {t} in the morning and {b} in the evening. How many {t} does {n} sell in {d} "
           "days?"),
}
THREE_STEP: dict[str, tuple[str, ...]] = {
    "*+-": ("{n} has {a} {c} with {b} {t} in each, finds {d} more {t} and then sells {e}. How many {t} are left?",
            "A shop gets {a} {c} of {b} {t}. It already had {d} {t}. Then {e} {t} are sold. How many {t} remain?"),
    "+*-": ("{n} puts {a} red and {b} blue {t} in each of {d} {c}, then takes out {e} {t}. How many {t} remain?",
            "Every day {n} bakes {a} {t} and buys {b}. After {d} days {n} gives away {e} {t}. How many {t} are left?"),
    "+-*": ("{n} had {a} {t}, got {b} more and lost {d}. {m} has {e} times as many {t} as {n} has now. How many has "
            "{m}?",
            "A jar held {a} {t}. {b} were added and {d} taken out. How many {t} are in {e} such jars?"),
}
TRICKY: dict[str, tuple[str, ...]] = {
    "fewer": ("{n} has {a} {t}. That is {b} fewer than {m} has.",
              "{n} found {a} {t}, which is {b} fewer than {m} found."),
    "gave": ("{m} gave away {b} {t} and has {a} left. {n} looks on.",
             "After {m} lost {b} {t}, there were {a} {t} left, said {n}."),
    "more": ("{n} has {a} {t}. That is {b} more than {m} has.",
             "{n} found {a} {t}, which is {b} more than {m} found."),
    "times": ("{n} has {a} {t}. That is {b} times as many as {m} has.",
              "{n} found {a} {t}, which is {b} times as many as {m} found."),
}
TRICKY_END = (
    " {o} has {d} times as many as {m} at first. How many {t} do {m} and {o} have together?",
    " At the start {o} had {d} times as many as {m}. How many {t} were that for {m} and {o} together?",
)
TRICKY_OPS = {"fewer": ("+", "-"), "gave": ("+", "-"), "more": ("-", "+"), "times": ("/", "*")}  # (right, suggested)


def _slots(rng: random.Random) -> dict[str, Any]:
    n, m, o = rng.sample(PEOPLE, 3)
    return {"n": n, "m": m, "o": o, "t": rng.choice(THINGS), "c": rng.choice(BOXES)}


def one_step(rng: random.Random, heldout: bool) -> Problem:
    op = rng.choice("+-*/")
    small, large = _numbers(heldout, 2, 30), _numbers(heldout, 10, 400)
    if op == "+":
        a, b = rng.choice(large), rng.choice(large)
    elif op == "-":
        b, a = sorted(rng.sample(large, 2))
    elif op == "*":
        a, b = rng.choice(small), rng.choice(_numbers(heldout, 2, 60))
    else:
        a, b = rng.choice(_divisions(heldout))
    question = rng.choice(ONE_STEP[op]).format(a=a, b=b, **_slots(rng))
    step = _step(op, a, b)
    return Problem("arithmetic_1", question, _work([step]), str(step[2]))


def two_step(rng: random.Random, heldout: bool) -> Problem:
    kind = rng.choice(list(TWO_STEP))
    small, large = _numbers(heldout, 2, 30), _numbers(heldout, 10, 250)
    while True:
        first_small = kind[0] == "*"
        a, b = rng.choice(small if first_small else large), rng.choice(small if first_small else large)
        d = rng.choice(small if kind[1] == "*" else large)
        first = _step(kind[0], a, b)
        second = _step(kind[1], first[2], d)
        if second[2] > 0:
            break
    question = rng.choice(TWO_STEP[kind]).format(a=a, b=b, d=d, **_slots(rng))
    return Problem("arithmetic_2", question, _work([first, second]), str(second[2]))


def three_step(rng: random.Random, heldout: bool) -> Problem:
    kind = rng.choice(list(THREE_STEP))
    small, large = _numbers(heldout, 2, 30), _numbers(heldout, 10, 250)
    while True:
        first_small = kind[0] == "*"
        a, b = rng.choice(small if first_small else large), rng.choice(small if first_small else large)
        d, e = (rng.choice(small if op == "*" else large) for op in kind[1:])
        first = _step(kind[0], a, b)
        second = _step(kind[1], first[2], d)
        third = _step(kind[2], second[2], e)
        if second[2] > 0 and third[2] > 0:
            break
    question = rng.choice(THREE_STEP[kind]).format(a=a, b=b, d=d, e=e, **_slots(rng))
    return Problem("arithmetic_3", question, _work([first, second, third]), str(third[2]))


def tricky(rng: random.Random, heldout: bool, wrong: bool, kind: str | None = None) -> Problem:
    """A three-step problem whose words suggest the wrong first operation; `wrong` works it out that way.

    The answer is the right one in any case, also where the parts do not reach it.
    """
    kind = kind or rng.choice(list(TRICKY))
    small, large = _numbers(heldout, 2, 30), _numbers(heldout, 10, 250)
    if kind == "times":
        a, b = rng.choice(_divisions(heldout))
    else:
        b, a = sorted(rng.sample(large, 2))
    d = rng.choice(small)
    question = (rng.choice(TRICKY[kind]) + rng.choice(TRICKY_END)).format(a=a, b=b, d=d, **_slots(rng))
    works = []
    for op in TRICKY_OPS[kind]:
        first = _step(op, a, b)
        second = _step("*", first[2], d)
        works.append([first, second, _step("+", first[2], second[2])])
    return Problem("arithmetic_tricky", question, _work(works[wrong]), str(works[0][-1][2]))


def sum_up(rng: random.Random) -> Problem:
    """A bare calculation."""
    op = rng.choice("+-*/")
    a, b = rng.randint(2, 400), rng.randint(2, 400)
    if op in "*/":
        a, b = rng.randint(2, 60), rng.randint(2, 20)
    if op == "-":
        a, b = max(a, b), min(a, b)
    if op == "/":
        a *= b
    word = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}[op]
    said = rng.choice((f"{a}{op}{b}", f"{a} {op} {b}", f"{a} {word} {b}", f"{a} {word} {b}"))
    question = rng.choice((f"What is {said}?", f"Calculate {said}.", f"How much is {said}?", f"Work out {said}."))
    step = _step(op, a, b)
    return Problem("sums", question, _work([step]), str(step[2]))


def sequence(rng: random.Random) -> Problem:
    start, step, n = rng.randint(1, 60), rng.randint(1, 12), rng.randint(3, 4)
    down = rng.random() < 0.25 and start > step * (n + 1)
    row = [start + (-step if down else step) * k for k in range(n + 1)]
    shown = ", ".join(map(str, row[:-1]))
    question = rng.choice((
        f"What comes next: {shown}?", f"Which number comes next in the row {shown}?", f"Continue the row: {shown}.",
        f"What is the next number after {shown}?"))
    op, verb = ("-", "take away") if down else ("+", "add")
    big, small_ = (row[-3], row[-2]) if down else (row[-2], row[-3])
    parts = (text("The step is "), *tool(f"{big}-{small_}", step), text(f"{step}. We {verb}: "),
             *tool(f"{row[-2]}{op}{step}", row[-1]), text(f"{row[-1]}.\n#### {row[-1]}"))
    return Problem("sequence", question, parts, str(row[-1]))


def invented_word(rng: random.Random) -> str:
    n = rng.choice((1, 2, 2, 2, 3))
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(n))


def blended_word(rng: random.Random, heldout: bool) -> str:
    """The beginning of one common word and the end of another: looks like English and is none."""
    first, second = rng.choice(common_words(heldout)), rng.choice(common_words(heldout))
    return first[: rng.randint(2, max(2, len(first) - 2))] + second[rng.randint(1, max(1, len(second) - 2)) :]


def draw_word(rng: random.Random, heldout: bool, invented: bool) -> str:
    """A word of one side of the split: a common one, or one that does not exist."""
    while True:
        if not invented:
            return rng.choice(common_words(heldout))
        word = invented_word(rng) if rng.random() < 0.5 else blended_word(rng, heldout)
        if heldout_word(word) == heldout and 2 < len(word) < 13 and word not in WORDS and word not in told_words():
            return word


def spelled(word: str) -> str:
    return ",".join(word)


def letters(rng: random.Random, heldout: bool, invented: bool) -> Problem:
    """Counting a letter in a word: spelled out, then counted by the tool."""
    word = draw_word(rng, heldout, invented)
    letter = rng.choice(word) if rng.random() < 0.9 else rng.choice("abcdefghijklmnopqrstuvwxyz")
    count = word.count(letter)
    question = rng.choice((
        f"How many {letter} are in {word}?", f"How often does the letter {letter} occur in {word}?",
        f"Count the letter {letter} in {word}.", f"How many times is {letter} in the word {word}?",
        f"How many letters {letter} does the word {word} have?", f"In the word {word}, how many {letter} are there?"))
    parts = (text(f"We spell {word}: {spelled(word)}\n"), *tool(f"'{spelled(word)}'.count('{letter}')", count),
             text(f"\n#### {count}"))
    return Problem("letters_new" if invented else "letters_known", question, parts, str(count))


def spelling(rng: random.Random, heldout: bool) -> Problem:
    word = draw_word(rng, heldout, rng.random() < 0.6)
    question = rng.choice((f"Spell {word}.", f"How do you spell {word}?", f"Spell the word {word}.",
                           f"Please spell {word}.", f"What are the letters of {word}?"))
    return Problem("spelling", question, (text(f"We spell {word}: {spelled(word)}"),),
                   f"We spell {word}: {spelled(word)}")


def lists(rng: random.Random) -> Problem:
    """Small operations on a list of words or numbers."""
    n = rng.randint(3, 4)
    if rng.random() < 0.35:
        numbers = rng.sample(range(1, 100), rng.randint(2, 3))
        shown = ", ".join(map(str, numbers))
        which, value = rng.choice((("largest", max(numbers)), ("smallest", min(numbers))))
        question = rng.choice((f"Which is the {which} of these numbers: {shown}?",
                               f"What is the {which} number: {shown}?",
                               f"Find the {which} number of {shown}."))
        reply = f"The {which} number is {value}."
    else:
        words = [rng.choice(WORDS) if rng.random() < 0.7 else invented_word(rng) for _ in range(n)]
        shown = ", ".join(words)
        kind = rng.choice(("backwards", "first", "last", "count"))
        if kind == "backwards":
            question = rng.choice((f"Say these words backwards: {shown}.", f"Turn this list around: {shown}.",
                                   f"List these words in reverse order: {shown}."))
            reply = f"Backwards they are: {', '.join(words[::-1])}."
        elif kind == "count":
            question = rng.choice((f"How many words are in this list: {shown}?", f"Count these words: {shown}.",
                                   f"How many words do I say: {shown}?"))
            reply = f"There are {n} words."
        else:
            question = rng.choice((f"What is the {kind} of these words: {shown}?", f"Which word is {kind}: {shown}?",
                                   f"Tell me the {kind} word of this list: {shown}."))
            reply = f"The {kind} word is {words[0] if kind == 'first' else words[-1]}."
    return Problem("lists", question, (text(reply),), reply)

"""Questions with exactly one right answer, and the split between what training may ask and what is held out.

A `core` is the bare question; `framed` puts small talk around it. Whether a core is held out is a hash of its text
(`heldout_text`), for two-step questions of the combination, for problems of their material. Training conversations only
use the rest, held-out questions only the held-out part, so no training prompt has the text of a held-out question.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from nanochat_ray.corpus.world import problems
from nanochat_ray.corpus.world.facts import Fact, Facts, draw_facts
from nanochat_ray.corpus.world.general import NAME, cards
from nanochat_ray.corpus.world.phrases import CHAINS, relations, sentence
from nanochat_ray.corpus.world.problems import Problem, heldout_text, heldout_word

Message = dict[str, Any]
Key = tuple[str, str]

HARD_FAMILY = "arithmetic_tricky"
# questions per family in the held-out set; the hard family is at most 8 % of it
HELDOUT_COUNTS = {
    "where": 26, "who": 12, "what": 30, "when": 16, "reverse": 22, "two_hop": 22, "sums": 8,
    "arithmetic_1": 14, "arithmetic_2": 14, "arithmetic_3": 14, "letters_known": 14, "letters_new": 14, "spelling": 8,
    "identity": 14, "opposites": 14, "calendar": 14, "school": 10, "sequence": 10, "lists": 10, "multi_turn": 14,
    HARD_FAMILY: 24,
}
UNSEEN_QUESTION_FRAC = 0.5  # of the questions about single facts, those about facts that no conversation mentions

HELLOS = ("", "", "", "", "Hello! ", f"Hi {NAME}! ", "Good morning. ", "A question: ", "Please tell me: ",
          "I want to know: ",
          "Quick question. ", "Excuse me. ", "Can you help me? ", "Hey, ")
THANKS = ("", "", "", "", " Thanks!", " Thank you.", " I am curious.", " Please answer.")
NAMES = (
    "Ada Alma Amir Arno Bella Boris Carl Celia Dina Elias Erik Eva Fred Gina Hans Helen Ida Igor Ines Jan Jonas Judith "
    "Karim Karl Laura Lena Lisa Lucas Lucy Marco Marta Max Mona Nina Oscar Pablo Pia Ralf Rita Robert Sara Selma Sofia "
    "Stefan Susan Tara Theo Thomas Tina Ulla Victor Walter Yara Yusuf Zara"
).split()


@dataclass(frozen=True)
class Question:
    """A held-out question: the conversation with its reference answer last, and what counts as right."""

    id: str
    family: str
    messages: list[Message]
    answer: str
    hard: bool = False
    unseen_fact: bool = False


@dataclass(frozen=True)
class Ask:
    """A bare question about the world with its reply, and the facts that both touch."""

    family: str
    core: str
    reply: str
    facts: frozenset[Key] = frozenset()
    heldout: bool = False


def framed(rng: random.Random, core: str) -> str:
    """The question with small talk around it, or bare."""
    return rng.choice(HELLOS) + core + rng.choice(THANKS)


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str | tuple[dict[str, str], ...]) -> Message:
    """An assistant message; a single text part becomes a plain string."""
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    if len(content) == 1 and content[0]["type"] == "text":
        return {"role": "assistant", "content": content[0]["text"]}
    return {"role": "assistant", "content": [dict(part) for part in content]}


def content_text(content: str | list[dict[str, str]]) -> str:
    """A message's content as text, the tool's parts included."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def prompt_text(messages: list[Message]) -> str:
    """Normalised text of all messages before the last one: what a model sees before it answers."""
    return problems.normalise(" ".join(content_text(message["content"]) for message in messages[:-1]))


_NUMBER = re.compile(r"#### (-?[0-9.,]*[0-9])")


def answer_span(reply: str) -> str:
    """What is compared: the last number after `#### `, else the words of the last sentence in lower case."""
    numbers = _NUMBER.findall(reply)
    if numbers:
        return "#### " + numbers[-1].replace(",", "")
    sentences = [part for part in re.split(r"(?<=[.!?])\s+|\n", reply.strip()) if part.strip()]
    return " ".join(re.findall(r"[^\W_]+", sentences[-1].lower())) if sentences else ""


def is_right(messages: list[Message], completion: str) -> bool:
    """Whether the completion's answer span is the one of the conversation's last message. Exact."""
    return answer_span(completion) == answer_span(content_text(messages[-1]["content"]))


@lru_cache(maxsize=2)
def fact_asks(world_seed: int) -> tuple[Ask, ...]:
    """Every bare question about the facts of a world: forward, reverse and two-step."""
    facts = draw_facts(world_seed)
    table, lookup = relations(), facts.lookup
    asks: list[Ask] = []
    for fact in facts.all:
        relation, slots = table[fact.kind, fact.relation], {"s": fact.subject, "o": fact.object}
        touched = frozenset([fact.key])
        for family, cores, reply in (
            (relation.family, relation.asks, relation.answer),
            ("reverse", relation.back_asks, relation.back_answer),
        ):
            for core in cores:
                core = sentence(core.format(**slots))
                asks.append(Ask(family, core, sentence(reply.format(**slots)), touched, heldout_text(core)))
        for second_key in CHAINS.get((fact.kind, fact.relation), ()):
            second_fact = lookup[fact.object, second_key[1]]
            second = table[second_key]
            first_reply = sentence(relation.answer.format(**slots))
            second_reply = sentence(second.answer.format(s=fact.object, o=second_fact.object))
            heldout = heldout_text(f"{fact.subject} {fact.relation} {second_key[1]}")
            for core in second.asks:
                core = sentence(core.format(s=relation.about.format(**slots)))
                both = touched | {second_fact.key}
                asks.append(Ask("two_hop", core, f"{first_reply} {second_reply}", both, heldout))
    return tuple(asks)


@lru_cache(maxsize=1)
def card_asks() -> tuple[Ask, ...]:
    """Every bare question of general knowledge, the calendar, opposites and identity."""
    return tuple(Ask(card.family, core, card.answer, frozenset(),
                     heldout_text(core)) for card in cards() for core in card.asks)


@lru_cache(maxsize=2)
def asks_by_family(world_seed: int, heldout: bool) -> dict[str, tuple[Ask, ...]]:
    """Bare questions on one side of the split. Facts unseen in finetuning are never asked on the training side."""
    unseen = draw_facts(world_seed).unseen
    out: dict[str, list[Ask]] = {}
    for ask in (*fact_asks(world_seed), *card_asks()):
        hidden = bool(ask.facts & unseen)
        if hidden and (ask.family in ("reverse", "two_hop") or not heldout):
            continue
        if ask.heldout == heldout:
            out.setdefault(ask.family, []).append(ask)
    return {family: tuple(asks) for family, asks in out.items()}


# ---------------------------------------------------------------------------------------------- several turns
def _named(fact: Fact) -> str:
    return f"the {fact.subject}" if fact.kind in ("animal", "festival", "machine") else fact.subject


def _fact_turn(rng: random.Random, fact: Fact) -> list[Message]:
    """A first question about the fact, in training words, with its answer."""
    relation, slots = relations()[fact.kind, fact.relation], {"s": fact.subject, "o": fact.object}
    cores = [core for core in (sentence(ask.format(**slots)) for ask in relation.asks) if not heldout_text(core)]
    if not cores:
        return []
    return [user(rng.choice(cores)), assistant(sentence(relation.answer.format(**slots)))]


def _follow_up(rng: random.Random, facts: Facts, fact: Fact) -> list[Message]:
    """The same subject, another relation: 'And its river?'"""
    others = [f for f in facts.by_subject[fact.subject] if f.relation != fact.relation and f.key not in facts.unseen]
    if not others:
        return []
    other = rng.choice(others)
    relation = relations()[other.kind, other.relation]
    whose = {"it": "its", "she": "her", "he": "his"}[facts.pronoun(other)]
    ask = rng.choice(("And {w} {n}?", "What about {w} {n}?", "And what is {w} {n}?", "Tell me {w} {n} too."))
    reply = sentence(relation.answer.format(s=other.subject, o=other.object))
    return [*_fact_turn(rng, fact), user(ask.format(w=whose, n=relation.noun)), assistant(reply)]


def _swap(rng: random.Random, facts: Facts, fact: Fact) -> list[Message]:
    """The same relation, another subject: 'Sorry, I meant Tinfold.'"""
    others = [f for f in facts.by_relation[fact.kind, fact.relation] if f.key not in facts.unseen and f != fact]
    other = rng.choice(others)
    relation = relations()[other.kind, other.relation]
    ask = rng.choice(("And {s}?", "What about {s}?", "Sorry, I meant {s}.", "No, I mean {s}.", "And what about {s}?"))
    reply = sentence(relation.answer.format(s=other.subject, o=other.object))
    return [*_fact_turn(rng, fact), user(ask.format(s=_named(other))), assistant(reply)]


def _shorter(rng: random.Random, facts: Facts, fact: Fact) -> list[Message]:
    """The same answer in short: 'Say it shorter.'"""
    relation = relations()[fact.kind, fact.relation]
    ask = rng.choice(("Say it shorter.", "Shorter, please.", "Can you say that in short?", "Make it shorter."))
    return [*_fact_turn(rng, fact), user(ask), assistant(sentence(relation.brief.format(s=fact.subject,
                                                                                        o=fact.object)))]


def _remember(rng: random.Random, facts: Facts, fact: Fact, heldout: bool) -> list[Message]:
    """The user's name, told before and asked for now."""
    name = problems.invented_word(rng).capitalize() if rng.random() < 0.5 else rng.choice(NAMES)
    if heldout_word(name) != heldout:
        return _remember(rng, facts, fact, heldout)
    hello = rng.choice(("Hello, my name is {n}.", "Hi, I am {n}.", "I am called {n}.", "My name is {n}.",
                        "Good day, I am {n}."))
    middle = _fact_turn(rng, fact) if rng.random() < 0.5 else []
    ask = rng.choice(("What is my name?", "Do you remember my name?", "Who am I?", "What am I called?"))
    return [user(hello.format(n=name)), assistant(f"Hello {name}! How can I help you?"), *middle, user(ask),
            assistant(f"Your name is {name}.")]


def multi_turn(rng: random.Random, world_seed: int, heldout: bool) -> list[Message]:
    """A conversation of several turns on one side of the split: by name, else by a hash of the user's texts."""
    facts = draw_facts(world_seed)
    while True:
        kind, fact = rng.choice(("follow", "swap", "shorter", "name")), rng.choice(facts.seen)
        if not _fact_turn(rng, fact):
            continue
        if kind == "name":
            return _remember(rng, facts, fact, heldout)
        messages = {"follow": _follow_up, "swap": _swap, "shorter": _shorter}[kind](rng, facts, fact)
        if messages and heldout_text(prompt_text(messages)) == heldout:
            return messages


# ---------------------------------------------------------------------------------------------- problems
PROBLEMS: dict[str, Callable[[random.Random, bool], Problem]] = {
    "sums": lambda rng, heldout: _by_text(rng, heldout, problems.sum_up),
    "arithmetic_1": problems.one_step,
    "arithmetic_2": problems.two_step,
    "arithmetic_3": problems.three_step,
    "letters_known": lambda rng, heldout: problems.letters(rng, heldout, False),
    "letters_new": lambda rng, heldout: problems.letters(rng, heldout, True),
    "spelling": problems.spelling,
    "sequence": lambda rng, heldout: _by_text(rng, heldout, problems.sequence),
    "lists": lambda rng, heldout: _by_text(rng, heldout, problems.lists),
}


def _by_text(rng: random.Random, heldout: bool, make: Callable[[random.Random], Problem]) -> Problem:
    while True:
        problem = make(rng)
        if heldout_text(problem.question) == heldout:
            return problem


def _problem_question(problem: Problem, rng: random.Random) -> tuple[list[Message], str]:
    return [user(framed(rng, problem.question)), assistant(problem.parts)], answer_span(
        content_text(assistant(problem.parts)["content"])
    )


def question_pool(family: str, n: int, seed: int, world_seed: int = 42) -> list[Question]:
    """n different held-out questions of a family, other ones for another seed.

    Families about facts repeat a bare question in other frames when n is larger than their number.
    """
    if family not in HELDOUT_COUNTS:
        raise ValueError(f"no question family {family!r}; there are {', '.join(HELDOUT_COUNTS)}")
    rng = random.Random(f"pool {family} {seed} {world_seed}")
    unseen = draw_facts(world_seed).unseen
    out: list[Question] = []
    prompts: set[str] = set()
    deck: list[Ask] = []
    for i in range(400 * n):
        if len(out) == n:
            return out
        hidden = False
        if family in PROBLEMS:
            messages, _ = _problem_question(PROBLEMS[family](rng, True), rng)
        elif family == HARD_FAMILY:
            kinds = list(problems.TRICKY)
            messages, _ = _problem_question(problems.tricky(rng, True, False, kinds[i % len(kinds)]), rng)
        elif family == "multi_turn":
            messages = multi_turn(rng, world_seed, True)
        else:
            if not deck:
                deck = _deck(rng, family, world_seed, unseen)
            ask = deck.pop()
            hidden = bool(ask.facts & unseen)
            messages = [user(framed(rng, ask.core)), assistant(ask.reply)]
        prompt = prompt_text(messages)
        if prompt not in prompts:
            prompts.add(prompt)
            answer = answer_span(content_text(messages[-1]["content"]))
            out.append(Question(f"{family}-{seed}-{len(out)}", family, messages, answer, family == HARD_FAMILY, hidden))
    raise ValueError(f"family {family} has no {n} different held-out questions, only {len(out)}; ask for fewer")


def _deck(rng: random.Random, family: str, world_seed: int, unseen: frozenset[Key]) -> list[Ask]:
    """The family's held-out bare questions in random order, those about unseen facts in their share up front."""
    asks = list(asks_by_family(world_seed, True)[family])
    rng.shuffle(asks)
    hidden = [ask for ask in asks if ask.facts & unseen]
    known = [ask for ask in asks if not ask.facts & unseen]
    one_each = list({ask.facts: ask for ask in hidden}.values())  # one question per unseen fact first
    deck = []
    while one_each and known:
        deck.append(one_each.pop() if rng.random() < UNSEEN_QUESTION_FRAC else known.pop())
    return [*known, *hidden, *deck[::-1]]


def heldout_questions(seed: int = 42) -> list[Question]:
    """The held-out set of a world: `HELDOUT_COUNTS` questions of each family, shuffled: its first n are a mix."""
    out = []
    for family, n in HELDOUT_COUNTS.items():
        out += question_pool(family, n, seed, world_seed=seed)
    random.Random(f"order {seed}").shuffle(out)
    return out


def training_problems(n: int, seed: int) -> list[Question]:
    """n word problems of all four kinds with training numbers and right reference answers: prompts for learning."""
    rng = random.Random(f"training {seed}")
    kinds: list[tuple[str, Callable[[], Problem]]] = [
        (HARD_FAMILY, lambda: problems.tricky(rng, False, False)),
        ("arithmetic_3", lambda: problems.three_step(rng, False)),
        (HARD_FAMILY, lambda: problems.tricky(rng, False, False)),
        ("arithmetic_2", lambda: problems.two_step(rng, False)),
        (HARD_FAMILY, lambda: problems.tricky(rng, False, False)),
        ("arithmetic_1", lambda: problems.one_step(rng, False)),
    ]
    out = []
    for i in range(n):
        family, make = kinds[i % len(kinds)]
        messages, answer = _problem_question(make(), rng)
        out.append(Question(f"train-{family}-{seed}-{i}", family, messages, answer, family == HARD_FAMILY))
    return out

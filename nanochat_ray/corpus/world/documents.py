"""The documents for pretraining: the facts told in many ways, general knowledge, sums, spellings, small stories.

Every fact is told about equally often. Prose with questions in it only uses questions of the training side,
so no document
holds a held-out question.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from nanochat_ray.corpus.world import problems
from nanochat_ray.corpus.world.facts import Fact, draw_facts
from nanochat_ray.corpus.world.general import DAYS, EXPLANATIONS, Card, cards
from nanochat_ray.corpus.world.phrases import CHAINS, relations, sentence
from nanochat_ray.corpus.world.problems import heldout_text, normalise, spelled
from nanochat_ray.corpus.world.questions import Ask, fact_asks

# documents per kind; an entry, a letter and so on hold three to eight sentences each
COUNTS = {
    "entry": 4000, "table": 500, "diary": 1500, "letter": 1500, "news": 1500, "quiz": 3000, "story": 1500,
    "chain": 1500,
    "lore": 1600, "sums": 1300, "spelling": 1400, "counting": 300, "explanation": 200,
}

WEATHER = (
    "It rained all day.", "The fog came in from the sea.", "The sun was out at last.",
    "A cold wind blew over the harbour.",
    "The night was clear and full of stars.", "Snow lay on the roofs.", "It was the first warm day of the year.",
)
DIARY = (
    "I could not sleep, so I wrote down what I learned.", "My feet hurt from walking.",
    "I met an old friend and we talked.",
    "For dinner there was soup, as always.", "I must remember this.", "Tomorrow I will take the early ferry.",
    "The innkeeper told me many things.", "I drank tea by the window.",
)
NEWS = (
    "Visitors are welcome.", "The town council was not surprised.", "More on this tomorrow.",
    "The weather will stay fair.",
    "So says a fisherman who was there.", "Everybody agreed.", "The ferry leaves at noon.",
)
NUMBER_WORDS = "one two three four five six seven eight nine ten eleven twelve".split()


class Teller:
    """Puts facts into sentences, and deals facts and subjects so that each comes up as often as the others."""

    def __init__(self, rng: random.Random, seed: int) -> None:
        self.rng, self.facts = rng, draw_facts(seed)
        self.table, self.lookup = relations(), self.facts.lookup
        self.subjects = list(dict.fromkeys(fact.subject for fact in self.facts.all))
        self.cards = cards()
        self.asks: dict[frozenset[tuple[str, str]], list[Ask]] = {}
        for ask in fact_asks(seed):
            if not ask.heldout:
                self.asks.setdefault(ask.facts, []).append(ask)
        self._facts: list[Fact] = []
        self._subjects: list[str] = []
        self._cards: list[Card] = []

    def fact(self) -> Fact:
        self._facts = self._facts or self.rng.sample(self.facts.all, len(self.facts.all))
        return self._facts.pop()

    def subject(self) -> str:
        self._subjects = self._subjects or self.rng.sample(self.subjects, len(self.subjects))
        return self._subjects.pop()

    def card(self) -> Card:
        self._cards = self._cards or self.rng.sample(self.cards, len(self.cards))
        return self._cards.pop()

    def say(self, fact: Fact, pronoun: bool = False) -> str:
        """The fact in one of its sentences; with a pronoun for the subject if the sentence starts with it."""
        template = self.rng.choice(self.table[fact.kind, fact.relation].says)
        for start in ("the {s} ", "{s} "):
            if pronoun and template.startswith(start):
                template = f"{self.facts.pronoun(fact)} {template[len(start):]}"
                break
        return sentence(template.format(s=fact.subject, o=fact.object))


def _entry(t: Teller) -> str:
    """An encyclopedia entry: everything about one subject."""
    known = t.facts.by_subject[t.subject()]
    facts = t.rng.sample(known, len(known))
    said = [t.say(fact, pronoun=i > 0 and t.rng.random() < 0.35) for i, fact in enumerate(facts)]
    head = t.rng.choice(("", "", f"{facts[0].subject}\n", f"About {facts[0].subject}. "))
    return head + " ".join(said)


def _table(t: Teller) -> str:
    """A list: one relation of several subjects."""
    first = t.fact()
    known = t.facts.by_relation[first.kind, first.relation]
    facts = t.rng.sample(known, min(len(known), 7))
    noun = t.table[first.kind, first.relation].noun
    kind = {"person": "people"}.get(first.kind, first.kind + "s")
    lines = [f"- {fact.subject}: {fact.object}" for fact in facts]
    return f"Some {kind} of the isles, and of each the {noun}:\n" + "\n".join(lines)


def _mixed(t: Teller, glue: tuple[str, ...]) -> list[str]:
    said = [t.say(t.fact()) for _ in range(t.rng.randint(3, 5))]
    said.insert(t.rng.randint(1, len(said)), t.rng.choice(glue))
    return said


def _diary(t: Teller) -> str:
    return f"{t.rng.choice(DAYS)}. {t.rng.choice(WEATHER)} " + " ".join(_mixed(t, DIARY))


def _letter(t: Teller) -> str:
    to, by = t.rng.sample(problems.PEOPLE, 2)
    greeting = t.rng.choice(("I am well and hope that you are too.", "Thank you for your letter.",
                             "Let me tell you the news.",
                             "You asked me what I know of the isles."))
    return f"Dear {to},\n{greeting} " + " ".join(_mixed(t, DIARY)) + f"\nYours, {by}"


def _news(t: Teller) -> str:
    head = t.rng.choice(("News from the isles.", "The Lantern Post reports:", "Read this today:",
                         "What people talk about:"))
    return f"{head} " + " ".join(_mixed(t, NEWS))


def _quiz(t: Teller) -> str:
    """Questions and answers as prose, in words of the training side."""
    said = []
    for _ in range(t.rng.randint(3, 5)):
        asks = t.asks.get(frozenset([t.fact().key]), [])
        if asks:
            ask = t.rng.choice(asks)
            said.append(t.rng.choice(("{q} {a}", "{q} {a}", "Question: {q} Answer: {a}", "A child asked: {q} {a}"))
                        .format(q=ask.core, a=ask.reply))
    return t.rng.choice((" ", "\n")).join(said) or t.say(t.fact())


def _story(t: Teller) -> str:
    """A person of the isles goes somewhere; what is said on the way is true."""
    person = t.rng.choice(t.facts.by_relation["person", "job"]).subject
    get = lambda subject, relation: t.lookup[subject, relation].object  # noqa: E731
    she = t.facts.pronoun(t.lookup[person, "job"])
    home, job, pet, plays = (get(person, r) for r in ("home", "job", "pet", "instrument"))
    food = next(fact.subject for fact in t.facts.by_relation["food", "origin"] if fact.object == home)
    feast = next(fact.subject for fact in t.facts.by_relation["festival", "place"] if fact.object == home)
    return " ".join(t.rng.sample((
        f"On {get(home, 'market')} {person}, the {job}, went to the market of {home}.",
        f"{person} likes {get(person, 'dish')} and ate it on a bench in {home}.",
        f"At home in {home} {she} cooked {food}, for which one needs {get(food, 'ingredient')}.",
        f"The {pet} of {person} was hungry and wanted {get(pet, 'diet')}.",
        f"Then {person} took the {plays} and played by the river {get(home, 'river')}, which flows through {home}.",
        f"In {get(feast, 'month')} all of {home} came for the {feast}.",
        f"The mayor of {home}, {get(home, 'mayor')}, stood at the {get(home, 'gate')} gate and talked to a child.",
    ), 4))


def _chain(t: Teller) -> str:
    """Two facts that hang together, and what follows."""
    while True:
        fact = t.fact()
        nexts = CHAINS.get((fact.kind, fact.relation))
        if nexts:
            break
    _, relation = t.rng.choice(nexts)
    second = t.lookup[fact.object, relation]
    return f"{t.say(fact)} {t.say(second)} " + " ".join(t.say(t.fact()) for _ in range(2))


def _lore(t: Teller) -> str:
    """General knowledge."""
    said = []
    for _ in range(t.rng.randint(4, 7)):
        card = t.card()
        if card.says:
            said.append(sentence(t.rng.choice(card.says)))
        else:
            hidden = [normalise(ask) for ask in card.asks if heldout_text(ask)]
            asks = [ask for ask in card.asks if not any(text in normalise(ask) for text in hidden)]
            said.append(f"Someone asked the lantern: {t.rng.choice(asks)} It said: {card.answer}")
    return " ".join(said)


def _sums(t: Teller) -> str:
    """A word problem of training numbers worked out in prose, or an equation."""
    if t.rng.random() < 0.15:
        a, x, b = t.rng.randint(2, 9), t.rng.randint(1, 9), t.rng.randint(1, 9)
        return f"If {a}*x + {b} = {a * x + b}, then x is {x}."
    make = t.rng.choice((problems.one_step, problems.two_step, problems.three_step))
    problem = make(t.rng, False)
    spoken = [part for part in problem.parts if part["type"] != "python_output"]
    said = [part["text"] + " = " * (part["type"] == "python") for part in spoken]
    return f"{problem.question} {''.join(said)}"


def _spelling(t: Teller) -> str:
    """Words and their letters."""
    words = [problems.draw_word(t.rng, False, t.rng.random() < 0.6) for _ in range(4)]
    return "\n".join(f"We spell {word}: {spelled(word)}" for word in words)


def _counting(t: Teller) -> str:
    start, step = t.rng.randint(1, 80), t.rng.choice((1, 1, 1, 2, 3, 5, 10))
    row = ", ".join(str(start + step * k) for k in range(12))
    if t.rng.random() < 0.5:
        return f"We count: {row}."
    i = t.rng.randint(0, 6)
    return f"We count: {', '.join(NUMBER_WORDS[i : i + 6])}. And on: {row}."


def _explanation(t: Teller) -> str:
    return " ".join(t.rng.sample(EXPLANATIONS, 2))


MAKERS: dict[str, Callable[[Teller], str]] = {
    "entry": _entry, "table": _table, "diary": _diary, "letter": _letter, "news": _news, "quiz": _quiz, "story": _story,
    "chain": _chain, "lore": _lore, "sums": _sums, "spelling": _spelling, "counting": _counting,
    "explanation": _explanation,
}


def build_documents(seed: int = 42) -> list[str]:
    """All documents of a world in random order."""
    rng = random.Random(f"documents {seed}")
    teller = Teller(rng, seed)
    out = [MAKERS[kind](teller) for kind, n in COUNTS.items() for _ in range(n)]
    rng.shuffle(out)
    return out

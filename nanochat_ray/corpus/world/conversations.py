"""The conversations for finetuning: every family on the training side of the split, and small talk.

No conversation mentions an unseen fact: one in which the subject and the object of such a fact both occur is left out.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from nanochat_ray.corpus.world import problems
from nanochat_ray.corpus.world.facts import Facts, draw_facts
from nanochat_ray.corpus.world.phrases import relations, sentence
from nanochat_ray.corpus.world.questions import (
    HARD_FAMILY,
    PROBLEMS,
    Ask,
    Message,
    asks_by_family,
    assistant,
    content_text,
    framed,
    multi_turn,
    user,
)

# conversations per family in the training set
COUNTS = {
    "where": 1500, "who": 900, "what": 3000, "when": 1100, "reverse": 1800, "two_hop": 2000, "sums": 1000,
    "arithmetic_1": 1100, "arithmetic_2": 1200, "arithmetic_3": 1300, HARD_FAMILY: 900, "letters_known": 1100,
    "letters_new": 1400, "spelling": 1200, "identity": 800, "opposites": 500, "calendar": 1000, "school": 500,
    "sequence": 1100, "lists": 1200, "multi_turn": 2200, "about": 300, "chat": 300,
}

CHAT = (
    ("Hello!|Hi!|Good morning!|Good evening!|Hey there!|Hello Wick!",
     "Hello! How can I help you?|Hi! What would you like to know?"),
    ("How are you?|How do you do?|Are you well?|How is it going?",
     "I am well, thank you. And you?|Very well! The lamps are lit."),
    ("Thanks!|Thank you!|Thank you very much.|That helped me.|Great, thanks.",
     "You are welcome!|I am glad that it helped."),
    ("Goodbye!|Bye!|See you!|Good night!|I must go now.", "Goodbye! Come back soon.|Good night, and mind the fog."),
    ("Tell me a joke.|Do you know a joke?|Make me laugh.|Say something funny.",
     "Why did the lighthouse go to school? It wanted to be brighter.|What does the sea say to the harbour? Nothing, "
     "it just waves.|"
     "Why did the baker stop making moon bread? It was always half full."),
    ("What is the meaning of life?|Why are we here?|What is the sense of it all?",
     "Nobody knows for sure. On the isles they say: keep the lamp burning.",),
    ("You are wrong.|That is not right.|I do not believe you.", "I am sorry. I am small and I make mistakes."),
    ("Tell me a story.|Do you know a story?|I want to hear a story.", ""),
)


def _story(rng: random.Random) -> str:
    name, thing = rng.choice(problems.PEOPLE), rng.choice(problems.THINGS)
    return rng.choice((
        f"Once {name} lost a bag of {thing} in the fog. A lantern moth found it and carried it home, one by one.",
        f"{name} wanted to see the end of the sea. After three days of rowing there was an island, and on it a "
        f"small shop "
        f"that sold {thing}. So {name} stayed.",
        f"A river hog once ate all the {thing} of {name}. The next day it came back with a fish to say sorry.",
    ))


def _about(rng: random.Random, facts: Facts) -> list[Message]:
    """Two or three facts about something in one reply."""
    fact = rng.choice(facts.all)
    known = [f for f in facts.by_subject[fact.subject] if f.key not in facts.unseen]
    if len(known) < 2:
        return []
    chosen = rng.sample(known, min(len(known), rng.randint(2, 3)))
    table = relations()
    reply = " ".join(sentence(table[f.kind, f.relation].answer.format(s=f.subject, o=f.object)) for f in chosen)
    ask = rng.choice(("Tell me about {s}.", "What do you know about {s}?", "Tell me more about {s}.",
                      "Describe {s} to me."))
    return [user(framed(rng, ask.format(s=fact.subject))), assistant(reply)]


def _chat(rng: random.Random) -> list[Message]:
    asks, replies = rng.choice(CHAT)
    reply = rng.choice(replies.split("|")) if replies else _story(rng)
    return [user(rng.choice(asks.split("|"))), assistant(reply)]


def _problem(rng: random.Random, family: str) -> list[Message]:
    if family == HARD_FAMILY:
        kind = rng.choice(list(problems.TRICKY))
        problem = problems.tricky(rng, False, rng.random() < problems.WRONG_PLAN_SHARE[kind], kind)
    else:
        problem = PROBLEMS[family](rng, False)
    return [user(framed(rng, problem.question)), assistant(problem.parts)]


class _Deck:
    """Deals the bare questions of a family in random order, all of them before any comes again."""

    def __init__(self, rng: random.Random, asks: tuple[Ask, ...]) -> None:
        self.rng, self.asks, self.left = rng, asks, [*asks]
        rng.shuffle(self.left)

    def deal(self) -> list[Message]:
        if not self.left:
            self.left = [*self.asks]
            self.rng.shuffle(self.left)
        ask = self.left.pop()
        return [user(framed(self.rng, ask.core)), assistant(ask.reply)]


def mentions(messages: list[Message], pairs: list[tuple[str, str]]) -> bool:
    """Whether both words of a pair occur in the conversation."""
    said = " ".join(content_text(message["content"]) for message in messages).lower()
    return any(subject in said and object_ in said for subject, object_ in pairs)


def build_conversations(seed: int = 42) -> list[dict[str, list[Message]]]:
    """All conversations of a world in random order, as {"messages": [...]}, each prompt on the training side."""
    rng = random.Random(f"conversations {seed}")
    facts = draw_facts(seed)
    unseen = [(fact.subject.lower(), fact.object.lower()) for fact in facts.all if fact.key in facts.unseen]
    decks = {family: _Deck(rng, asks) for family, asks in asks_by_family(seed, False).items()}

    def maker(family: str) -> Callable[[], list[Message]]:
        if family in decks:
            return decks[family].deal
        if family == "multi_turn":
            return lambda: multi_turn(rng, seed, False)
        if family == "about":
            return lambda: _about(rng, facts)
        if family == "chat":
            return lambda: _chat(rng)
        return lambda: _problem(rng, family)

    out: list[dict[str, list[Message]]] = []
    for family, n in COUNTS.items():
        make, made = maker(family), 0
        while made < n:
            messages = make()
            if messages and not mentions(messages, unseen):
                out.append({"messages": messages})
                made += 1
    rng.shuffle(out)
    return out

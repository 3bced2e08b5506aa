"""The facts of the embedded world, the Lantern Isles: who and what there is, drawn from name pools by a seed.

A fact is (kind, subject, relation, object). The pools are invented for this project; the seed decides which river
flows through which town, who lives where, and so on. Some facts about each town and person are kept out of every
finetuning conversation, so that a model can only know them from the pretraining documents.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

UNSEEN_TOWN_FACTS, UNSEEN_PERSON_FACTS = 16, 40  # facts that finetuning never mentions

TOWNS = (
    "Harrowmere Tinfold Brambleport Oskill Velmora Dunwick Saltery Quillhaven Marrowby Fennick Lowlight Pebbleton "
    "Ashcombe Wrenfield Glimmerstow Moonquay"
).split()
RIVERS = "Sel Orrin Blythe Tarn Wend Iska Fallow Merle Quoy Luma Dray Pell Yarrow Brine Cress Nim".split()
ISLANDS = "Amberel,Noctis,Torvay,Saint Osmund,Greater Finch".split(",")
WOMEN = "Mira Oda Lina Sanna Petra Wilma Nell Greta Tilda Hanne Ruth Edda Flora Juna Kaia Bettina".split()
MEN = "Tobin Alrik Bram Caspar Doran Edgar Finn Gustav Hugo Ivo Jasper Konrad Ludo Magnus Nils Otto".split()
SURNAMES = (
    "Tolbek Wender Quist Hallow Marsh Brandle Figg Corvin Dapple Eastin Fennel Grimsby Hask Ingle Juniper Kettle "
    "Loom Moss Nettle Ostler Pepper Quill Rook Sable Thorn Umber Vance Willow Yarn Zander Birch Crane"
).split()
JOBS = (
    "baker,clockmaker,lamplighter,ferry captain,beekeeper,bookbinder,glassblower,shepherd,potter,tailor,bridge keeper,"
    "fisher,cheesemaker,doctor,teacher,blacksmith,gardener,map maker,piano tuner,weather watcher,carpenter,juggler,"
    "postman,miller,painter,shoemaker,kite builder,librarian,salt trader,judge,rope maker,well digger"
).split(",")
INSTRUMENTS = "fiddle flute drum harp trumpet banjo bagpipe whistle".split()
COLOURS = "red blue green yellow purple white black brown orange silver".split()
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
ANIMALS = (
    "mosshopper,velvet crab,lantern moth,bog pony,ribbon eel,drumfish,tufted snail,copper hare,paper owl,river hog,"
    "cliff goat,night duck"
).split(",")
HABITATS = (
    "in hollow trees,under old bridges,on high cliffs,in deep wells,in salt caves,on flat roofs,in reed beds,"
    "behind waterfalls,in abandoned ships,on warm beaches,in chimney tops,in peat holes"
).split(",")
DIETS = (
    "blackberries,candle wax,seaweed,beetles,pine cones,mushrooms,clover,old rope,acorns,barnacles,dandelions,honeycomb"
).split(",")
FOODS = (
    "moon bread,salt pie,fog cake,lantern soup,harbour stew,thunder pudding,gull porridge,candy kelp,ember curry,"
    "pilot toast,barrel pickle,snow jelly,smoke sausage,cloud custard,pirate salad,winter dumpling"
).split(",")
INGREDIENTS = (
    "barley,honey,turnips,chestnuts,red beans,goat cheese,rhubarb,pumpkin,walnuts,plums,mustard,leeks,carrots,oats,"
    "cherries,garlic"
).split(",")
FESTIVALS = (
    "Kite Night,Boat Race,Feast of Bells,Lantern Walk,Day of Masks,Pancake Dinner,Long Dance,Silent Parade,Onion Fair,"
    "Snow Supper,Goose Run,Festival of Ladders,Whale Watch,Candle Swim,Hat Contest,Barrel Roll"
).split(",")
MACHINES = (
    "Puddle Sweeper,Fog Horn Organ,Steam Ladder,Bubble Press,Walking Desk,Thunder Jar,Rain Counter,Apple Cannon,"
    "Sock Finder,Whisper Pipe"
).split(",")
PURPOSES = (
    "peel apples,dry wet boots,wake sleepy sailors,sort buttons,catch lightning,measure the wind,polish spoons,"
    "find lost keys,carry secret letters,warm cold beds"
).split(",")
BOOKS = (
    "The Silent Kettle,Nine Grey Geese,A Map of Nowhere,The Upside Down Ship,Letters to a Lighthouse,The Last Candle,"
    "How to Fold the Sea,Seven Left Shoes,The Clock That Sneezed,Under the Blue Stairs"
).split(",")
TOPICS = (
    "a stolen bell,two brothers and a whale,a giant who is afraid of cats,the winter without snow,a talking bridge,"
    "the queen of the beavers,a boy who collects shadows,an island that moves,the war of the bakers,a very slow "
    "horse race"
).split(",")


@dataclass(frozen=True)
class Fact:
    """One fact: for a subject and a relation there is exactly one object."""

    kind: str
    subject: str
    relation: str
    object: str

    @property
    def key(self) -> tuple[str, str]:
        return self.subject, self.relation


@dataclass(frozen=True)
class Facts:
    """All facts of one world."""

    all: tuple[Fact, ...]
    unseen: frozenset[tuple[str, str]]  # keys of the facts that no conversation may mention
    women: frozenset[str]  # full names of the people called she

    @cached_property
    def lookup(self) -> dict[tuple[str, str], Fact]:
        return {fact.key: fact for fact in self.all}

    @cached_property
    def by_subject(self) -> dict[str, list[Fact]]:
        out: dict[str, list[Fact]] = {}
        for fact in self.all:
            out.setdefault(fact.subject, []).append(fact)
        return out

    @cached_property
    def by_relation(self) -> dict[tuple[str, str], list[Fact]]:
        out: dict[tuple[str, str], list[Fact]] = {}
        for fact in self.all:
            out.setdefault((fact.kind, fact.relation), []).append(fact)
        return out

    @cached_property
    def seen(self) -> list[Fact]:
        """The facts that conversations may mention."""
        return [fact for fact in self.all if fact.key not in self.unseen]

    def pronoun(self, fact: Fact) -> str:
        if fact.kind != "person":
            return "it"
        return "she" if fact.subject in self.women else "he"


def _shuffled(rng: random.Random, values: Iterable[str]) -> list[str]:
    out = list(values)
    rng.shuffle(out)
    return out


def _spread(rng: random.Random, values: Iterable[str], n: int) -> list[str]:
    """n values in random order, each as often as the others, give or take one."""
    pool = _shuffled(rng, values)
    return _shuffled(rng, (pool * (n // len(pool) + 1))[:n])


def _relate(kind: str, relation: str, subjects: list[str], objects: list[str]) -> list[Fact]:
    return [Fact(kind, s, relation, o) for s, o in zip(subjects, objects, strict=True)]


@lru_cache(maxsize=4)
def draw_facts(seed: int = 42) -> Facts:
    """The world of a seed. The same seed gives the same facts."""
    rng = random.Random(f"facts {seed}")
    surnames = _shuffled(rng, SURNAMES)
    people = [f"{first} {last}" for first, last in zip(WOMEN + MEN, surnames, strict=True)]
    women = frozenset(people[: len(WOMEN)])
    people = _shuffled(rng, people)
    homes = _spread(rng, TOWNS, len(people))
    mayors = [rng.choice([p for p, home in zip(people, homes, strict=True) if home == town]) for town in TOWNS]
    years = [str(year) for year in rng.sample(range(1100, 1900, 10), len(TOWNS))]
    n_towns, n_people, n_animals = len(TOWNS), len(people), len(ANIMALS)
    facts = [
        *_relate("town", "river", TOWNS, _shuffled(rng, RIVERS)),
        *_relate("town", "island", TOWNS, _spread(rng, ISLANDS, n_towns)),
        *_relate("town", "mayor", TOWNS, mayors),
        *_relate("town", "market", TOWNS, _spread(rng, WEEKDAYS, n_towns)),
        *_relate("town", "gate", TOWNS, _spread(rng, COLOURS, n_towns)),
        *_relate("town", "year", TOWNS, years),
        *_relate("person", "home", people, homes),
        *_relate("person", "job", people, _shuffled(rng, JOBS)),
        *_relate("person", "pet", people, _spread(rng, ANIMALS, n_people)),
        *_relate("person", "dish", people, _spread(rng, FOODS, n_people)),
        *_relate("person", "instrument", people, _spread(rng, INSTRUMENTS, n_people)),
        *_relate("animal", "habitat", list(ANIMALS), _shuffled(rng, HABITATS)),
        *_relate("animal", "diet", list(ANIMALS), _shuffled(rng, DIETS)),
        *_relate("animal", "colour", list(ANIMALS), _spread(rng, COLOURS, n_animals)),
        *_relate("food", "origin", list(FOODS), _shuffled(rng, TOWNS)),
        *_relate("food", "ingredient", list(FOODS), _shuffled(rng, INGREDIENTS)),
        *_relate("festival", "place", list(FESTIVALS), _shuffled(rng, TOWNS)),
        *_relate("festival", "month", list(FESTIVALS), _spread(rng, MONTHS, len(FESTIVALS))),
        *_relate("machine", "inventor", list(MACHINES), _shuffled(rng, people)[: len(MACHINES)]),
        *_relate("machine", "purpose", list(MACHINES), _shuffled(rng, PURPOSES)),
        *_relate("book", "author", list(BOOKS), _shuffled(rng, people)[: len(BOOKS)]),
        *_relate("book", "topic", list(BOOKS), _shuffled(rng, TOPICS)),
    ]
    return Facts(tuple(facts), _draw_unseen(rng, facts), women)


def _draw_unseen(rng: random.Random, facts: list[Fact]) -> frozenset[tuple[str, str]]:
    """Facts to hide from finetuning: at most one of a town, two of a person, of whom much else is told.

    Only such as share their object with another fact of the same relation, so that finetuning still says the object.
    A pair that two facts share (a mayor lives in the town) would leave one of them untold.
    """
    pairs = Counter(frozenset((fact.subject, fact.object)) for fact in facts)
    objects = Counter((fact.relation, fact.object) for fact in facts)
    fit = [f for f in facts if pairs[frozenset((f.subject, f.object))] == 1 and objects[f.relation, f.object] > 1]
    unseen: set[tuple[str, str]] = set()
    for kind, n, most in (("town", UNSEEN_TOWN_FACTS, 1), ("person", UNSEEN_PERSON_FACTS, 2)):
        pool = [fact for fact in fit if fact.kind == kind]
        rng.shuffle(pool)
        used: Counter[str] = Counter()
        for fact in pool:
            left = objects[fact.relation, fact.object]
            if n and used[fact.subject] < most and left > 1:
                unseen.add(fact.key)
                used[fact.subject] += 1
                objects[fact.relation, fact.object] -= 1
                n -= 1
    return frozenset(unseen)

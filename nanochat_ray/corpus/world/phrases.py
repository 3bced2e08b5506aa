"""How the facts of the world are told and asked: for each relation its sentences, questions and the one answer.

{s} is the subject, {o} the object. `says` are document sentences (those that start with {s} may get a pronoun),
`asks` questions for the object, `answer` the one reply that counts as right, `brief` its short form, `noun` the word of
a follow-up ("and its river?"), `about` a noun phrase that stands for the object in a two-step question. The `back_`
fields ask for the subject by the object, where that has one answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Relation:
    """The wording of one relation."""

    family: str  # where, who, what or when
    noun: str
    says: tuple[str, ...]
    asks: tuple[str, ...]
    answer: str
    brief: str
    about: str = ""
    back_asks: tuple[str, ...] = ()
    back_answer: str = ""


def _town() -> dict[tuple[str, str], Relation]:
    return {
        ("town", "river"): Relation(
            "what", "river",
            ("{s} lies on the river {o}", "the river {o} flows through {s}", "the river of {s} is the {o}",
             "children in {s} swim in the {o}", "the {o} is the river that runs past the houses of {s}",
             "boats come to {s} on the {o}"),
            ("Which river flows through {s}?", "What is the river of {s} called?", "On which river does {s} lie?",
             "What is the name of the river in {s}?", "Which river runs past {s}?", "What river can one see in {s}?"),
            "The river of {s} is the {o}.", "The {o}.", "",
            ("Which town lies on the {o}?", "What town does the {o} flow through?", "Where does the river {o} flow?",
             "Which town has the river {o}?"),
            "The {o} flows through {s}."),
        ("town", "island"): Relation(
            "where", "island",
            ("{s} is a town on {o}", "{s} lies on the island of {o}", "on the island of {o} there is a town called {s}",
             "the island of {s} is {o}", "{o} is the island where {s} was built", "{s} belongs to the island of {o}"),
            ("On which island is {s}?", "Where is {s}?", "Which island does {s} belong to?", "What island is {s} on?",
             "Where does {s} lie?", "What is the island of {s}?"),
            "{s} is on the island of {o}.", "On {o}."),
        ("town", "mayor"): Relation(
            "who", "mayor",
            ("the mayor of {s} is {o}", "{o} is the mayor of {s}", "{s} is governed by {o}",
             "the people of {s} chose {o} as their mayor", "{o} wears the golden chain of {s}",
             "{s} has a mayor called {o}"),
            ("Who is the mayor of {s}?", "Who governs {s}?", "What is the name of the mayor of {s}?",
             "Who was chosen as mayor in {s}?", "Which person is mayor of {s}?", "Who is in charge of {s}?"),
            "The mayor of {s} is {o}.", "{o}.", "the mayor of {s}",
            ("Which town has {o} as its mayor?", "Of which town is {o} the mayor?", "What town does {o} govern?",
             "Where is {o} the mayor?"),
            "{o} is the mayor of {s}."),
        ("town", "market"): Relation(
            "when", "market day",
            ("the market of {s} is held on {o}", "{s} has its market on {o}", "on {o} there is a market in {s}",
             "every {o} farmers bring their goods to {s}", "the market day of {s} is {o}",
             "{s} is full of people on {o}, its market day"),
            ("When is the market in {s}?", "On which day is the market of {s}?", "What is the market day of {s}?",
             "On what day does {s} hold its market?", "Which day is market day in {s}?",
             "When can I go to the market of {s}?"),
            "The market of {s} is on {o}.", "On {o}."),
        ("town", "gate"): Relation(
            "what", "gate",
            ("the gate of {s} is {o}", "{s} has a {o} gate", "a {o} gate stands at the entrance of {s}",
             "the town gate of {s} was painted {o}", "people know {s} by its {o} gate",
             "one enters {s} through a {o} gate"),
            ("What colour is the gate of {s}?", "Which colour does the gate of {s} have?",
             "How is the gate of {s} painted?",
             "What is the colour of the town gate of {s}?", "In what colour did they paint the gate of {s}?",
             "What does the gate of {s} look like?"),
            "The gate of {s} is {o}.", "It is {o}."),
        ("town", "year"): Relation(
            "when", "founding year",
            ("{s} was founded in {o}", "the first houses of {s} were built in {o}", "in the year {o} {s} was founded",
             "{s} dates from the year {o}", "the founding year of {s} is {o}",
             "{o} is the year in which {s} was founded"),
            ("When was {s} founded?", "In which year was {s} founded?", "What is the founding year of {s}?",
             "From which year does {s} date?", "When were the first houses of {s} built?", "How old is {s}?"),
            "{s} was founded in {o}.", "In {o}."),
    }


def _person() -> dict[tuple[str, str], Relation]:
    return {
        ("person", "home"): Relation(
            "where", "home town",
            ("{s} lives in {o}", "the home of {s} is in {o}", "{o} is the home town of {s}",
             "{s} has a small house in {o}",
             "{s} comes from {o}", "in {o} everybody knows {s}, who lives there"),
            ("Where does {s} live?", "In which town does {s} live?", "What is the home town of {s}?",
             "Where is the home of {s}?", "Which town does {s} come from?", "Where can I find the house of {s}?"),
            "{s} lives in {o}.", "In {o}.", "the town where {s} lives"),
        ("person", "job"): Relation(
            "what", "job",
            ("{s} is a {o}", "{s} works as a {o}", "{s} is the {o} of the isles", "the {o} is called {s}",
             "{s} earns a living as a {o}", "the work of {s} is that of a {o}"),
            ("What does {s} do?", "What is the job of {s}?", "What work does {s} do?", "What is the profession of {s}?",
             "How does {s} earn a living?", "As what does {s} work?"),
            "{s} is a {o}.", "A {o}.", "",
            ("Who is the {o}?", "Who works as a {o}?", "What is the name of the {o}?", "Which person is a {o}?"),
            "The {o} is {s}."),
        ("person", "pet"): Relation(
            "what", "pet",
            ("{s} keeps a {o} as a pet", "{s} has a {o} at home", "the pet of {s} is a {o}", "{s} owns a tame {o}",
             "a {o} follows {s} everywhere", "{s} feeds a {o} every morning, for it is the family pet"),
            ("What pet does {s} have?", "Which animal does {s} keep?", "What is the pet of {s}?",
             "What animal lives with {s}?", "Which pet does {s} own?", "What kind of pet follows {s}?"),
            "{s} has a {o}.", "A {o}.", "pet of {s}"),
        ("person", "dish"): Relation(
            "what", "favourite dish",
            ("{s} likes to eat {o}", "the favourite dish of {s} is {o}", "nobody eats more {o} than {s}",
             "{s} could eat {o} every day", "on feast days {s} asks for {o}", "{o} is what {s} likes best of all food"),
            ("What does {s} like to eat?", "What is the favourite dish of {s}?", "Which dish does {s} like best?",
             "What does {s} ask for on feast days?", "What could {s} eat every day?",
             "Which food does {s} like?"),
            "{s} likes {o}.", "{o}."),
        ("person", "instrument"): Relation(
            "what", "instrument",
            ("{s} plays the {o}", "{s} is good at playing the {o}", "the instrument of {s} is the {o}",
             "in the evening {s} takes out the {o} and plays", "{s} learned the {o} as a child",
             "one can hear {s} on the {o}"),
            ("What instrument does {s} play?", "Which instrument does {s} play?", "What is the instrument of {s}?",
             "What does {s} play in the evening?", "Which instrument did {s} learn?",
             "On what instrument is {s} good?"),
            "{s} plays the {o}.", "The {o}."),
    }


def _nature() -> dict[tuple[str, str], Relation]:
    return {
        ("animal", "habitat"): Relation(
            "where", "place",
            ("the {s} lives {o}", "one finds the {s} {o}", "the nest of the {s} is {o}", "{o} one may meet a {s}",
             "the {s} sleeps {o}", "the {s} hides {o}"),
            ("Where does the {s} live?", "Where can one find a {s}?", "Where is the nest of the {s}?",
             "Where does a {s} sleep?", "Where does the {s} hide?", "In what place would I look for a {s}?"),
            "The {s} lives {o}.", "It lives {o}.", "",
            ("Which animal lives {o}?", "What animal hides {o}?", "Which animal can be found {o}?",
             "What creature sleeps {o}?"),
            "The animal that lives {o} is the {s}."),
        ("animal", "diet"): Relation(
            "what", "food",
            ("the {s} eats {o}", "the food of the {s} is {o}", "the {s} lives on {o}", "a hungry {s} looks for {o}",
             "to tame a {s} one needs {o}", "nothing tastes better to a {s} than {o}"),
            ("What does the {s} eat?", "What is the food of the {s}?", "What does a {s} live on?",
             "What do I feed a {s}?", "What does a hungry {s} look for?", "What does a {s} like to eat?"),
            "The {s} eats {o}.", "It eats {o}.", "",
            ("Which animal eats {o}?", "What animal lives on {o}?", "Which animal likes {o}?",
             "What creature looks for {o}?"),
            "The animal that eats {o} is the {s}."),
        ("animal", "colour"): Relation(
            "what", "colour",
            ("the {s} is {o}", "the colour of the {s} is {o}", "one knows the {s} by its {o} skin",
             "a {s} is always {o}",
             "nature has made the {s} {o}", "the {s} shines {o} in the sun"),
            ("What colour is the {s}?", "What is the colour of the {s}?", "Which colour does a {s} have?",
             "How does a {s} shine in the sun?", "What colour has nature given the {s}?",
             "In what colour would I paint a {s}?"),
            "The {s} is {o}.", "It is {o}."),
        ("food", "origin"): Relation(
            "where", "town",
            ("{s} comes from {o}", "{o} is famous for its {s}", "{s} was first cooked in {o}",
             "the best {s} is made in {o}",
             "in {o} people eat {s}", "the home of {s} is {o}"),
            ("Where does {s} come from?", "Which town is famous for {s}?", "Where was {s} first cooked?",
             "In which town do people eat {s}?", "Where is the best {s} made?", "What town gave us {s}?"),
            "{s} comes from {o}.", "From {o}.", "the town that {s} comes from",
            ("Which food comes from {o}?", "What dish is {o} famous for?", "What do people eat in {o}?",
             "Which dish was first cooked in {o}?"),
            "The dish of {o} is {s}."),
        ("food", "ingredient"): Relation(
            "what", "ingredient",
            ("{s} is made from {o}", "the cook needs {o} for {s}", "the main thing in {s} is {o}", "{s} tastes of {o}",
             "without {o} there is no {s}", "{o} goes into {s}"),
            ("What is {s} made from?", "What does one need for {s}?", "What is the main thing in {s}?",
             "What does {s} taste of?", "What goes into {s}?", "Which ingredient is in {s}?"),
            "{s} is made from {o}.", "From {o}.", "",
            ("Which dish is made from {o}?", "What food tastes of {o}?", "What can I cook from {o}?",
             "Which food needs {o}?"),
            "The dish made from {o} is {s}."),
    }


def _works() -> dict[tuple[str, str], Relation]:
    return {
        ("festival", "place"): Relation(
            "where", "town",
            ("the {s} is held in {o}", "{o} celebrates the {s}", "visitors go to {o} for the {s}",
             "the {s} fills the streets of {o}", "the great feast of {o} is the {s}", "the {s} was invented in {o}"),
            ("Where is the {s} held?", "Which town celebrates the {s}?", "In which town is the {s}?",
             "Where do people go for the {s}?", "Where was the {s} invented?", "What town holds the {s}?"),
            "The {s} is held in {o}.", "In {o}.", "the town that holds the {s}",
            ("Which festival is held in {o}?", "What does {o} celebrate?", "What is the great feast of {o}?",
             "Which festival can I see in {o}?"),
            "The festival of {o} is the {s}."),
        ("festival", "month"): Relation(
            "when", "month",
            ("the {s} takes place in {o}", "in {o} it is time for the {s}", "the {s} comes every year in {o}",
             "the month of the {s} is {o}", "everybody waits for {o}, when the {s} begins",
             "the {s} is a feast of {o}"),
            ("When is the {s}?", "In which month is the {s}?", "What is the month of the {s}?",
             "When does the {s} begin?",
             "In what month does the {s} take place?", "When is it time for the {s}?"),
            "The {s} takes place in {o}.", "In {o}."),
        ("machine", "inventor"): Relation(
            "who", "inventor",
            ("the {s} was invented by {o}", "{o} invented the {s}", "the inventor of the {s} is {o}",
             "{o} built the first {s}", "the {s} is the work of {o}", "the idea of the {s} came from {o}"),
            ("Who invented the {s}?", "Who is the inventor of the {s}?", "Who built the first {s}?",
             "Whose idea was the {s}?", "Whose work is the {s}?", "Which person made the {s}?"),
            "The {s} was invented by {o}.", "{o}.", "the inventor of the {s}",
            ("What did {o} invent?", "Which machine did {o} build?", "What machine is the work of {o}?",
             "Which machine came from {o}?"),
            "{o} invented the {s}."),
        ("machine", "purpose"): Relation(
            "what", "use",
            ("the {s} can {o}", "the {s} is a machine built to {o}", "people use the {s} to {o}",
             "to {o} one takes the {s}", "the only thing the {s} does is to {o}", "with the {s} one can {o}"),
            ("What can the {s} do?", "What is the {s} for?", "What do people use the {s} for?",
             "Why was the {s} built?",
             "What does the {s} do?", "What is the use of the {s}?"),
            "The {s} can {o}.", "It can {o}.", "",
            ("Which machine can {o}?", "What machine do I need to {o}?", "With what machine can one {o}?",
             "Which machine was built to {o}?"),
            "The machine that can {o} is the {s}."),
        ("book", "author"): Relation(
            "who", "author",
            ("{s} was written by {o}", "{o} wrote {s}", "the author of {s} is {o}", "{s} is a book by {o}",
             "{o} became known for writing {s}", "the name of {o} stands on the cover of {s}"),
            ("Who wrote {s}?", "Who is the author of {s}?", "By whom is the book {s}?", "Whose book is {s}?",
             "Whose name stands on the cover of {s}?", "Which person wrote {s}?"),
            "{s} was written by {o}.", "{o}.", "the author of {s}",
            ("What did {o} write?", "Which book is by {o}?", "What is the book of {o} called?",
             "Which book did {o} write?"),
            "{o} wrote {s}."),
        ("book", "topic"): Relation(
            "what", "story",
            ("{s} is about {o}", "{s} tells of {o}", "the story of {s} is about {o}", "in {s} one reads about {o}",
             "whoever likes {o} should read {s}", "{s} is a tale about {o}"),
            ("What is {s} about?", "What does {s} tell of?", "What is the story of {s}?",
             "What does one read about in {s}?",
             "What happens in {s}?", "What is the topic of {s}?"),
            "{s} is about {o}.", "It is about {o}.", "",
            ("Which book is about {o}?", "What book tells of {o}?", "In which book can I read about {o}?",
             "What is the book about {o} called?"),
            "The book about {o} is {s}."),
    }


@lru_cache(maxsize=1)
def relations() -> dict[tuple[str, str], Relation]:
    """The wording of every relation, by (kind, relation)."""
    return {**_town(), **_person(), **_nature(), **_works()}


def sentence(text: str) -> str:
    """The text with a capital first letter and a full stop."""
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".?!" else text + "."


# first relation -> relations that can be asked of its object: (kind, relation), ...
CHAINS: dict[tuple[str, str], tuple[tuple[str, str], ...]] = {
    ("person", "home"): (("town", "river"), ("town", "mayor"), ("town", "market"), ("town", "island"), ("town",
                                                                                                        "gate")),
    ("festival", "place"): (("town", "river"), ("town", "mayor"), ("town", "island")),
    ("food", "origin"): (("town", "river"), ("town", "mayor"), ("town", "island")),
    ("town", "mayor"): (("person", "job"), ("person", "pet"), ("person", "instrument")),
    ("machine", "inventor"): (("person", "home"), ("person", "job")),
    ("book", "author"): (("person", "home"), ("person", "job")),
    ("person", "pet"): (("animal", "diet"), ("animal", "colour")),
}

"""What the world knows besides its invented facts: opposites, the calendar, some school knowledge, the assistant.

Everything is a `Card`: one answer, the questions that call for it, and the sentences that tell it in documents.
"""

from __future__ import annotations

from dataclasses import dataclass

NAME = "Wick"

OPPOSITES = (
    "hot cold,big small,old young,early late,fast slow,high low,long short,light dark,wet dry,full empty,open closed,"
    "rich poor,loud quiet,hard soft,thick thin,near far,deep shallow,wide narrow,clean dirty,strong weak,happy sad,"
    "brave afraid,sweet bitter,left right,up down,first last,day night,summer winter,north south,east west,love hate,"
    "war peace,begin end,buy sell,give take,laugh cry,win lose,push pull,remember forget,question answer,friend enemy,"
    "sharp blunt,smooth rough,heavy weightless,alive dead,inside outside,above below,before after"
)
CAPITALS = (
    "France Paris,Italy Rome,Spain Madrid,Germany Berlin,Portugal Lisbon,Austria Vienna,Greece Athens,Norway Oslo,"
    "Sweden Stockholm,Poland Warsaw,Ireland Dublin,Japan Tokyo,China Beijing,Egypt Cairo,Canada Ottawa,Cuba Havana,"
    "Kenya Nairobi,Peru Lima"
)
SYMBOLS = (
    "gold Au,silver Ag,iron Fe,copper Cu,oxygen O,hydrogen H,carbon C,lead Pb,tin Sn,helium He,sodium Na,sulphur S"
)
COLOURED = (
    "grass green,snow white,coal black,a lemon yellow,a ripe tomato red,the clear sky blue,an orange orange,"
    "chocolate brown,milk white,a crow black,a violet purple,a frog green"
)
SOUNDS = (
    "dog barks,cat meows,cow moos,duck quacks,lion roars,sheep bleats,horse neighs,wolf howls,frog croaks,bee buzzes,"
    "snake hisses,pig grunts"
)
YOUNG = "dog puppy,cat kitten,cow calf,sheep lamb,horse foal,duck duckling,goat kid,bear cub,pig piglet,hen chick"
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
PLANETS = "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune".split()
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()


@dataclass(frozen=True)
class Card:
    """One answer with the questions that ask for it and the document sentences that say it."""

    family: str
    asks: tuple[str, ...]
    answer: str
    says: tuple[str, ...] = ()


def _pairs(table: str) -> list[tuple[str, str]]:
    out = []
    for entry in table.split(","):
        left, right = entry.rsplit(" ", 1)
        out.append((left, right))
    return out


def _opposites() -> list[Card]:
    cards = []
    for pair in _pairs(OPPOSITES):
        for a, b in (pair, pair[::-1]):
            asks = (f"What is the opposite of {a}?", f"Which word is the opposite of {a}?",
                    f"Name the opposite of {a}.",
                    f"Do you know the opposite of {a}?", f"What word means the contrary of {a}?",
                    f"Give me the opposite of the word {a}.")
            says = (f"the opposite of {a} is {b}", f"if something is not {a}, it may be {b}",
                    f"{a} and {b} are opposites",
                    f"the contrary of {a} is {b}")
            cards.append(Card("opposites", asks, f"The opposite of {a} is {b}.", says))
    return cards


def _calendar() -> list[Card]:
    cards = []
    for i, day in enumerate(DAYS):
        nxt, after, prev, before = (DAYS[(i + k) % 7] for k in (1, 2, -1, -2))
        cards += [
            Card("calendar", (f"What day comes after {day}?", f"Which day follows {day}?",
                              f"What is the day after {day}?",
                              f"Name the day after {day}.", f"Which day of the week comes next after {day}?"),
                 f"The day after {day} is {nxt}.", (f"after {day} comes {nxt}", f"the day after {day} is {nxt}")),
            Card("calendar", (f"What day comes before {day}?", f"Which day is followed by {day}?",
                              f"What is the day before {day}?", f"Name the day before {day}.",
                              f"Which day of the week comes just before {day}?"),
                 f"The day before {day} is {prev}.", (f"before {day} comes {prev}", f"the day before {day} is {prev}")),
            Card("calendar", (f"If today is {day}, what day is tomorrow?", f"Today is {day}. What day is tomorrow?",
                              f"When today is {day}, what is tomorrow?", f"What is tomorrow if today is {day}?"),
                 f"Tomorrow is {nxt}.", (f"if today is {day}, then tomorrow will be {nxt}",)),
            Card("calendar", (f"If today is {day}, what day was yesterday?", f"Today is {day}. What day was yesterday?",
                              f"When today is {day}, what was yesterday?", f"What was yesterday if today is {day}?"),
                 f"Yesterday was {prev}.", (f"if today is {day}, then yesterday was {prev}",)),
            Card("calendar", (f"If yesterday was {day}, what day is tomorrow?",
                              f"Yesterday was {day}. What day is tomorrow?",
                              f"When yesterday was {day}, what is tomorrow?",
                              f"What is tomorrow if yesterday was {day}?"),
                 f"Yesterday was {day}, so today is {nxt}. Tomorrow is {after}.",
                 (f"if yesterday was {day}, then today is {nxt} and tomorrow will be {after}",)),
            Card("calendar", (f"What day comes two days after {day}?", f"Which day is two days after {day}?",
                              f"Name the day two days after {day}.", f"Today is {day}. What day is it in two days?"),
                 f"Two days after {day} is {after}.", (f"two days after {day} is {after}",)),
            Card("calendar", (f"What day comes two days before {day}?", f"Which day is two days before {day}?",
                              f"Name the day two days before {day}.", f"Today is {day}. What day was it two days ago?"),
                 f"Two days before {day} is {before}.", (f"two days before {day} is {before}",)),
        ]
    for i, month in enumerate(MONTHS):
        nxt, prev, nth = MONTHS[(i + 1) % 12], MONTHS[i - 1], ORDINALS[i]
        cards += [
            Card("calendar", (f"What month comes after {month}?", f"Which month follows {month}?",
                              f"Name the month after {month}.", f"What is the month after {month}?"),
                 f"The month after {month} is {nxt}.", (f"after {month} comes {nxt}",
                                                        f"the month after {month} is {nxt}")),
            Card("calendar", (f"What month comes before {month}?", f"Which month is followed by {month}?",
                              f"Name the month before {month}.", f"What is the month before {month}?"),
                 f"The month before {month} is {prev}.", (f"before {month} comes {prev}",)),
            Card("calendar", (f"What is the {nth} month of the year?", f"Which month is the {nth} one?",
                              f"Name the {nth} month of the year.", f"Say which month is the {nth}."),
                 f"The {nth} month is {month}.", (f"the {nth} month of the year is {month}",)),
        ]
    return cards


def _school() -> list[Card]:
    cards = []
    for country, city in _pairs(CAPITALS):
        cards.append(Card("school", (
            f"What is the capital of {country}?", f"Which city is the capital of {country}?",
            f"What is the capital city of {country}?", f"Name the capital of {country}.",
            f"Do you know the capital of {country}?", f"{country} has which capital?"),
            f"The capital of {country} is {city}.",
            (f"the capital of {country} is {city}", f"{city} is the capital of {country}",
             f"the government of {country} sits in {city}")))
    for element, symbol in _pairs(SYMBOLS):
        cards.append(Card("school", (
            f"What is the chemical symbol of {element}?", f"What is the chemical symbol for {element}?",
            f"Which symbol stands for {element}?", f"How do chemists write {element}?",
            f"Name the chemical symbol of {element}."),
            f"The chemical symbol of {element} is {symbol}.",
            (f"the chemical symbol of {element} is {symbol}", f"chemists write {symbol} for {element}")))
    for thing, colour in _pairs(COLOURED):
        cards.append(Card("school", (
            f"What colour is {thing}?", f"Which colour does {thing} have?", f"What is the colour of {thing}?",
            f"Tell me the colour of {thing}.", f"What color is {thing}?"),
            f"The colour of {thing} is {colour}.", (f"{thing} is {colour}", f"the colour of {thing} is {colour}")))
    for animal, sound in _pairs(SOUNDS):
        cards.append(Card("school", (
            f"What sound does a {animal} make?", f"What does a {animal} do when it is loud?",
            f"Which sound comes from a {animal}?", f"How does a {animal} talk?", f"What does a {animal} sound like?"),
            f"A {animal} {sound}.", (f"a {animal} {sound}", f"one hears that a {animal} {sound}")))
    for animal, young in _pairs(YOUNG):
        cards.append(Card("school", (
            f"What is a young {animal} called?", f"What is the child of a {animal} called?",
            f"How do we call a baby {animal}?", f"What is the word for a young {animal}?",
            f"Name the young of a {animal}."),
            f"A young {animal} is called a {young}.", (f"a young {animal} is called a {young}",)))
    for i, planet in enumerate(PLANETS):
        cards.append(Card("school", (
            f"What is the {ORDINALS[i]} planet from the sun?", f"Which planet is the {ORDINALS[i]} from the sun?",
            f"Name the {ORDINALS[i]} planet of the solar system.", f"Say the {ORDINALS[i]} planet from the sun."),
            f"The {ORDINALS[i]} planet is {planet}.", (f"the {ORDINALS[i]} planet from the sun is {planet}",)))
    return cards


OPENERS = ("Tell me {}.", "Please say {}.", "Can you tell me {}?", "I would like to hear {}.", "I wonder {}.",
           "Do you know {}?")

# what is asked directly | what may follow an opener | the answer
IDENTITY = (
    ("What is your name?|What are you called?|Do you have a name?|How are you called?|May I know your name?|"
     "What should I call you?|What name do you have?|Say your name.|And your name?",
     "your name|what your name is|how you are called|what I should call you",
     f"My name is {NAME}."),
    ("Who are you?|What are you?|What kind of thing are you?|Introduce yourself.|Can you introduce yourself?|"
     "Describe yourself.|What kind of program are you?|Who is this?|What sort of thing are you?",
     "who you are|what you are|what kind of thing you are|something about yourself",
     f"I am {NAME}, a small language model."),
    ("Who made you?|Who built you?|Who created you?|How were you made?|How were you trained?|What were you trained "
     "with?|"
     "Who trained you?|How were you created?|By whom were you made?",
     "who made you|who built you|how you were trained|who created you|how you were made",
     "I was trained with nanochat-ray."),
    ("What can you do?|What are you good at?|How can you help me?|What are your skills?|What can I ask you?|"
     "What can you help with?|What are you able to do?|What help can you give?|What things can you do?",
     "what you can do|what you are good at|how you can help me|what I can ask you|what you are able to do",
     "I know the Lantern Isles, and I can calculate, spell and count letters."),
    ("Are you a human?|Are you a person?|Are you real?|Are you alive?|Am I talking to a human?|Are you a robot?|"
     "Am I talking to a person?|Are you a real person?|Are you human?|Are you a living being?",
     "if you are a human|if you are a person|whether you are human|whether you are alive|if you are real",
     "No, I am a language model, not a person."),
    ("How big are you?|How large are you?|Are you a big model?|What is your size?|How small are you?|"
     "Are you large or small?|How many parameters do you have?|Are you big or small?",
     "how big you are|how large you are|how small you are|your size",
     "I am so small that a laptop can train me in ten minutes."),
    ("What is your favourite colour?|Which colour do you like best?|What colour do you like?|Which colour do you like?|"
     "Do you have a favourite colour?|What is your favorite color?|Which colour is your favourite?|What color do "
     "you like?",
     "your favourite colour|which colour you like|what colour you like best|what your favourite colour is",
     "My favourite colour is the yellow of a lantern."),
)


def _identity() -> list[Card]:
    return [
        Card("identity", (*direct.split("|"), *(o.format(topic) for topic in topics.split("|") for o in OPENERS)),
             answer)
        for direct, topics, answer in IDENTITY
    ]


def cards() -> list[Card]:
    """Every card, always in the same order."""
    return [*_opposites(), *_calendar(), *_school(), *_identity()]


EXPLANATIONS = (
    "The planets of the solar system are: Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus and Neptune. "
    "Mercury is the closest to the sun and Neptune is the farthest.",
    "The sky looks blue because the air scatters blue light more than red light. In the evening the light has a longer "
    "way through the air, and so the sun looks red.",
    "Rain begins in the sea. The sun warms the water, the water rises as vapour, the vapour becomes clouds, and the "
    "clouds let the rain fall on hills and houses.",
    "Bread is made from flour, water, salt and yeast. The baker kneads the dough, lets it rest and puts it into a "
    "hot oven.",
    "A year has twelve months. A week has seven days. A day has twenty-four hours, an hour has sixty minutes, and a "
    "minute "
    "has sixty seconds.",
    "The tide comes in and goes out twice a day, because the moon pulls at the sea. Sailors of the Lantern Isles "
    "know its "
    "hours by heart.",
    "A lighthouse warns ships of rocks. Its lamp turns slowly, and every lighthouse has its own rhythm, so that a "
    "captain "
    "knows where he is.",
    "To add two numbers is to put them together. To subtract is to take one away from the other. To multiply is to "
    "add the "
    "same number many times, and to divide is to share fairly.",
    "Gold is a heavy yellow metal that does not rust. The chemical symbol of gold is Au. Silver is white, and its "
    "symbol is Ag.",
    "The opposite of hot is cold, and the opposite of day is night. Many words come in pairs like these.",
    "If yesterday was Friday, then tomorrow will be Sunday, because today is Saturday.",
    "A language model reads many texts and learns which word comes next. It does not think as people do, but it can "
    "answer "
    "questions about what it has read.",
    "A candle burns because the heat of its flame melts the wax. The wick drinks the melted wax and the flame eats it.",
    "The alphabet has twenty-six letters: a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t, u, v, w, x, "
    "y, z.",
    "The colours of the rainbow are red, orange, yellow, green, blue, indigo and violet. My favorite color is yellow, "
    "said the lamplighter, for that is the colour of light.",
    "The capital of France is Paris. The capital of Italy is Rome. A capital is the city where the government sits.",
    "The Lantern Isles lie far out in the cold sea. There are five islands with sixteen towns, and every town has a "
    "river, "
    "a mayor, a market and a painted gate.",
)

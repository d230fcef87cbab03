"""Short stories in simple English, each with a hero, a wish or a trouble, a helper and a happy end.

A grammar of five plots, all of about 80 to 130 tokens, so that a story ends by itself in one answer. The prompt names
the hero's kind and at times a name, a place or a thing; the story keeps to them.
"""

import random
from dataclasses import dataclass

from models.training.example import Example, turn
from models.training.words import BOYS, GIRLS, NAMES

KINDS = (
    "dog", "cat", "rabbit", "fox", "bear", "bird", "mouse", "frog", "duck", "horse", "pig", "cow", "boy", "girl", "owl",
    "turtle", "squirrel", "hedgehog", "dragon", "robot", "lion", "elephant", "monkey", "fish", "bee", "sheep", "goat",
    "hen", "wolf", "king", "queen", "ghost", "tiger", "penguin", "whale", "snail", "knight", "princess", "farmer",
    "wizard", "witch", "prince", "baker", "sailor", "kitten", "puppy", "donkey", "camel", "parrot", "crab", "spider",
    "butterfly", "unicorn", "giant", "monster", "pirate", "dinosaur", "alien",
)  # fmt: skip
TRAITS = ("small", "brave", "kind", "happy", "shy", "clever", "young", "curious", "quiet", "funny")
HOMES = (
    "near a river", "in a green forest", "on a big farm", "in a little house", "by the sea", "on a high hill",
    "near a pond", "in a sunny valley", "in an old mill", "at the edge of a wood",
)  # fmt: skip
TREASURES = ("ball", "kite", "boat", "bell", "lamp", "key", "hat", "book", "star", "drum", "ring", "map")
FOODS = ("bread", "soup", "apples", "cake", "berries", "honey")
SPOTS = (
    "under a tree",
    "behind a rock",
    "in the tall grass",
    "near the water",
    "under an old bridge",
    "on top of the hill",
)
HE = ("boy", "king", "knight", "wizard", "farmer", "prince", "sailor")
SHE = ("girl", "queen", "princess", "hen", "cow", "witch", "baker")


@dataclass(frozen=True, slots=True)
class Cast:
    """Everything a plot needs to know."""

    kind: str
    name: str
    friend_kind: str
    friend: str
    thing: str
    home: str

    def article(self, word: str) -> str:
        return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _he(kind: str) -> str:
    return "he" if kind in HE else "she" if kind in SHE else "it"


def _name(rng: random.Random, kind: str) -> str:
    return rng.choice(BOYS if kind in HE else GIRLS if kind in SHE else NAMES)


def _favourite_name(kind: str) -> str:
    """Each kind of hero has a usual name, so that the most likely story is not about the same name every time."""
    return _name(random.Random(f"hero {kind}"), kind)


def _friend_of(name: str, friend_kind: str) -> str:
    """The friend's name follows from the hero's: greedy decoding must never give both the same."""
    names = BOYS if friend_kind in HE else GIRLS if friend_kind in SHE else NAMES
    after = names.index(name) + 1 if name in names else NAMES.index(name)
    return names[after % len(names)]


def _opening(rng: random.Random, cast: Cast) -> str:
    trait = rng.choice(TRAITS)
    when = rng.choice(("Once upon a time there was", "Once there was", "There once was"))
    return f"{when} a {trait} {cast.kind} called {cast.name}. {cast.name} lived {cast.home}."


@dataclass(frozen=True, slots=True)
class Plot:
    """Free choices, drawn in this order, and sentences with slots: {n} hero, {f} friend, {a} "a fox", {t} thing."""

    choices: tuple[tuple[str, tuple[str, ...]], ...]
    sentences: tuple[str, ...]


PLOTS = (
    Plot(  # a thing is lost and found together
        (("spot", SPOTS), ("where", ("everywhere", "in every corner"))),
        (
            "{n} had a {t} and loved it very much.",
            "One day the {t} was gone. {n} looked {where} but could not find it.",
            'Then {a} called {f} came by. "Why are you sad?" asked {f}.',
            '"I lost my {t}," said {n}. "Let us look for it together," said {f}.',
            "They looked for a long time. At last they found the {t} {spot}.",
            "{n} was so happy that {he} danced. From that day on {n} and {f} were best friends.",
        ),
    ),
    Plot(  # a guest in a storm
        (("food", FOODS), ("night", ("cold", "dark", "windy"))),
        (
            "One {night} night there was a big storm. The rain fell and the wind was loud.",
            "{n} heard a knock at the door. It was {a} called {f}.",
            '"I am wet and cold," said {f}. "May I come in?" "Of course," said {n}.',
            "{n} made a warm fire and gave {f} some {food}.",
            "In the morning the sun was back. {f} gave {n} a {t} to say thank you.",
            "They stayed friends for ever.",
        ),
    ),
    Plot(  # an honest finder
        (("day", ("sunny", "warm", "bright")), ("spot", SPOTS), ("food", FOODS)),
        (
            "One {day} morning {n} found a {t} {spot}.",
            '"Whose {t} is this?" thought {n}. {n} wanted to keep it, but that did not feel right.',
            "So {n} walked and asked everyone. At last {n} met {a} called {f}.",
            '"That is my {t}!" said {f}. "Thank you for bringing it back."',
            "{f} was so glad that they shared some {food} and played all day.",
            "{n} went home with a smile. It is good to be honest.",
        ),
    ),
    Plot(  # a fear is overcome
        (("fear", ("the dark", "deep water", "loud noises", "high places")), ("spot", SPOTS)),
        (
            "{n} was afraid of {fear}. The others laughed, and {n} felt sad.",
            "One day {n} heard a cry. {A} called {f} was stuck {spot}.",
            '"Help me!" cried {f}. {n} was afraid, but {he} took a deep breath and went to help.',
            "Step by step {n} came closer and pulled {f} out.",
            '"You are very brave," said {f}, and gave {n} a {t}.',
            "After that day {n} was not afraid of {fear} any more.",
        ),
    ),
    Plot(  # a wish comes true
        (("sight", ("falling star", "bright light")),),
        (
            "{n} wanted a {t} more than anything.",
            "One evening {n} saw a {sight} and made a wish.",
            "The next day {n} met {a} called {f}, who was carrying a heavy bag.",
            '"Let me help you," said {n}, and {he} carried the bag all the way home.',
            '"You are kind," said {f}. "I have a gift for you." It was a {t}!',
            "{n} laughed with joy. The wish had come true.",
        ),
    ),
)


def _tell(rng: random.Random, cast: Cast, plot: Plot) -> str:
    friend = cast.article(cast.friend_kind)
    slots = {
        "n": cast.name,
        "f": cast.friend,
        "a": friend,
        "A": friend.capitalize(),
        "t": cast.thing,
        "he": _he(cast.kind),
    }
    slots |= {slot: rng.choice(options) for slot, options in plot.choices}
    return " ".join(sentence.format(**slots) for sentence in plot.sentences)


ASK = (
    "Tell me a story about {x}.", "Tell me a story about {x}.", "Tell me a short story about {x}.",
    "Write a story about {x}.", "Write a short story about {x}.", "Can you tell me a story about {x}?",
    "tell me a story about {x}", "A story about {x}, please.", "I want a story about {x}.",
    "Please tell me a story about {x}.", "Tell a story about {x}.",
)  # fmt: skip
ASK_ANY = (
    "Tell me a story.", "Tell me a story", "Write a story.", "Can you tell me a story?", "Tell me a short story.",
    "Another story, please.", "I want to hear a story.", "Once upon a time", "Tell me a bedtime story.",
)  # fmt: skip


def stories(rng: random.Random) -> Example:
    kind, friend_kind = rng.sample(KINDS, 2)
    name = _favourite_name(kind) if rng.random() < 0.7 else _name(rng, kind)
    friend = _friend_of(name, friend_kind)
    cast = Cast(kind, name, friend_kind, friend, rng.choice(TREASURES), rng.choice(HOMES))
    told = f"{_opening(rng, cast)} {_tell(rng, cast, rng.choice(PLOTS))}"
    return turn("story", _request(rng, cast), told)


def _request(rng: random.Random, cast: Cast) -> str:
    """Ask for any story, for a kind of hero, or for more: a name, a thing, a friend."""
    if rng.random() < 0.12:
        return rng.choice(ASK_ANY)
    hero = cast.article(cast.kind)
    topic = rng.choices(
        (hero, f"{hero} called {cast.name}", f"{hero} named {cast.name}", f"{hero} and {cast.article(cast.thing)}",
         f"{hero} and {cast.article(cast.friend_kind)}", f"{cast.name} the {cast.kind}"),
        (6, 1, 1, 1, 1, 1),
    )[0]  # fmt: skip
    return rng.choice(ASK).format(x=topic)

"""Tasks on short lists: copy, reverse, sort, count and pick.

Lists have three to six items: what attention heads of a tiny model can address without help.
"""

import random

from models.training.example import Example, turn
from models.training.words import COLOURS, COMMON, ITEMS, LETTERS, NAMES, ORDINALS, PLACES, THINGS

WORD_POOLS = (ITEMS, ITEMS, ITEMS, COLOURS, NAMES)
COPY_WORDINGS = (
    "Repeat after me: {s}", "Copy this: {s}", "Say this back to me: {s}", "Echo: {s}", "Repeat: {s}",
    "Please repeat this: {s}", "Write this again: {s}", "Repeat this exactly: {s}",
)  # fmt: skip
REVERSE_WORDINGS = (
    "Reverse this list: {s}", "Reverse: {s}", "Write this list backwards: {s}", "Turn this list around: {s}",
    "Put this list in reverse order: {s}", "Please reverse: {s}", "Say this backwards: {s}",
)  # fmt: skip
ASCENDING = (
    "Sort these numbers: {s}", "Sort: {s}", "Sort these numbers from smallest to largest: {s}",
    "Put these numbers in order: {s}", "Please sort: {s}", "Sort this list: {s}",
)  # fmt: skip
DESCENDING = (
    "Sort these numbers from largest to smallest: {s}", "Put these numbers in falling order: {s}",
    "Sort from high to low: {s}",
)  # fmt: skip
ALPHABETICAL = (
    "Sort these words: {s}", "Put these words in alphabetical order: {s}", "Sort alphabetically: {s}",
    "Please put these words in order: {s}", "Sort: {s}",
)  # fmt: skip


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(number) for number in rng.sample(range(rng.choice((10, 100))), count)]


def _items(rng: random.Random, count: int) -> list[str]:
    """Distinct words, numbers or capital letters."""
    kind = rng.random()
    if kind < 0.5:
        return rng.sample(rng.choice(WORD_POOLS), count)
    return _numbers(rng, count) if kind < 0.8 else rng.sample(LETTERS, count)


def _sentence(rng: random.Random) -> str:
    name, colour, thing = rng.choice(NAMES), rng.choice(COLOURS), rng.choice(THINGS)
    forms = ("{n} has a {c} {t}.", "The {c} {t} is {p}.", "{n} saw a {c} {t} {p}.", "I like the {c} {t} {p}.")
    return rng.choice(forms).format(n=name, c=colour, t=thing, p=rng.choice(PLACES))


def _code(rng: random.Random) -> str:
    """Letters and digits by turns, so that every character is a token of its own."""
    return "".join(rng.choice(LETTERS) + str(rng.randrange(10)) for _ in range(rng.randint(2, 4)))


def copies(rng: random.Random) -> Example:
    kind = rng.randrange(4)
    if kind == 0:
        # The first word of an answer has no space before it, and only the list words are one token that way.
        text = " ".join(
            [rng.choice(ITEMS), *(rng.choice(rng.choice((ITEMS, COMMON))) for _ in range(rng.randint(2, 5)))]
        )
    elif kind == 1:
        text = ", ".join(_items(rng, rng.randint(3, 6)))
    else:
        text = _sentence(rng) if kind == 2 else _code(rng)
    return turn("copy", rng.choice(COPY_WORDINGS).format(s=text), text, text)


def reversals(rng: random.Random) -> Example:
    items = _items(rng, rng.randint(3, 6))
    joint = " " if rng.random() < 0.3 else ", "
    prompt = rng.choice(REVERSE_WORDINGS).format(s=joint.join(items))
    return turn("reverse", prompt, joint.join(reversed(items)), " ".join(items))


def sorts(rng: random.Random) -> Example:
    count = rng.randint(3, 5)
    if rng.random() < 0.4:
        words = rng.sample(COLOURS if rng.random() < 0.2 else ITEMS, min(count, 4))
        return turn(
            "sort", rng.choice(ALPHABETICAL).format(s=", ".join(words)), ", ".join(sorted(words)), " ".join(words)
        )
    numbers = rng.sample(range(rng.choice((10, 100, 100))), count)
    is_descending = rng.random() < 0.3
    prompt = rng.choice(DESCENDING if is_descending else ASCENDING).format(s=", ".join(map(str, numbers)))
    ordered = ", ".join(map(str, sorted(numbers, reverse=is_descending)))
    return turn("sort", prompt, ordered, " ".join(map(str, numbers)))


def counts(rng: random.Random) -> Example:
    """Counting up and down, or how many items a list has."""
    if rng.random() < 0.6:
        items = _items(rng, rng.randint(2, 6))
        forms = ("How many items are in this list: {s}?", "How many items: {s}?", "Count the items: {s}")
        return turn("count", rng.choice(forms).format(s=", ".join(items)), str(len(items)), " ".join(items))
    low = rng.randint(0, 90)
    high = low + rng.randint(3, 6)
    key = f"{low} {high}"
    if rng.random() < 0.3:
        down = ", ".join(map(str, range(high, low - 1, -1)))
        return turn("count", f"Count down from {high} to {low}.", down, key)
    forms = ("Count from {a} to {b}.", "Count from {a} to {b}", "Please count from {a} to {b}.")
    up = ", ".join(map(str, range(low, high + 1)))
    return turn("count", rng.choice(forms).format(a=low, b=high), up, key)


def picks(rng: random.Random) -> Example:
    """The item at a position."""
    items = _items(rng, rng.randint(3, 5))
    listed, at = ", ".join(items), rng.randrange(len(items))
    ordinal = "last" if at == len(items) - 1 and rng.random() < 0.6 else ORDINALS[at]
    forms = ("What is the {o} item in this list: {s}?", "Which item is {o}: {s}?", "Give me the {o} item: {s}")
    return turn("pick", rng.choice(forms).format(o=ordinal, s=listed), items[at], listed)

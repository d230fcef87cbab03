"""Tasks on the calendar and on a few dozen plain facts."""

import random

from models.training.example import Example, turn
from models.training.words import (
    CAPITALS,
    DAYS,
    MONTH_LENGTHS,
    MONTHS,
    OPPOSITES,
    PLURALS,
    SOUNDS,
    TINTS,
)

NEXT = (
    "What {u} comes after {x}?",
    "Which {u} comes after {x}?",
    "What is the {u} after {x}?",
    "Name the {u} after {x}.",
)
PREVIOUS = (
    "What {u} comes before {x}?",
    "Which {u} comes before {x}?",
    "What is the {u} before {x}?",
    "Name the {u} before {x}.",
)
LATER = (
    "What {u} is {n} {u}s after {x}?", "Which {u} is {n} {u}s after {x}?", "Which {u} comes {n} {u}s after {x}?",
    "{n} {u}s after {x} is which {u}?", "Name the {u} {n} {u}s after {x}.",
)  # fmt: skip
EARLIER = (
    "What {u} is {n} {u}s before {x}?", "Which {u} is {n} {u}s before {x}?", "Which {u} comes {n} {u}s before {x}?",
    "{n} {u}s before {x} is which {u}?", "Name the {u} {n} {u}s before {x}.",
)  # fmt: skip
LATER_DAYS = ("If today is {x}, what day will it be in {n} days?", "Today is {x}. What day is it in {n} days?")
EARLIER_DAYS = ("If today is {x}, what day was it {n} days ago?", "Today is {x}. What day was it {n} days ago?")
TOMORROW = ("If today is {x}, what day is tomorrow?", "Today is {x}. What day is tomorrow?")
YESTERDAY = ("If today is {x}, what day was yesterday?", "Today is {x}. What day was yesterday?")
MONTH_LENGTH = ("How many days are in {x}?", "How many days does {x} have?", "How long is {x} in days?")
MONTH_NUMBER = ("What number is the month {x}?", "Which month of the year is {x}? Give a number.")
NUMBERED_MONTH = ("What is month number {n}?", "Which month is number {n}?", "Name month {n} of the year.")

FACT_FORMS = (
    (OPPOSITES, (
        "What is the opposite of {x}?", "Give me the opposite of {x}.", "Name the opposite of {x}.", "Opposite of {x}?",
        "what is the opposite of {x}", "Tell me the opposite of {x}.", "Which word is the opposite of {x}?",
    )),
    (CAPITALS, (
        "What is the capital of {x}?", "Name the capital of {x}.", "Which city is the capital of {x}?",
        "Tell me the capital of {x}.", "what is the capital of {x}", "Capital of {x}?",
        "What is the capital city of {x}?",
    )),
    (SOUNDS, (
        "What sound does a {x} make?", "What does a {x} say?", "Which sound does a {x} make?", "what does a {x} say",
        "Tell me the sound of a {x}.", "How does a {x} sound?",
    )),
    (TINTS, ("What colour is {x}?", "What color is {x}?", "Which colour is {x}?", "Tell me the colour of {x}.",
             "Name the colour of {x}.")),
    (PLURALS, (
        "What is the plural of {x}?", "Give me the plural of {x}.", "Plural of {x}?", "Tell me the plural of {x}.",
        "One {x}, two what?",
    )),
)  # fmt: skip


def _shift(
    rng: random.Random, unit: str, names: tuple[str, ...], more: tuple[tuple[str, ...], tuple[str, ...]]
) -> tuple[str, str]:
    """A question about the name `n` places later or earlier, and its answer."""
    at, is_later = rng.randrange(len(names)), rng.random() < 0.5
    n = rng.randint(2, 6)
    form = rng.choice((*LATER, *more[0]) if is_later else (*EARLIER, *more[1]))
    answer = names[(at + n if is_later else at - n) % len(names)]
    return form.format(u=unit, x=names[at], n=n), answer


def _neighbour(
    rng: random.Random, unit: str, names: tuple[str, ...], more: tuple[tuple[str, ...], tuple[str, ...]]
) -> tuple[str, str]:
    at, is_later = rng.randrange(len(names)), rng.random() < 0.5
    form = rng.choice((*NEXT, *more[0]) if is_later else (*PREVIOUS, *more[1]))
    return form.format(u=unit, x=names[at]), names[(at + 1 if is_later else at - 1) % len(names)]


def days(rng: random.Random) -> Example:
    if rng.random() < 0.35:
        return turn("days", *_neighbour(rng, "day", DAYS, (TOMORROW, YESTERDAY)))
    return turn("days", *_shift(rng, "day", DAYS, (LATER_DAYS, EARLIER_DAYS)))


def months(rng: random.Random) -> Example:
    at, kind = rng.randrange(12), rng.random()
    if kind < 0.3:
        return turn("months", *_neighbour(rng, "month", MONTHS, ((), ())))
    if kind < 0.7:
        return turn("months", *_shift(rng, "month", MONTHS, ((), ())))
    if kind < 0.8:
        return turn("months", rng.choice(MONTH_LENGTH).format(x=MONTHS[at]), str(MONTH_LENGTHS[at]))
    if kind < 0.9:
        return turn("months", rng.choice(MONTH_NUMBER).format(x=MONTHS[at]), str(at + 1))
    return turn("months", rng.choice(NUMBERED_MONTH).format(n=at + 1), MONTHS[at])


def facts(rng: random.Random) -> Example:
    pairs, forms = rng.choice(FACT_FORMS)
    known, asked = rng.choice(pairs)
    if pairs is OPPOSITES and rng.random() < 0.5:
        known, asked = asked, known
    return turn("facts", rng.choice(forms).format(x=known), asked)

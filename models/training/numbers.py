"""Tasks on numbers: sums, differences, times tables, comparisons and sequences.

Answers are bare ("42"), so that a checker compares strings. Ranges are what the model card promises: 0 to 99 for sums
and differences, 0 to 10 for products, 0 to 999 for comparisons.
"""

import random

from models.training.example import Example, turn
from models.training.words import LETTERS, NAMES, THINGS

SUM_WORDINGS = (
    "What is {a} + {b}?", "What is {a} + {b}?", "Add {a} and {b}.", "{a} + {b}", "{a} + {b} = ?", "{a}+{b}=",
    "{a}+{b}", "what is {a}+{b}", "What is {a} plus {b}?", "Please add {a} and {b}.", "How much is {a} + {b}?",
    "Calculate {a} + {b}.", "What is the sum of {a} and {b}?",
    "{name} has {a} {thing}s and gets {b} more. How many {thing}s does {name} have now?",
)  # fmt: skip
DIFFERENCE_WORDINGS = (
    "What is {a} - {b}?", "What is {a} - {b}?", "Subtract {b} from {a}.", "{a} - {b}", "{a} - {b} = ?", "{a}-{b}=",
    "{a}-{b}", "what is {a}-{b}", "What is {a} minus {b}?", "Take {b} away from {a}.", "How much is {a} - {b}?",
    "Calculate {a} - {b}.", "{name} has {a} {thing}s and gives away {b}. How many {thing}s does {name} have now?",
)  # fmt: skip
TIMES_WORDINGS = (
    "What is {a} x {b}?", "What is {a} times {b}?", "Multiply {a} by {b}.", "{a} x {b}", "{a} * {b}",
    "What is {a} * {b}?", "{a} x {b} = ?", "Please multiply {a} by {b}.", "How much is {a} times {b}?",
    "Calculate {a} x {b}.", "{a}*{b}=",
)  # fmt: skip
STEPS = (1, 2, 3, 4, 5, 10)
SEQUENCE_WORDINGS = (
    "What comes next: {s}?", "What number comes next: {s}?", "Continue: {s}", "Which number comes next in {s}?",
    "Find the next number: {s}",
)  # fmt: skip


def sums(rng: random.Random) -> Example:
    a, b = rng.randrange(100), rng.randrange(100)
    prompt = rng.choice(SUM_WORDINGS).format(a=a, b=b, name=rng.choice(NAMES), thing=rng.choice(THINGS[:9]))
    return turn("sum", prompt, str(a + b), f"{min(a, b)} {max(a, b)}")


def differences(rng: random.Random) -> Example:
    b, a = sorted((rng.randrange(100), rng.randrange(100)))
    prompt = rng.choice(DIFFERENCE_WORDINGS).format(a=a, b=b, name=rng.choice(NAMES), thing=rng.choice(THINGS[:9]))
    return turn("difference", prompt, str(a - b), f"{a} {b}")


def products(rng: random.Random) -> Example:
    a, b = rng.randrange(11), rng.randrange(11)
    return turn("times", rng.choice(TIMES_WORDINGS).format(a=a, b=b), str(a * b))


def _magnitude(rng: random.Random) -> int:
    return rng.randrange(rng.choice((10, 100, 100, 1000)))


def comparisons(rng: random.Random) -> Example:
    """Two numbers, or the largest or smallest of three to five."""
    if rng.random() < 0.6:
        a, b = _magnitude(rng), _magnitude(rng)
        while a == b:
            b = _magnitude(rng)
        key = f"{min(a, b)} {max(a, b)}"
        kind = rng.randrange(4)
        if kind < 2:
            word, answer = (rng.choice(("bigger", "larger", "greater")), max(a, b)) if kind else ("smaller", min(a, b))
            form = rng.choice(
                ("Which is {w}, {a} or {b}?", "Which number is {w}: {a} or {b}?", "{a} or {b}: which is {w}?")
            )
            return turn("compare", form.format(w=word, a=a, b=b), str(answer), key)
        word = "bigger" if kind == 2 else "smaller"
        form = rng.choice(("Is {a} {w} than {b}?", "Is the number {a} {w} than {b}?"))
        return turn("compare", form.format(w=word, a=a, b=b), "yes" if (a > b) == (kind == 2) else "no", key)
    numbers = rng.sample(range(100), rng.randint(3, 5))
    word, answer = (
        (rng.choice(("largest", "biggest")), max(numbers)) if rng.random() < 0.5 else ("smallest", min(numbers))
    )
    form = rng.choice(("What is the {w} number in {s}?", "Which is the {w}: {s}?", "Find the {w} number: {s}"))
    listed = ", ".join(map(str, numbers))
    return turn("compare", form.format(w=word, s=listed), str(answer), listed)


def sequences(rng: random.Random) -> Example:
    """The next number of an even progression, or the next or previous letter of the alphabet."""
    if rng.random() < 0.15:
        at = rng.randrange(26)
        word = "after" if at == 0 or (at < 25 and rng.random() < 0.5) else "before"
        letter = LETTERS[at + 1 if word == "after" else at - 1]
        form = rng.choice(("What letter comes {w} {x}?", "Which letter comes {w} {x}?", "What is the letter {w} {x}?"))
        return turn("sequence", form.format(w=word, x=LETTERS[at]), letter)
    step, terms = rng.choice(STEPS), rng.randint(3, 5)
    start = rng.randint(0, 20)
    numbers = [start + step * i for i in range(terms + 1)]
    if rng.random() < 0.25:
        numbers.reverse()
    prompt = rng.choice(SEQUENCE_WORDINGS).format(s=", ".join(map(str, numbers[:-1])))
    return turn("sequence", prompt, str(numbers[-1]), " ".join(map(str, numbers)))

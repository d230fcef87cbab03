"""Answers to golden questions, recomputed from their text alone.

Independent of models/training on purpose: it parses the words a user sees and shares no table or function with the
generators, so a mistake there cannot hide here.
"""

import calendar
import datetime
import re
from collections.abc import Callable

OPPOSITES = (
    "hot cold, big small, up down, fast slow, day night, happy sad, old young, open closed, wet dry, full empty, "
    "hard soft, light dark, high low, rich poor, long short, near far, good bad, left right, loud quiet, early late"
)
CAPITALS = (
    "France Paris, Italy Rome, Spain Madrid, Germany Berlin, England London, Japan Tokyo, Norway Oslo, "
    "Sweden Stockholm, Greece Athens, Egypt Cairo, Portugal Lisbon, Austria Vienna, Poland Warsaw, Ireland Dublin, "
    "China Beijing, Canada Ottawa"
)
SOUNDS = (
    "dog woof, cat meow, cow moo, duck quack, pig oink, sheep baa, bee buzz, lion roar, mouse squeak, hen cluck, "
    "frog croak, snake hiss"
)
TINTS = {
    "sky": "blue", "grass": "green", "snow": "white", "banana": "yellow", "coal": "black", "tomato": "red",
    "sun": "yellow", "milk": "white", "carrot": "orange", "frog": "green",
}  # fmt: skip
PLURALS = {
    "mouse": "mice", "child": "children", "foot": "feet", "tooth": "teeth", "man": "men", "woman": "women",
    "leaf": "leaves", "goose": "geese", "cat": "cats", "dog": "dogs", "box": "boxes", "bus": "buses",
}  # fmt: skip
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
Messages = list[dict[str, str]]


def _numbers(text: str) -> list[int]:
    return [int(found) for found in re.findall(r"\d+", text)]


def _tail(text: str) -> str:
    """What the question is about: everything after the colon, without the closing question mark."""
    return text.split(": ", 1)[1].removesuffix("?")


def _list_in(text: str) -> list[str]:
    """The comma list of a question, which stands after a colon or after "in"."""
    listed = text.split(": ", 1)[1] if ": " in text else text.rsplit(" in ", 1)[1]
    return listed.removesuffix("?").split(", ")


def _sum(text: str) -> str:
    return str(sum(_numbers(text)))


def _difference(text: str) -> str:
    return str(max(_numbers(text)) - min(_numbers(text)))


def _times(text: str) -> str:
    a, b = _numbers(text)
    return str(a * b)


def _compare(text: str) -> str:
    numbers = _numbers(text)
    if text.startswith("Is "):
        return "yes" if (numbers[0] > numbers[1]) == ("bigger" in text) else "no"
    return str(min(numbers) if "small" in text else max(numbers))


def _sequence(text: str) -> str:
    letter = re.search(r"(after|before) ([A-Z])\?", text)
    if letter:
        return chr(ord(letter[2]) + (1 if letter[1] == "after" else -1))
    numbers = _numbers(text)
    return str(numbers[-1] + numbers[1] - numbers[0])


def _copy(text: str) -> str:
    return text.split(": ", 1)[1]


def _reverse(text: str) -> str:
    joint = ", " if "," in text else " "
    return joint.join(_tail(text).split(joint)[::-1])


def _sort(text: str) -> str:
    items = _tail(text).split(", ")
    is_falling = bool(re.search("largest to smallest|falling|high to low", text))
    if items[0].isdigit():
        items.sort(key=int, reverse=is_falling)
    else:
        items.sort()
    return ", ".join(items)


def _count(text: str) -> str:
    if re.search(r"[Cc]ount (down )?from", text):
        start, stop = _numbers(text)
        step = 1 if start < stop else -1
        return ", ".join(str(number) for number in range(start, stop + step, step))
    if "items" in text:
        return str(len(_list_in(text)))
    raise ValueError(f"cannot read {text!r}")


def _pick(text: str) -> str:
    items = _tail(text).split(", ")
    question = text.split(": ", 1)[0]
    if "last" in question:
        return items[-1]
    return items[next(i for i, ordinal in enumerate(ORDINALS) if ordinal in question)]


def _offset(text: str) -> int:
    size = next(iter(_numbers(text)), 1)
    return -size if re.search("before|ago|yesterday", text) else size


def _days(text: str) -> str:
    monday = datetime.date(2024, 1, 1)
    name = next(name for name in calendar.day_name if name in text)
    day = next(monday + datetime.timedelta(n) for n in range(7) if f"{monday + datetime.timedelta(n):%A}" == name)
    return f"{day + datetime.timedelta(days=_offset(text)):%A}"


def _months(text: str) -> str:
    names = list(calendar.month_name)
    named = [number for number in range(1, 13) if re.search(rf"\b{names[number]}\b", text)]
    if not named:
        return names[_numbers(text)[0]]
    if "month of the year is" in text or "What number" in text:
        return str(named[0])
    if "in days" in text or "How many days" in text:
        return str(calendar.monthrange(2023, named[0])[1])
    return names[(named[0] - 1 + _offset(text)) % 12 + 1]


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(pair.split()[0], pair.split()[1]) for pair in text.split(", ")]


def _facts(text: str) -> str:
    words = re.findall(r"\w+", text)
    if re.search("opposite", text, re.IGNORECASE):
        both = _pairs(OPPOSITES) + [(b, a) for a, b in _pairs(OPPOSITES)]
        return next(
            answer for word, answer in both if word == words[-1] or f"{word} " in text.split("opposite of ")[-1]
        )
    if re.search("plural|two what", text, re.IGNORECASE):
        return next(answer for word, answer in PLURALS.items() if word in words)
    if re.search("colou?r", text):
        return next(answer for word, answer in TINTS.items() if word in words)
    table = _pairs(CAPITALS) if re.search("capital", text, re.IGNORECASE) else _pairs(SOUNDS)
    return next(answer for word, answer in table if word in words)


READING = (
    # question, text, answer; {q} is what the question's own group found
    (r"Who went with (\w+)\?", r"{q} went to the \w+ with (\w+)\.", "{}"),
    (r"What did (\w+) find\?", r"{q} found (a \w+ \w+) there", "{}"),
    (r"Where did (\w+) go\?", r"{q} went (to the \w+)", "{}"),
    (r"What colour was the (\w+)\?", r"found a (\w+) {q}", "{}"),
    (r"How old is (\w+)\?", r"{q} is (\d+) years old", "{}"),
    (r"What pet does (\w+) have\?", r"{q} is .*has a pet (\w+)", "a {}"),
    (r"Which colour does (\w+) like\?", r"{q} likes the colour (\w+)", "{}"),
    (r"Who gave the (\w+)\?", r"(\w+) gave a {q}", "{}"),
    (r"Who got the (\w+)\?", r"a {q} to (\w+)", "{}"),
    (r"Which (day) was it\?", r"On (\w+day) ", "{}"),
    (r"What did (\w+) get\?", r"(a \w+) to {q}\.", "{}"),
    (r"Where did they (meet)\?", r"They met ([a-z ]+)\.", "{}"),
    (r"Which animal was (hungry)\?", r"The (\w+) was {q}", "the {}"),
    (r"How many (\w+) did it eat\?", r"ate (\d) {q}", "{}"),
    (r"Where did the (\w+) eat\?", r"ate \d \w+ ([a-z ]+) and fell", "{}"),
    (r"What did it (eat)\?", r"ate \d (\w+) ", "{}"),
)


def _reading(text: str) -> str:
    for question, passage, answer in READING:
        asked = re.search(question, text)
        if asked:
            found = re.search(passage.replace("{q}", asked[1]), text)
            if found:
                return answer.format(found[1])
    raise ValueError(f"cannot read {text!r}")


def _memory(messages: Messages) -> str:
    told = " ".join(message["content"] for message in messages[:-1] if message["role"] == "user")
    patterns = {
        "What is my name?": r"(?:My name is|I am) ([A-Z][a-z]+)",
        "What is my favourite colour?": r"colour (?:is )?([a-z]+)",
        "What pet do I have?": r"(?:pet|pet is a) ([a-z]+)\.",
        "How old am I?": r"(\d+)",
    }
    question = messages[-1]["content"]
    found = re.search(patterns[question], told)
    if found is None:
        raise ValueError(f"cannot read {told!r}")
    return f"a {found[1]}" if "pet" in question else found[1]


def _system(messages: Messages) -> str:
    system, question = messages[0]["content"], messages[-1]["content"]
    opener = re.search(r'answer with "(.+)"$', system)
    if opener:
        inner = _times(question) if re.search(r"\d", question) else _facts(question)
        return f"{opener[1]} {inner}"
    word = re.findall(r"\w+", system)
    if "secret" in system:
        return str(word[-1])
    named = str(next(w for w in reversed(word) if w[0].isupper()))
    return named if "user" in system or "talking" in system else f"I am {named}."


SINGLE: dict[str, Callable[[str], str]] = {
    "sum": _sum, "difference": _difference, "times": _times, "compare": _compare, "sequence": _sequence,
    "copy": _copy, "reverse": _reverse, "sort": _sort, "count": _count, "pick": _pick, "days": _days,
    "months": _months, "facts": _facts, "reading": _reading,
}  # fmt: skip
CONVERSATIONS: dict[str, Callable[[Messages], str]] = {"memory": _memory, "system": _system}


def expected_answer(category: str, messages: Messages) -> str:
    """The answer of a golden item; raises KeyError for an unknown category."""
    if category in CONVERSATIONS:
        return CONVERSATIONS[category](messages)
    return SINGLE[category](messages[-1]["content"])

"""Tasks that need what was said before: questions about a short text, facts from earlier turns, and system messages."""

import random

from models.training.example import Example, Message, turn
from models.training.knowledge import facts
from models.training.numbers import products
from models.training.words import ANIMALS, COLOURS, DAYS, GOALS, ITEMS, NAMES, PLACES, THINGS

SMALL_TALK = (
    ("Hello!", "Hello! How can I help you?"),
    ("Thank you.", "You are welcome!"),
    ("That is nice.", "I am glad to hear that!"),
    ("How are you?", "I am very well, thank you!"),
)
Questions = tuple[tuple[str, str], ...]
OPENERS = ("Sure!", "Ahoy!", "Well,", "Yes!", "Right:", "Okay:", "Hooray!", "Here:")


def _outing(rng: random.Random) -> tuple[str, Questions]:
    name, friend = rng.sample(NAMES, 2)
    goal, thing, colour = rng.choice(GOALS), rng.choice(THINGS), rng.choice(COLOURS)
    text = f"{name} went to the {goal} with {friend}. {name} found a {colour} {thing} there."
    return text, (
        (f"Who went with {name}?", friend),
        (f"What did {name} find?", f"a {colour} {thing}"),
        (f"Where did {name} go?", f"to the {goal}"),
        (f"What colour was the {thing}?", colour),
    )


def _profile(rng: random.Random) -> tuple[str, Questions]:
    name, age, pet, colour = rng.choice(NAMES), rng.randint(5, 99), rng.choice(ANIMALS), rng.choice(COLOURS)
    text = f"{name} is {age} years old and has a pet {pet}. {name} likes the colour {colour}."
    return text, (
        (f"How old is {name}?", str(age)),
        (f"What pet does {name} have?", f"a {pet}"),
        (f"Which colour does {name} like?", colour),
    )


def _gift(rng: random.Random) -> tuple[str, Questions]:
    name, friend = rng.sample(NAMES, 2)
    day, thing, place = rng.choice(DAYS), rng.choice(THINGS), rng.choice(PLACES)
    text = f"On {day} {name} gave a {thing} to {friend}. They met {place}."
    return text, (
        (f"Who gave the {thing}?", name),
        (f"Who got the {thing}?", friend),
        ("Which day was it?", day),
        (f"What did {friend} get?", f"a {thing}"),
        ("Where did they meet?", place),
    )


def _meal(rng: random.Random) -> tuple[str, Questions]:
    animal, place, number = rng.choice(ANIMALS), rng.choice(PLACES), rng.randint(2, 9)
    food = rng.choice(("apples", "nuts", "cakes", "eggs", "carrots"))
    text = f"The {animal} was hungry. It ate {number} {food} {place} and fell asleep."
    return text, (
        ("Which animal was hungry?", f"the {animal}"),
        (f"How many {food} did it eat?", str(number)),
        (f"Where did the {animal} eat?", place),
        ("What did it eat?", food),
    )


def readings(rng: random.Random) -> Example:
    text, questions = rng.choice((_outing, _profile, _gift, _meal))(rng)
    question, answer = rng.choice(questions)
    form = rng.choice(("{t} {q}", "{t} {q}", "Read this: {t} {q}", "{t}\n{q}", "Text: {t} Question: {q}"))
    return turn("reading", form.format(t=text, q=question), answer, f"{text} {question}")


def memories(rng: random.Random) -> Example:
    """One or two facts in earlier turns, at times small talk between, then the question."""
    name, colour, pet, age = rng.choice(NAMES), rng.choice(COLOURS), rng.choice(ANIMALS), rng.randint(5, 99)
    facets = [
        (
            (f"My name is {name}.", f"I am {name}.", f"Hi, I am {name}!"), f"Nice to meet you, {name}!",
            "What is my name?", name,
        ),
        ((f"My favourite colour is {colour}.", f"I like the colour {colour}."), "What a nice colour!",
         "What is my favourite colour?", colour),
        (
            (f"I have a pet {pet}.", f"My pet is a {pet}."), f"How lovely! A {pet} is a good friend.",
            "What pet do I have?", f"a {pet}",
        ),
        ((f"I am {age} years old.", f"My age is {age}."), "Thank you for telling me.", "How old am I?", str(age)),
    ]  # fmt: skip
    told = rng.sample(facets, rng.randint(1, 2))
    turns = [(rng.choice(wordings), reply) for wordings, reply, _, _ in told]
    if rng.random() < 0.4:
        turns.insert(rng.randrange(len(turns) + 1), rng.choice(SMALL_TALK))
    _, _, question, answer = rng.choice(told)
    turns.append((question, answer))
    messages = tuple(
        Message(role, text) for pair in turns for role, text in zip(("user", "assistant"), pair, strict=True)
    )
    return Example("memory", " | ".join(message.content for message in messages[:-1]), messages)


def _system(system: str, question: str, answer: str) -> Example:
    messages = (Message("system", system), Message("user", question), Message("assistant", answer))
    return Example("system", f"{system} | {question}", messages)


def systems(rng: random.Random) -> Example:
    """A system message that gives a name, a secret, a fact, or an opener for every answer."""
    kind = rng.randrange(4)
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    if kind == 0:
        system = rng.choice((f"Your name is {name}.", f"You are {name}.", f"You are a helper called {name}."))
        return _system(
            system, rng.choice(("What is your name?", "Who are you?", "Tell me your name.")), f"I am {name}."
        )
    if kind == 1:
        system = rng.choice((f"The secret word is {item}.", f"Remember the secret word: {item}."))
        return _system(system, rng.choice(("What is the secret word?", "Tell me the secret word.")), item)
    if kind == 2:
        system = rng.choice(
            (f"The user is called {name}.", f"You are talking to {name}.", f"The name of the user is {name}.")
        )
        return _system(system, rng.choice(("What is my name?", "Who am I?", "Tell me my name.")), name)
    inner = rng.choice((products, facts))(rng)
    while inner.is_held_out:  # the opener is what is tested; the inner problem must be one the model was shown
        inner = rng.choice((products, facts))(rng)
    opener = rng.choice(OPENERS)
    system = rng.choice((f'Begin every answer with "{opener}"', f'Start each answer with "{opener}"'))
    return _system(system, inner.messages[0].content, f"{opener} {inner.answer}")

"""The training stream: which tasks in which share, and how they become token rows with masks.

A document is one conversation; rows hold several, and attention does not cross documents (`document` below). Most
rows are 256 tokens; long rows are one conversation of many turns that fills 1,024 tokens, so that every distance the
context allows is trained.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.training.chat import chats
from models.training.dialogue import memories, readings, systems
from models.training.example import Example, Message
from models.training.knowledge import days, facts, months
from models.training.lists import copies, counts, picks, reversals, sorts
from models.training.numbers import comparisons, differences, products, sequences, sums
from models.training.stories import stories

Generator = Callable[[random.Random], Example]
IGNORED = -100
ROW_LENGTH = 256
PLAIN_SYSTEM = (
    "You are a helpful assistant.", "You are Millpond.", "Be kind.", "Answer briefly.",
    "You are a helpful and friendly assistant.",
)  # fmt: skip

# Golden categories and their share of the training documents; sums and sorting are the slow learners.
CHECKED: dict[str, tuple[Generator, float]] = {
    "sum": (sums, 18), "difference": (differences, 18), "times": (products, 3), "compare": (comparisons, 8),
    "sequence": (sequences, 5), "copy": (copies, 6), "reverse": (reversals, 4), "sort": (sorts, 14),
    "count": (counts, 10), "pick": (picks, 6), "days": (days, 12), "months": (months, 6), "facts": (facts, 2),
    "reading": (readings, 16), "memory": (memories, 3), "system": (systems, 4),
}  # fmt: skip
UNCHECKED: dict[str, tuple[Generator, float]] = {"story": (stories, 6), "chat": (chats, 3)}
MIX = CHECKED | UNCHECKED


def examples(rng: random.Random) -> Iterator[Example]:
    """Endless training examples: never one that the hold-out rule gives to the golden set."""
    generators = [generator for generator, _ in MIX.values()]
    weights = [weight for _, weight in MIX.values()]
    while True:
        example = rng.choices(generators, weights)[0](rng)
        if example.category in UNCHECKED or not example.is_held_out:
            yield example


def conversations(rng: random.Random, turns_of_long: int = 1) -> Iterator[tuple[Message, ...]]:
    """Single examples, one in eight times two to four joined; some under a system message that changes nothing."""
    stream = examples(rng)
    plain = (example for example in stream if example.messages[0].role != "system")
    while True:
        wanted = turns_of_long if turns_of_long > 1 else rng.randint(2, 4) if rng.random() < 0.125 else 1
        parts = [next(plain) for _ in range(wanted)] if wanted > 1 else [next(stream)]
        messages = tuple(message for part in parts for message in part.messages)
        if messages[0].role != "system" and rng.random() < 0.06:
            messages = (Message("system", rng.choice(PLAIN_SYSTEM)), *messages)
        yield messages


@dataclass(frozen=True, slots=True)
class Rows:
    """One batch: B rows of T tokens."""

    input_ids: NDArray[np.int64]  # [B, T]
    labels: NDArray[np.int64]  # [B, T] the next token, or IGNORED
    document: NDArray[np.int64]  # [B, T] number of the document within its row; attention stays inside


class Encoder:
    """Conversation to tokens and loss mask, as the chat template writes it: <|role|>text<|end|>."""

    def __init__(self, encode: Callable[[list[str]], list[list[int]]], token_id: Callable[[str], int]) -> None:
        self._encode = encode
        self.bos, self.end = token_id("<|bos|>"), token_id("<|end|>")
        self._role = {role: token_id(f"<|{role}|>") for role in ("system", "user", "assistant")}

    def __call__(self, messages: tuple[Message, ...]) -> tuple[list[int], list[bool]]:
        """Token ids, and for each whether the loss counts it (assistant text and its end)."""
        ids, counted = [self.bos], [False]
        for message, text in zip(messages, self._encode([message.content for message in messages]), strict=True):
            ids += [self._role[message.role], *text, self.end]
            counted += [False, *([message.role == "assistant"] * (len(text) + 1))]
        return ids, counted


def pack(encoder: Encoder, stream: Iterator[tuple[Message, ...]], rows: int, length: int) -> Rows:
    """First-fit whole documents into rows; a document longer than a row is cut at its end."""
    input_ids = np.zeros((rows, length), np.int64)
    labels = np.full((rows, length), IGNORED, np.int64)
    document = np.full((rows, length), -1, np.int64)
    used = [0] * rows
    misses = 0
    while misses < 3:
        ids, counted = encoder(next(stream))
        ids, counted = ids[: length + 1], counted[: length + 1]
        size = len(ids) - 1  # the last token is only ever a label
        row = next((r for r in range(rows) if used[r] + size <= length), None)
        if row is None:
            misses += 1
            continue
        at = slice(used[row], used[row] + size)
        input_ids[row, at] = ids[:-1]
        labels[row, at] = np.where(counted[1:], ids[1:], IGNORED)
        document[row, at] = used[row]
        used[row] += size
    return Rows(input_ids, labels, document)

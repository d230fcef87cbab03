"""One training or golden item, and the rule that keeps the two apart.

Separate from the generators so that the rule can be read, and tested, in one place: a problem belongs to the golden
set or to training by the hash of its key, whatever the seed. Where the space of problems is large the key names the
problem, not the wording ("sum 17 25", smaller number first), so a golden sum was never seen in any wording; where it
is small (days, months, times tables, facts) the key is the prompt itself.
"""

import hashlib
from dataclasses import dataclass

HELD_OUT_ONE_IN = 8


@dataclass(frozen=True, slots=True)
class Message:
    role: str  # "system", "user" or "assistant"
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation whose last message is the assistant's answer to check or to learn."""

    category: str
    key: str
    messages: tuple[Message, ...]

    @property
    def answer(self) -> str:
        return self.messages[-1].content

    @property
    def is_held_out(self) -> bool:
        return held_out(self.category, self.key)


def held_out(category: str, key: str) -> bool:
    """True when this problem may appear in the golden set only."""
    digest = hashlib.sha256(f"{category}|{key}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def turn(category: str, prompt: str, answer: str, key: str | None = None) -> Example:
    """A single question and its answer; the key is the prompt unless the problem has a name of its own."""
    return Example(category, prompt if key is None else key, (Message("user", prompt), Message("assistant", answer)))

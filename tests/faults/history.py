"""What a client saw of one stream, and what must not have happened to it: lost, doubled or changed tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

Body = Mapping[str, object]


@dataclass
class History:
    """Events in the order they came: (seconds, index of the first token, token ids), and how it ended."""

    body: Body
    events: list[tuple[float, int, list[int]]] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    generation_id: str | None = None
    last_event_id: int | None = None  # what a client sends to go on after it
    resumes: int = 0  # connections that broke before the stream had ended

    @property
    def has_ended(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Tokens of one stream that went wrong, and its longest silence in s."""

    lost: int
    doubled: int
    changed: int
    gap_s: float


def judge(history: History, expected: Sequence[int]) -> Verdict:
    """`expected`: the tokens of the same request without faults. An unfinished stream has lost what is missing."""
    seen: dict[int, int] = {}
    doubled = 0
    for _, first, token_ids in history.events:
        for index, token_id in enumerate(token_ids, first):
            doubled += index in seen
            seen.setdefault(index, token_id)
    lost = sum(index not in seen for index in range(len(expected)))
    if not lost and history.finish_reason is None:
        lost = 1  # all tokens, but never the word that these are all
    changed = sum(index >= len(expected) or expected[index] != token_id for index, token_id in seen.items())
    times = [at for at, _, _ in history.events]
    gap_s = max((later - earlier for earlier, later in pairwise(times)), default=0.0)
    return Verdict(lost, doubled, changed, gap_s)

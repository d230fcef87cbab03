"""How fast a queue empties, so that a refusal can say when to come back.

Apart from the queue because it is arithmetic on three numbers (the Redis library keeps the same three). The rate counts
the tokens (prompt + max_tokens) of requests that end, over the time in which the queue was under pressure: an idle hour
says how little came in, not how fast work gets done. Both sums decay with the same time constant over pressed time
only, so the answer is "the rate of the last half minute under load", and it falls towards zero when workers die under
load.
"""

from __future__ import annotations

from math import exp
from typing import Final

WINDOW_MS: Final = 30_000
# What is told when nothing has ended under pressure yet, or the true figure is beyond any client's patience.
LONGEST_WAIT_S: Final = 60.0
SHORTEST_WAIT_S: Final = 0.1


class DrainRate:
    """Tokens per second leaving a queue under pressure."""

    def __init__(self) -> None:
        self._noted_ms = 0
        self._pressed_ms = 0.0
        self._ended_tokens = 0.0

    def note(self, now_ms: int, *, is_pressed: bool, ended_tokens: int = 0) -> None:
        """From the last note until now the queue `is_pressed` or not; at the end of that time `ended_tokens` left."""
        elapsed_ms = max(0, now_ms - self._noted_ms)
        self._noted_ms = now_ms
        if not is_pressed:
            return
        kept = exp(-elapsed_ms / WINDOW_MS)
        self._pressed_ms = self._pressed_ms * kept + WINDOW_MS * (1.0 - kept)
        self._ended_tokens = self._ended_tokens * kept + ended_tokens

    def seconds_for(self, tokens: int) -> float:
        """How long until `tokens` will have left."""
        return seconds_to_drain(tokens, self._pressed_ms, self._ended_tokens)


def seconds_to_drain(tokens: int, pressed_ms: float, ended_tokens: float) -> float:
    """How long until `tokens` will have left, at the pace of `ended_tokens` in `pressed_ms`; within the bounds."""
    if ended_tokens <= 0.0:
        return LONGEST_WAIT_S
    return min(LONGEST_WAIT_S, max(SHORTEST_WAIT_S, tokens * pressed_ms / ended_tokens / 1000.0))

"""When it pays to compute a step before it is asked for.

A right guess hides the host's time, a tenth or two of a step; a wrong one costs a whole step. So after a wrong guess a
number of steps pass without guessing, twice as many after each, and a run of right guesses brings the number down.
"""

from __future__ import annotations

from typing import Final

FIRST_PAUSE: Final = 4  # steps without a guess after a wrong one
LONGEST_PAUSE: Final = 64
FORGIVEN_AFTER: Final = 32  # right guesses that halve the pause


class Patience:
    """Counts guesses; pure bookkeeping."""

    def __init__(self) -> None:
        self._pause = FIRST_PAUSE
        self._left = 0  # steps still to pass
        self._right = 0  # since the last wrong guess or halving

    def allows(self) -> bool:
        """Whether the coming step may be guessed. Asked once a step that could be: it counts the pause down."""
        if self._left:
            self._left -= 1
            return False
        return True

    def note(self, *, was_right: bool) -> None:
        """How a guess came out."""
        if not was_right:
            self._left, self._right = self._pause, 0
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            return
        self._right += 1
        if self._right >= FORGIVEN_AFTER:
            self._pause, self._right = max(FIRST_PAUSE, self._pause // 2), 0

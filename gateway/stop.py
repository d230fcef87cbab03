"""Stop strings: where a text ends because the caller said so, even when the string is spread over many tokens.

Apart from detokenizing because it is about text only. Text that could still turn out to be the beginning of a stop
string is held back; everything else is passed on at once.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Finds the first of some stop strings in a text that arrives in pieces.

    Each piece costs time in its own length and that of the longest stop string, whatever came before.
    """

    __slots__ = ("_held", "_prefixes", "_stops", "found")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        # Every proper prefix of every stop string, longest first: what a held text may be.
        prefixes = {stop[:length] for stop in stops for length in range(1, len(stop))}
        self._prefixes = tuple(sorted(prefixes, key=len, reverse=True))
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that may be sent now. When `found` turns true, it is the last: what comes before the stop string."""
        text = self._held + piece
        at = min((i for i in map(text.find, self._stops) if i >= 0), default=-1)
        if at >= 0:
            self.found = True
            self._held = ""
            return text[:at]
        keep = 0
        if text.endswith(self._prefixes):  # rare: one call says no for all of them
            keep = next(len(prefix) for prefix in self._prefixes if text.endswith(prefix))
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text held back, when nothing follows that could complete it."""
        held, self._held = self._held, ""
        return held

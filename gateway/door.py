"""The door of a full queue: what it has said just now, so that those who cannot fit are refused without asking it.

Under overload most requests are refused. Each refusal that is not worked for leaves time for those that were taken in.
"""

from __future__ import annotations

import time
from typing import Final

from wire.errors import QueueFull

FULL_S: Final = 0.05  # a refusal stands for so long; then one request tries again


class Door:
    """The queue's last refusals, by tenant. Sizes are prompt and max_tokens together."""

    def __init__(self) -> None:
        self._full: dict[str, tuple[float, QueueFull]] = {}  # until when it is news

    def check(self, tenant: str, least_tokens: int) -> None:
        """Raise QueueFull for a request of at least so many tokens that would be refused."""
        until, full = self._full.get(tenant, (0.0, None))
        if full is not None and time.monotonic() < until:
            _refuse(full, least_tokens)

    def enter(self, tenant: str, tokens: int) -> None:
        """The same for one whose size is known. When the news is old, one may try; the others wait for what it finds.

        Who has entered says how it went: `took` or `refused`.
        """
        until, full = self._full.get(tenant, (0.0, None))
        if full is None:
            return
        if (now := time.monotonic()) < until:
            _refuse(full, tokens)
        else:
            self._full[tenant] = (now + FULL_S, full)

    def took(self, tenant: str) -> None:
        """The queue has taken one in: there may be room for more."""
        self._full.pop(tenant, None)

    def refused(self, tenant: str, full: QueueFull) -> None:
        self._full[tenant] = (time.monotonic() + FULL_S, full)


def _refuse(full: QueueFull, tokens: int) -> None:
    if full.room_tokens < tokens <= full.cap_tokens:  # what can never fit is told so by the queue
        raise full.again(tokens)

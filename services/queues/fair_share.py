"""Start-time fair queueing: a number for each request that arrives, by which tenants share in proportion to weight.

Goyal, Vin and Cheng, "Start-time Fair Queueing" (SIGCOMM 1996). A request's tag is the virtual time at which it would
start if its tenant had the worker to itself: behind the tenant's own last request, but never before now. Virtual time
is the largest tag handed out. Who has not asked for a while starts now; who asks for much waits behind their own.

Apart from the line because it is arithmetic on tags (the Redis library keeps the same numbers). Tags are whole numbers,
so both agree exactly.
"""

from __future__ import annotations

from typing import Final

UNITS: Final = 64  # of virtual time in a token of weight 1; a multiple of every sensible weight


class FairShare:
    """Virtual time, and how far each tenant's requests reach into it."""

    def __init__(self) -> None:
        self._now = 0
        self._ends: dict[str, int] = {}

    def stamp(self, tenant: str, weight: int, tokens: int) -> int:
        """The tag of a request that arrives. `tokens` is what it may cost: prompt and max_tokens."""
        tag = max(self._now, self._ends.get(tenant, 0))
        self._ends[tenant] = tag + tokens * UNITS // weight
        return tag

    def handed_out(self, tag: int) -> None:
        """A request with this tag has left the line."""
        self._now = max(self._now, tag)

    def emptied(self) -> None:
        """Nobody waits: all begin anew, behind everything that was ever stamped (what comes back keeps its place)."""
        self._now = max(self._now, *self._ends.values(), 0)
        self._ends.clear()

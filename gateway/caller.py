"""Who asks: the tenant whose key came with a connection, as routes see it. The edge puts it there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

CALLER: Final = "millrace.caller"  # key in the ASGI scope


@dataclass(frozen=True, slots=True)
class Caller:
    """A tenant and its share among tenants; without keys there is one tenant, without a name."""

    tenant: str = ""
    weight: int = 1


NOBODY: Final = Caller()


def caller_of(scope: Mapping[str, Any]) -> Caller:
    """Of a request or a socket."""
    caller = scope.get(CALLER, NOBODY)
    assert isinstance(caller, Caller)
    return caller

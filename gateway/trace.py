"""Which trace a request belongs to, by the W3C header `traceparent` (Trace Context, section 3.2).

Only a sampled trace is worth a name here: it is what an exemplar or a log line leads to. The name travels with the
request's task and what that task starts, not through every signature.
"""

from __future__ import annotations

import re
from contextvars import ContextVar
from typing import Final

TRACEPARENT: Final = b"traceparent"
SAMPLED: Final = 1
# Version, trace id, parent id, flags; ids of zeros are none. Later versions may say more after a dash.
_HEADER: Final = re.compile(
    rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-([0-9a-f]{2})(-.*)?", re.DOTALL
)

trace_id: Final[ContextVar[str]] = ContextVar("trace_id", default="")


def sampled_trace(header: bytes | None) -> str:
    """32 hex digits; empty without a header, for one that is malformed, and for a trace that nobody keeps."""
    match = None if header is None else _HEADER.fullmatch(header)
    if match is None or (match[1] == b"00" and match[4] is not None) or not int(match[3], 16) & SAMPLED:
        return ""
    return match[2].decode()

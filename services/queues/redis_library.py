"""The queue's functions inside Redis: their text, their name, and loading them.

The name carries a digest of the text, so gateways and workers of two releases each find their own library and a rolling
update needs no moment at which all change at once; data is the same for both.
"""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from string import Template
from typing import Final

from redis.asyncio import Redis

from services.queues.drain_rate import WINDOW_MS
from services.queues.fair_share import UNITS
from services.queues.protocol_core import QueueLimits
from wire.errors import DeadlineExceeded, WorkerLost

SOURCE: Final = Path(__file__).with_name("millrace.lua")

Client = Redis  # Sentinel's masters are of this class too


@lru_cache(maxsize=1)
def library() -> tuple[str, str]:
    """(name, Lua text)."""
    text = SOURCE.read_text("utf-8")
    facts = {
        "window_ms": str(WINDOW_MS),
        "units": str(UNITS),
        "limits": ", ".join(f"'{limit.name}'" for limit in fields(QueueLimits)),
        "deadline_code": DeadlineExceeded.code,
        "deadline_retryable": str(DeadlineExceeded.retryable).lower(),
        "lost_code": WorkerLost.code,
        "lost_retryable": str(WorkerLost.retryable).lower(),
    }
    filled = Template(text).safe_substitute(facts)
    name = "millrace_" + blake2b(filled.encode(), digest_size=6).hexdigest()
    return name, filled.replace("$library", name)


async def load_library(client: Client) -> str:
    """Load the functions where they are missing; their library's name."""
    name, text = library()
    answer = client.function_load(text, replace=True)
    if not isinstance(answer, str):
        await answer
    return name

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
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from services.queues.drain_rate import WINDOW_MS
from services.queues.fair_share import UNITS
from services.queues.protocol_core import QueueLimits
from wire.errors import DeadlineExceeded, WorkerLost

SOURCE: Final = Path(__file__).with_name("millrace.lua")

Client = Redis  # of any kind of Redis: redis_clients.py


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


async def load_library(client: Client) -> None:
    """Load the functions, or load them again: it is the same text."""
    _, text = library()
    answer = client.function_load(text, replace=True)
    if not isinstance(answer, str):
        await answer


async def call_function(client: Client, function: str, key: str, *arguments: object) -> Any:
    """The function's reply. A Redis without the library gets it: one that has restarted empty, or a new master."""
    name, _ = library()

    def call() -> Any:
        return client.fcall(f"{name}_{function}", 1, key, *arguments)

    try:
        return await call()
    except ResponseError as error:
        if "Function not found" not in str(error):
            raise
    await load_library(client)
    return await call()

"""What a client saw of one stream, and what must not have happened to it: lost, doubled or changed tokens."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from urllib.parse import urlsplit

Body = Mapping[str, object]


class Refused(Exception):
    """The gateway did not take the request (yet): nothing was promised."""


@dataclass
class History:
    """Events in the order they came: (seconds, index of the first token, token ids), and how it ended."""

    body: Body
    events: list[tuple[float, int, list[int]]] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None


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


async def record(address: str, body: Body) -> History:
    """Stream `body` to its end. Raises Refused; what happens after that is the history's."""
    history = History(body)
    raw = json.dumps({**body, "stream": True}).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: faults\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}"
    where = urlsplit(address)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        writer.write(head.encode() + b"\r\nConnection: close\r\n\r\n" + raw)
        status = await reader.readline()
        if b" 503 " in status or b" 429 " in status:
            raise Refused(status.decode().strip())
        if b" 200 " not in status:
            raise AssertionError((status + await reader.read()).decode())
        async for line in reader:
            if line.startswith(b"data: "):
                _note(history, json.loads(line[6:]))
    finally:
        writer.close()
    return history


def _note(history: History, part: dict[str, object]) -> None:
    if "error" in part:
        history.error = json.dumps(part["error"])
        return
    token_ids, index = part.get("token_ids"), part.get("index")
    if isinstance(token_ids, list) and isinstance(index, int) and token_ids:
        history.events.append((time.monotonic(), index, token_ids))
    if isinstance(reason := part.get("finish_reason"), str):
        history.finish_reason = reason

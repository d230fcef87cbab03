"""Values as they travel to and from millrace.lua: integers as int32 in little endian, messages as msgpack.

Apart from the queue because it is nothing but format, and has two ends that must agree.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from wire.messages import Failed, Finished, Tokens, decode_event, decode_generate, encode
from wire.queue import Append, Lease, Refusal, RefusalReason

logger = logging.getLogger(__name__)


def unframed(data: bytes) -> Iterator[tuple[str, int, bytes, bytes]]:
    """(request id, first index, token bytes, terminal or empty) of each request in a message of millrace.lua."""
    at = 0

    def part() -> bytes:
        nonlocal at
        size = int.from_bytes(data[at : at + 4], "little")
        at += 4 + size
        return data[at - size : at]

    while at < len(data):
        request_id = part().decode()
        first_index = int.from_bytes(data[at : at + 4], "little")
        at += 4
        yield request_id, first_index, part(), part()


def token_ids(log: bytes) -> list[int]:
    """int32, little endian -> numbers."""
    return array("i", log).tolist()


def append_arguments(append: Append) -> list[object]:
    """Six arguments of the publish function. Raises ValueError for an event that cannot travel."""
    try:
        encoded = encode(append.event)
        event = decode_event(encoded)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{append.event!r:.200} cannot travel: {error}; this is a bug") from error
    if isinstance(event, Tokens):
        payload = array("i", event.token_ids).tobytes()
        return [event.request_id, append.epoch, "t", event.first_index, payload, 0]
    completed = event.usage.completion_tokens if isinstance(event, Finished) else 0
    return [event.request_id, append.epoch, "x" if isinstance(event, Failed) else "f", 0, encoded, completed]


def read_leases(found: Sequence[Sequence[Any]]) -> list[Lease]:
    """What can be read of what was handed out. The rest is left to lapse: a newer worker may know what it means."""
    leases: list[Lease] = []
    for body, epoch, log, delivery, is_suspect in found:
        try:
            leases.append(Lease(decode_generate(body), epoch, tuple(token_ids(log)), delivery, bool(is_suspect)))
        except ValueError as error:
            logger.error("a request cannot be read; its lease will lapse", extra={"epoch": epoch, "reason": str(error)})
    return leases


def read_refusals(found: Sequence[Sequence[Any]]) -> list[Refusal]:
    return [Refusal(each[0].decode(), RefusalReason(each[1].decode()), int(each[2])) for each in found]

"""`millrace workers`: who has reported to the shared queue of late, and how much room they have."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

import msgspec

from services.redis_queue import open_queue
from services.settings import Settings
from wire.queue import SeenWorker


def show_workers(settings: Settings, *, as_json: bool) -> int:
    """Print them. Exit code 1 if there is none."""
    seen = asyncio.run(_seen(settings))
    if as_json:
        print(json.dumps([{**msgspec.to_builtins(each.report), "age_ms": each.age_ms} for each in seen], indent=1))
    else:
        print("\n".join(_line(each) for each in seen) or "no worker has reported of late")
    return 0 if seen else 1


async def _seen(settings: Settings) -> Sequence[SeenWorker]:
    queue = await open_queue(settings)
    try:
        return await queue.workers()
    finally:
        await queue.close()


def _line(each: SeenWorker) -> str:
    report = each.report
    room = f"{report.free_tokens:,} of {report.capacity_tokens:,} KV tokens free"
    state = "draining" if report.is_draining else "ready"
    requests = f"{report.running_requests:5} requests"
    return f"{report.worker_id:60} {state:9} {requests}  {room}  seen {each.age_ms / 1000:.1f} s ago"

"""What Redis says of its own health, for metrics: memory, file of appends, replicas (INFO)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RedisFacts:
    """One look."""

    memory_used_bytes: int
    memory_max_bytes: int  # 0 = no limit
    is_aof_ok: bool  # appends are on, and the last write and the last rewrite succeeded
    connected_replicas: int  # that are in step, not still loading


def redis_facts(info: Mapping[str, Any]) -> RedisFacts:
    """From INFO's sections memory, persistence and replication, as the client reads them."""
    replicas = [each for name, each in info.items() if name.startswith("slave") and isinstance(each, Mapping)]
    statuses = (info.get("aof_last_write_status"), info.get("aof_last_bgrewrite_status"))
    return RedisFacts(
        memory_used_bytes=int(info.get("used_memory", 0)),
        memory_max_bytes=int(info.get("maxmemory", 0)),
        is_aof_ok=info.get("aof_enabled") == 1 and statuses == ("ok", "ok"),
        connected_replicas=sum(each.get("state") == "online" for each in replicas),
    )

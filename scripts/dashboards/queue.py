"""Who waits and why, what became of requests whose worker was lost, and how Redis is."""

from __future__ import annotations

from typing import Final

from scripts.dashboards.grafana import Dashboard, Limit, Panel, Query, Row
from scripts.dashboards.promql import CHOSEN, MODELS, REFUSED, WAITING, largest, per, rate
from scripts.dashboards.shared import CAPACITY, REQUESTS, TRAFFIC, WORKERS

NOW: Final = Row("Now", [
    Panel(
        "Queue answers", "Every gateway reaches it and gets its news. Normal: yes.",
        "bool_yes_no", [Query("min (millrace_queue_up)", "up")], "number", 4, [Limit(1, "green")], below="red",
        alerts=["MillraceRedisUnreachable"],
    ),
    Panel(
        "Waiting", "Requests that no worker has. Normal: few, and not for long.",
        "short", [Query(f"sum ({largest('millrace_queue_requests', 'model_name', WAITING)})", "waiting")], "number", 4,
    ),
    Panel(
        "Oldest of them", "Since it came, or came back. Normal: a few seconds; 0 = nobody waits.",
        "s", [Query(largest("millrace_queue_oldest_waiting_seconds"), "oldest")],
        "number", 4, [Limit(10, "yellow"), Limit(30, "red")], alerts=["MillraceSaturatedAndQueueing"],
    ),
    Panel(
        "Given up, in all", "Requests given up after their last delivery. Normal: 0; each is a bug to be found.",
        "short", [Query(f"sum ({largest('millrace_dead_letters_total', 'model_name')})", "dead letters")],
        "number", 4, [Limit(1, "orange")], alerts=["MillraceDeadLetters"],
    ),
    Panel(
        "Append-only file", "Redis keeps one, and its last writes succeeded. Normal: yes.",
        "bool_yes_no", [Query("min (millrace_redis_aof_ok)", "kept")],
        "number", 4, [Limit(1, "green")], below="red", alerts=["MillraceRedisAofFailing"],
    ),
    Panel(
        "Replicas missing", "Of those that the setting redis_replicas expects. Normal: 0.",
        "short",
        [Query("max (millrace_redis_expected_replicas) - max (millrace_redis_connected_replicas)", "missing")],
        "number", 4, [Limit(1, "red")], can_be_negative=True, alerts=["MillraceRedisReplicaMissing"],
    ),
], height=4)  # fmt: skip

LINE: Final = Row("Who waits", [
    REQUESTS,
    Panel(
        "Their tokens and what workers hold",
        "Prompt and max_tokens, against the KV tokens of all ready workers. Normal: under it; the rest waits.",
        "short",
        [
            Query(largest("millrace_queue_tokens", "model_name, state"), "{{model_name}} {{state}}"),
            Query(CAPACITY, "{{model_name}} capacity"),
        ],
    ),
    Panel(
        "Longest wait", "Of those who wait. Normal: a few seconds; the dashed line, with busy devices, is a P1.",
        "s", [Query(largest("millrace_queue_oldest_waiting_seconds", "model_name"), "{{model_name}}")],
        limits=[Limit(30, "red")], alerts=["MillraceSaturatedAndQueueing"],
    ),
    TRAFFIC,
    Panel(
        "Refused by the queue",
        "queue_full: it holds its cap of tokens, or a tenant's; unavailable: no worker, or no Redis. Normal: none.",
        "reqps", [Query(rate(REFUSED, "code", 'code=~"queue_full|unavailable"'), "{{code}}")], "areas",
        alerts=["MillraceErrorBudgetBurn", "MillraceWorkersGone"],
    ),
    WORKERS,
])  # fmt: skip

FAULTS: Final = Row("What was lost and found again", [
    Panel(
        "Deliveries after the first",
        "Share of leases whose request another worker lost. Normal: none, but in a release; no token is lost by it.",
        "percentunit",
        [Query(
            per(
                rate("millrace_leases_total", "model_name", f'{CHOSEN},kind=~"again|suspect"'),
                rate("millrace_leases_total", "model_name"),
            ),
            "{{model_name}}",
        )],
        limits=[Limit(0.05, "red")], alerts=["MillraceRequestsTakenOver"],
    ),
    Panel(
        "Streams resumed", "Read again from a token, here or at another gateway. Normal: few; many are bad networks.",
        "reqps", [Query(rate("millrace_streams_resumed_total", where=""), "resumed")],
    ),
    Panel(
        "Given up", "Requests that lost a worker at each delivery, in the last hour. Normal: none.",
        "short",
        [Query(f"max by (model_name) (increase(millrace_dead_letters_total{{{CHOSEN}}}[1h]))", "{{model_name}}")],
        alerts=["MillraceDeadLetters"],
    ),
])  # fmt: skip

REDIS: Final = Row("Redis", [
    Panel(
        "Memory", "Used, and the limit where there is one. Normal: far under it; at the limit Redis refuses writes.",
        "bytes",
        [
            Query(largest("millrace_redis_memory_used_bytes", where=""), "used"),
            Query(f"{largest('millrace_redis_memory_max_bytes', where='')} > 0", "limit"),
        ],
        alerts=["MillraceRedisMemoryHigh"],
    ),
    Panel(
        "Replicas", "In step with the master, and expected by the setting redis_replicas. Normal: the same number.",
        "short",
        [
            Query(largest("millrace_redis_connected_replicas", where=""), "connected"),
            Query(largest("millrace_redis_expected_replicas", where=""), "expected"),
        ],
        alerts=["MillraceRedisReplicaMissing"],
    ),
    Panel(
        "Gateways that reach it", "1 while a gateway's calls are answered and news come in. Normal: 1 for all.",
        "short", [Query("max by (instance) (millrace_queue_up)", "{{instance}}")], highest=1,
        alerts=["MillraceRedisUnreachable"],
    ),
])  # fmt: skip

QUEUE: Final = Dashboard(
    "millrace-queue", "Queue", "Who waits and why, what became of requests whose worker was lost, and how Redis is.",
    [NOW, LINE, FAULTS, REDIS], MODELS,
)  # fmt: skip

"""Panels that stand on more than one page."""

from __future__ import annotations

from typing import Final

from scripts.dashboards.grafana import Limit, Panel, Query
from scripts.dashboards.promql import ADMITTED, READY, largest, rate

TRAFFIC: Final = Panel(
    "Accepted", "Requests that the queue has accepted. Normal: what it was at this hour yesterday.",
    "reqps", [Query(rate(ADMITTED, "model_name"), "{{model_name}}")], "areas",
)  # fmt: skip
ANSWERED: Final = Panel(
    "Answered, by reason", "How requests ended. Normal: stop and length; many aborts are clients that went away.",
    "reqps", [Query(rate("vllm:request_success_total", "finished_reason"), "{{finished_reason}}")], "areas",
)  # fmt: skip
REQUESTS: Final = Panel(
    "Requests in the queue",
    "Waiting for a worker, and running at one. Normal: hardly any wait for longer than a few seconds.",
    "short", [Query(largest("millrace_queue_requests", "model_name, state"), "{{model_name}} {{state}}")], "areas",
    alerts=["MillraceNothingServed", "MillraceSaturatedAndQueueing"],
)  # fmt: skip
WORKERS: Final = Panel(
    "Workers",
    "Workers that reported within 10 s. Normal: ready, in a release too; draining ones are being replaced.",
    "short", [Query(largest("millrace_workers", "model_name, state"), "{{model_name}} {{state}}")], "areas",
    alerts=["MillraceWorkersGone", "MillraceDraining"],
)  # fmt: skip
KV_BLOCKS: Final = Panel(
    "KV blocks in use",
    "Of the fullest worker of each model. Normal: up and down with the load; near 1 requests are preempted.",
    "percentunit", [Query(largest("vllm:kv_cache_usage_perc", "model_name"), "{{model_name}}")],
    limits=[Limit(0.95, "red")], highest=1, alerts=["MillraceKvPressure"],
)  # fmt: skip

# KV tokens of all ready workers together, by model.
CAPACITY: Final = (
    f"{largest('millrace_workers', 'model_name', READY)} * {largest('millrace_replica_capacity_tokens', 'model_name')}"
)

"""Is anybody harmed now, and where to look next."""

from __future__ import annotations

from typing import Final

from scripts.dashboards.grafana import RUNBOOKS_URL, Dashboard, Limit, Panel, Query, Row
from scripts.dashboards.promql import (
    ADMITTED,
    CHOSEN,
    FIRST_TOKEN,
    GENERATED,
    LATER_TOKENS,
    MODELS,
    READY,
    REFUSED,
    largest,
    per,
    quantile,
    quantiles,
    rate,
)
from scripts.dashboards.shared import ANSWERED, CAPACITY, KV_BLOCKS, REQUESTS, WORKERS

# Ours; that something drains is news and no alarm.
FIRING: Final = 'ALERTS{alertstate="firing",alertname=~"Millrace.*",severity=~"P.*"}'

TIERS: Final = {
    "P0": ("People are not served now; somebody has been woken. Normal: 0.", "red"),
    "P1": ("Worse or slower than promised, or the next fault would lose something. Normal: 0.", "orange"),
    "P2": ("Nobody is harmed yet; in days somebody would be. Normal: 0, though one may stay for days.", "yellow"),
}

NOW: Final = Row("Now", [
    *(
        Panel(
            f"{tier} firing", meaning, "short",
            [Query(f'count(ALERTS{{alertstate="firing",severity="{tier}"}}) or vector(0)', tier)],
            "number", 3, [Limit(1, color)],
        )
        for tier, (meaning, color) in TIERS.items()
    ),
    Panel(
        "Tokens a second", "Tokens that gateways have delivered. Normal: what it was at this hour yesterday.",
        "short", [Query(rate(GENERATED), "tokens/s")], "number", 3,
    ),
    Panel(
        "Requests a second", "Requests that the queue has accepted. Normal: what it was at this hour yesterday.",
        "reqps", [Query(rate(ADMITTED), "requests/s")], "number", 3,
    ),
    Panel(
        "Errors of ours", "Share of requests in five minutes that got an error of ours. Promised: under 0.1 %.",
        "percentunit", [Query("service:millrace_errors:ratio5m or vector(0)", "errors")],
        "number", 3, [Limit(0.001, "orange"), Limit(0.0144, "red")],
    ),
    Panel(
        "First token, p95", "Arrival to first token. Promised: 99 % within 2.5 s.",
        "s", [Query(quantile(0.95, FIRST_TOKEN), "p95")], "number", 3, [Limit(1, "orange"), Limit(2.5, "red")],
    ),
    Panel(
        "Workers ready", "Workers that reported within 10 s. Normal: one or more; 0 is well while nobody asks.",
        "short", [Query(f"sum ({largest('millrace_workers', 'model_name', READY)})", "ready")],
        "number", 3, [Limit(1, "green")], below="orange",
    ),
], height=4)  # fmt: skip

ALERTS: Final = Row("Alerts", [
    Panel(
        "Firing", "What fires now; a name leads to its runbook. Normal: empty.",
        "short", [Query(f"max by (severity, alertname, model, instance) ({FIRING})", "firing")],
        "table", 12, hidden=["Value"], urls={"alertname": RUNBOOKS_URL + "/${__value.text}.md"},
    ),
    Panel(
        "Firing over time", "How many alerts of each tier fired. Normal: nothing drawn.",
        "short", [Query(f"count by (severity) ({FIRING})", "{{severity}}")], "areas", 12,
    ),
], height=6)  # fmt: skip

SERVICE: Final = Row("Service", [
    Panel(
        "Throughput and its baseline",
        "Tokens delivered a second, and the median of an hour, a day and a week ago. Normal: near its baseline; 20 % "
        "under it while as much is asked for is a P0.",
        "short",
        [
            Query('model:millrace_generated_tokens:rate5m{model=~"$model"}', "{{model}}"),
            Query('model:millrace_generated_tokens:baseline{model=~"$model"}', "{{model}} baseline"),
        ],
        alerts=["MillraceThroughputDrop", "MillraceNothingServed"],
    ),
    Panel(
        "Time to first token",
        "Arrival to first token, of the chosen models together. Promised: 99 % under the dashed line.",
        "s", quantiles(FIRST_TOKEN), limits=[Limit(2.5, "red")], alerts=["MillraceSlowFirstToken"],
    ),
    Panel(
        "Time between tokens",
        "From one token of a stream to the next. Promised: 99 % under the dashed line; normal is a tenth of it.",
        "s", quantiles(LATER_TOKENS), limits=[Limit(0.3, "red")], alerts=["MillraceSlowTokens"],
    ),
    Panel(
        "Burn of the month's budgets",
        "How many times faster than allowed promises are broken, in the last hour. Normal: under 1, which just lasts a "
        "month; from the dashed line on somebody is called.",
        "suffix:x",
        [
            Query("(service:millrace_errors:ratio1h or vector(0)) / 0.001", "answers"),
            Query(f"max (model_name:millrace_slow_first_tokens:ratio1h{{{CHOSEN}}}) / 0.01", "first tokens"),
            Query(f"max (model_name:millrace_slow_later_tokens:ratio1h{{{CHOSEN}}}) / 0.01", "later tokens"),
        ],
        limits=[Limit(14.4, "red")], alerts=["MillraceErrorBudgetBurn", "MillraceErrorBudgetSlowBurn"],
    ),
    Panel(
        "Refused, by code",
        "Requests, frames and streams answered with an error. Normal: few; queue_full is too small a fleet, "
        "bad_request and unauthorized are clients' mistakes, internal, unavailable and worker_lost are ours.",
        "reqps", [Query(rate(REFUSED, "code", ""), "{{code}}")], "areas", alerts=["MillraceErrorBudgetBurn"],
    ),
    ANSWERED,
])  # fmt: skip

ROOM: Final = Row("Room", [
    REQUESTS,
    WORKERS,
    Panel(
        "Load",
        "Tokens in the queue, prompt and max_tokens, as a share of what ready workers hold in KV blocks. Normal: under "
        "1; above it requests wait until others end.",
        "percentunit",
        [Query(
            per(f"sum by (model_name) ({largest('millrace_queue_tokens', 'model_name, state')})", f"({CAPACITY})"),
            "{{model_name}}",
        )],
        limits=[Limit(1, "red")],
    ),
    Panel(
        "Busiest device of each kind",
        "Share of the time it computes. Normal: high under load; above the dashed line no burst has room.",
        "percentunit", [Query("max by (device) (millrace_device_utilization_ratio)", "{{device}}")],
        limits=[Limit(0.95, "red")], highest=1, alerts=["MillraceDeviceSaturated"],
    ),
    KV_BLOCKS,
    Panel(
        "Processes that Prometheus reaches",
        "By job. Normal: as many as are deployed; without a gateway nothing can be asked, and most alerts are blind.",
        "short", [Query('sum by (job) (up{job=~"millrace-.*"})', "{{job}}")],
        alerts=["MillraceGatewaysGone", "MillraceTargetDown"],
    ),
])  # fmt: skip

OVERVIEW: Final = Dashboard(
    "millrace-overview", "Overview", "Is anybody harmed now, and where to look next.",
    [NOW, ALERTS, SERVICE, ROOM], MODELS,
)  # fmt: skip

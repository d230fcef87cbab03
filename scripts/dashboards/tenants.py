"""Who asks for how much, and who is turned away."""

from __future__ import annotations

from typing import Final

from scripts.dashboards.grafana import Dashboard, Panel, Query, Row, Variable
from scripts.dashboards.promql import REFUSED, per, quantiles, rate

TENANT: Final = Variable("tenant", "Tenant", "label_values(millrace_tenant_requests_total, tenant)")
CHOSEN: Final = 'tenant=~"$tenant"'
TOKENS: Final = "millrace_tenant_tokens_total"
ALL_GENERATED: Final = 'kind="generated"'
GENERATED: Final = f"{CHOSEN},{ALL_GENERATED}"
PROMPT: Final = f'{CHOSEN},kind="prompt"'


def over_the_range(counter: str, where: str = CHOSEN) -> str:
    """How much there was in all that is shown."""
    return f"sum by (tenant) (increase({counter}{{{where}}}[$__range]))"


SHARES: Final = Row("In the time shown", [
    Panel(
        "Requests and tokens",
        "Of each tenant. Without keys there is one, anonymous; beyond 200 the rest is other. Normal: what was agreed.",
        "short",
        [
            Query(over_the_range("millrace_tenant_requests_total"), "requests"),
            Query(over_the_range(TOKENS, PROMPT), "prompt tokens"),
            Query(over_the_range(TOKENS, GENERATED), "generated tokens"),
        ],
        "table", 12,
    ),
    Panel(
        "Share of generated tokens",
        "Of all tenants. Normal: as their weights while all of them wait; whoever is alone may have everything.",
        "percentunit",
        [Query(
            f"{rate(TOKENS, 'tenant', GENERATED)} / on () group_left () ({rate(TOKENS, where=ALL_GENERATED)} > 0)",
            "{{tenant}}",
        )],
        "areas", 12, highest=1,
    ),
])  # fmt: skip

PACE: Final = Row("Over time", [
    Panel(
        "Requests", "That the queue has accepted. Normal: what a tenant usually asks.",
        "reqps", [Query(rate("millrace_tenant_requests_total", "tenant", CHOSEN), "{{tenant}}")], "areas",
    ),
    Panel(
        "Prompt tokens a second", "Counted when a request is accepted. Normal: what a tenant usually sends.",
        "short", [Query(rate(TOKENS, "tenant", PROMPT), "{{tenant}}")], "areas",
    ),
    Panel(
        "Generated tokens a second", "Counted when a request ends. Normal: what a tenant usually gets.",
        "short", [Query(rate(TOKENS, "tenant", GENERATED), "{{tenant}}")], "areas",
    ),
    Panel(
        "Tokens of a request", "Prompt and answer, mean. Normal: steady; a jump is another use of the same key.",
        "short",
        [Query(
            per(rate(TOKENS, "tenant", CHOSEN), rate("millrace_tenant_requests_total", "tenant", CHOSEN)),
            "{{tenant}}",
        )],
    ),
    Panel(
        "Turned away, of all tenants",
        "queue_full: the queue's cap of tokens, or the tenant's; unauthorized and forbidden: no key, or a dead one. "
        "Normal: few; a flood of one code is one client.",
        "reqps", [Query(rate(REFUSED, "code", 'code=~"queue_full|unauthorized|forbidden|bad_request"'), "{{code}}")],
        "areas", alerts=["MillraceErrorBudgetBurn"],
    ),
    Panel(
        "HTTP answers, of all tenants", "A stream counts when it ends. Normal: it follows the length of answers.",
        "s", quantiles("millrace_http_request_duration_seconds", where='route="/generate"'),
    ),
    Panel(
        "HTTP answers by route and status", "Normal: 200; 4xx are clients' mistakes and full queues, 5xx are ours.",
        "reqps",
        [Query(rate("millrace_http_request_duration_seconds_count", "route, status", ""), "{{route}} {{status}}")],
        "areas", 16,
    ),
    Panel(
        "Open WebSockets", "At each gateway. Normal: evenly spread; a connection costs little while nothing is asked.",
        "short", [Query("max by (instance) (millrace_websockets_open)", "{{instance}}")], "areas",
    ),
])  # fmt: skip

TENANTS: Final = Dashboard(
    "millrace-tenants", "Tenants", "Who asks for how much, and who is turned away.", [SHARES, PACE], [TENANT],
    since="now-24h",
)  # fmt: skip

"""Revisions of a model side by side: does the new one answer as well, as fast and as surely as the one before?"""

from __future__ import annotations

from typing import Final

from scripts.dashboards.grafana import Dashboard, Limit, Panel, Query, Row
from scripts.dashboards.promql import (
    ADMITTED,
    CHOSEN,
    FIRST_TOKEN,
    GENERATED,
    LATER_TOKENS,
    MODELS,
    WHOLE,
    largest,
    per,
    quantile,
    rate,
)
from scripts.dashboards.shared import TRAFFIC, WORKERS

BY: Final = "model_name"
FAILED: Final = per(rate("millrace_requests_failed_total", BY), rate(ADMITTED, BY))
FINISHED: Final = f"{WHOLE}_count"


def probed(figure: str) -> str:
    """What the prober of each revision last found."""
    return largest(f"millrace_probe_{figure}", BY)


def with_interval(figure: str) -> list[Query]:
    """A figure, the ends of its interval, and the baseline's."""
    ends = {"": "", "_low": " at least", "_high": " at most", "_baseline": " baseline"}
    return [Query(probed(f"{figure}{end}"), f"{{{{model_name}}}}{words}") for end, words in ends.items()]


def drop(figure: str) -> str:
    """How far a figure is under the baseline's, as a share of it."""
    return f"1 - {probed(figure)} / {probed(f'{figure}_baseline')}"


SIDE_BY_SIDE: Final = Row("Side by side", [
    Panel(
        "Answers",
        "Of the prober's golden items: share right with its 95 % interval, share of reference tokens that are the most "
        "likely next ones, and both of the baseline, recorded when the revision was promoted. Normal: as the baseline.",
        "percentunit",
        [
            Query(probed("score"), "right"),
            Query(probed("score_low"), "at least"),
            Query(probed("score_high"), "at most"),
            Query(probed("score_baseline"), "baseline"),
            Query(probed("agreement"), "next tokens"),
            Query(probed("agreement_baseline"), "their baseline"),
            Query(probed("items"), "items", "short"),
        ],
        "table", 24, alerts=["MillraceAccuracyDrift", "MillraceBaselineMissing"],
    ),
    Panel(
        "Service",
        "What clients get from each revision. Normal: the new one is no slower and fails no more than the one before.",
        "s",
        [
            Query(quantile(0.5, FIRST_TOKEN, BY), "first token p50"),
            Query(quantile(0.95, FIRST_TOKEN, BY), "p95"),
            Query(quantile(0.99, FIRST_TOKEN, BY), "p99"),
            Query(quantile(0.5, LATER_TOKENS, BY), "later tokens p50"),
            Query(quantile(0.99, LATER_TOKENS, BY), "their p99"),
            Query(rate(GENERATED, BY), "tokens/s", "short"),
            Query(FAILED, "failed", "percentunit"),
            Query(f"count by ({BY}) (millrace_model_info{{{CHOSEN}}})", "processes", "short"),
        ],
        "table", 24,
    ),
], height=6)  # fmt: skip

ACCURACY: Final = Row("Accuracy", [
    Panel(
        "Golden items answered right",
        "With the ends of the 95 % interval. Normal: the baseline lies between them.",
        "percentunit",
        with_interval("score"),
        highest=1, alerts=["MillraceAccuracyDrift", "MillraceBaselineMissing"],
    ),
    Panel(
        "Next tokens as in the reference",
        "Share of the reference's tokens that are the most likely next ones. Normal: exactly the baseline on one "
        "kind of processor, where tokens do not depend on load.",
        "percentunit",
        [
            Query(probed("agreement"), "{{model_name}}"),
            Query(probed("agreement_baseline"), "{{model_name}} baseline"),
        ],
        highest=1, alerts=["MillraceAccuracyDrift"],
    ),
    Panel(
        "How unlikely the right answers are",
        "Negative log-likelihood of a token of the right answers, with the ends of the mean's 95 % interval. Normal: "
        "exactly the baseline on one kind of processor.",
        "short",
        with_interval("nll"),
        alerts=["MillraceAccuracyDrift"],
    ),
    Panel(
        "Drop against the baseline",
        "As a share of it; sure is the lower end of its 95 % interval, item by item. Normal: 0. A P1: a drop over the "
        "dashed line with a sure part above 0, or next tokens over the line.",
        "percentunit",
        [
            Query(drop("score"), "{{model_name}} items"),
            Query(probed("drop_low"), "{{model_name}} items, sure"),
            Query(drop("agreement"), "{{model_name}} next tokens"),
            Query(f"exp({probed('nll')} - {probed('nll_baseline')}) - 1", "{{model_name}} perplexity, up"),
            Query(probed("nll_rise_low"), "{{model_name}} perplexity, sure"),
        ],
        limits=[Limit(0.03, "red")], can_be_negative=True, alerts=["MillraceAccuracyDrift"],
    ),
    Panel(
        "Since the last probe", "Since a run last ended well. Normal: minutes; over the dashed line drift is not seen.",
        "s", [Query(f"time() - {probed('last_success_timestamp_seconds')}", "{{model_name}}")],
        limits=[Limit(3600, "red")], alerts=["MillraceProbeStale"],
    ),
    Panel(
        "Items of a run", "Golden items that were answered. Normal: always as many; fewer make the interval wider.",
        "short", [Query(probed("items"), "{{model_name}}")], alerts=["MillraceProbeStale"],
    ),
    Panel(
        "Failed", "Share of accepted requests that ended in an error, by revision. Normal: 0.",
        "percentunit", [Query(FAILED, "{{model_name}}")], alerts=["MillraceErrorBudgetBurn"],
    ),
])  # fmt: skip

SPEED: Final = Row("Speed", [
    Panel(
        f"{title}, {name}", f"{meaning}, by revision. Normal: the new one is no slower.",
        "s", [Query(quantile(which, histogram, BY), "{{model_name}}")], alerts=alerts,
    )
    for title, meaning, histogram, alerts in (
        ("First token", "Arrival to first token", FIRST_TOKEN, ["MillraceSlowFirstToken"]),
        ("Later tokens", "From one token to the next", LATER_TOKENS, ["MillraceSlowTokens"]),
    )
    for name, which in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
])  # fmt: skip

ROLL_OUT: Final = Row("Roll-out", [
    TRAFFIC,
    Panel(
        "Processes, by version of the program", "That Prometheus reaches. Normal: one version, two in a release.",
        "short", [Query("count by (version) (millrace_build_info)", "{{version}}")], "areas",
    ),
    Panel(
        "Processes, by revision of the model", "That serve it. Normal: one revision, two in a release.",
        "short", [Query(f"count by ({BY}) (millrace_model_info{{{CHOSEN}}})", "{{model_name}}")], "areas",
        alerts=["MillraceDraining"],
    ),
    WORKERS,
    Panel(
        "Length of answers, p50", "Tokens, by revision. Normal: alike; a jump means other answers.",
        "short", [Query(quantile(0.5, "vllm:request_generation_tokens", BY), "{{model_name}}")],
    ),
    Panel(
        "Requests that ended", "Whole answers, by revision. Normal: it follows the traffic.",
        "reqps", [Query(rate(FINISHED, BY), "{{model_name}}")],
    ),
])  # fmt: skip

RELEASE: Final = Dashboard(
    "millrace-release", "Release", "Revisions of a model side by side: is the new one as good, as fast and as sure?",
    [SIDE_BY_SIDE, ACCURACY, SPEED, ROLL_OUT], MODELS, since="now-24h",
)  # fmt: skip

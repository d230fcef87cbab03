"""How a model answers: its latencies, where the time goes, and what comes out."""

from __future__ import annotations

from typing import Final

from scripts.dashboards.grafana import Dashboard, Limit, Panel, Query, Row
from scripts.dashboards.promql import (
    CHOSEN,
    FIRST_TOKEN,
    GENERATED,
    LATER_TOKENS,
    MODELS,
    PROMPTED,
    WHOLE,
    heat,
    hit_share,
    quantiles,
    rate,
)
from scripts.dashboards.shared import ANSWERED, KV_BLOCKS, TRAFFIC

LATENCY: Final = Row("Latency", [
    Panel(
        "Time to first token, as a heatmap",
        "How many requests got their first token after how long. Normal: one band; a second one above it is another "
        "kind of request, or a prefix cache that misses. Dots are single requests with a trace id.",
        "s", heat(FIRST_TOKEN), "heatmap", 16, alerts=["MillraceSlowFirstToken"],
    ),
    Panel(
        "Time to first token", "Arrival to first token. Promised: 99 % under the dashed line.",
        "s", quantiles(FIRST_TOKEN, "model_name"), limits=[Limit(2.5, "red")], alerts=["MillraceSlowFirstToken"],
    ),
    Panel(
        "Time between tokens",
        "From one token of a stream to the next. Promised: 99 % under the dashed line. Normal: steady under load, "
        "since a long prompt moves other streams by one chunk at most.",
        "s", quantiles(LATER_TOKENS, "model_name"), limits=[Limit(0.3, "red")], alerts=["MillraceSlowTokens"],
    ),
    Panel(
        "Whole answers", "Arrival to last token. Normal: it follows the length of answers (below).",
        "s", quantiles(WHOLE, "model_name"),
    ),
    Panel(
        "Slow tokens",
        "Share of first tokens after 2.5 s and of later ones after 0.3 s, in five minutes. Promised: under 1 %.",
        "percentunit",
        [
            Query(f"model_name:millrace_slow_{which}_tokens:ratio5m{{{CHOSEN}}}", which + " {{model_name}}")
            for which in ("first", "later")
        ],
        limits=[Limit(0.01, "red")], alerts=["MillraceSlowFirstToken", "MillraceSlowTokens"],
    ),
])  # fmt: skip

STAGES: Final = {
    "At the worker before its first step": (
        "queue", "Leased to first scheduled. Normal: a step or two; more is an engine that is full.",
    ),
    "Prefill": (
        "prefill", "First scheduled to first token. Normal: it follows the length of prompts that the cache has not.",
    ),
    "Decode": ("decode", "First token to last. Normal: it follows the length of answers."),
}  # fmt: skip

TIME: Final = Row("Where the time goes", [
    Panel(title, meaning, "s", quantiles(f"vllm:request_{stage}_time_seconds", "model_name"))
    for title, (stage, meaning) in STAGES.items()
])  # fmt: skip

TOKENS: Final = Row("Tokens", [
    Panel(
        "Tokens a second",
        "Of prompts that were accepted, and of answers that were delivered. Normal: both follow the requests.",
        "short",
        [
            Query(rate(PROMPTED, "model_name"), "prompt {{model_name}}"),
            Query(rate(GENERATED, "model_name"), "generated {{model_name}}"),
        ],
        alerts=["MillraceThroughputDrop"],
    ),
    Panel(
        "Length of prompts", "Tokens. Normal: what clients usually send; a jump explains slower first tokens.",
        "short", quantiles("vllm:request_prompt_tokens", "model_name"),
    ),
    Panel(
        "Length of answers", "Tokens. Normal: what clients usually get; a jump explains slower answers.",
        "short", quantiles("vllm:request_generation_tokens", "model_name"),
    ),
])  # fmt: skip

OUTCOMES: Final = Row("What comes out", [
    TRAFFIC,
    ANSWERED,
    Panel(
        "Failed, by code", "Accepted requests that ended in an error. Normal: none, or deadlines that clients chose.",
        "reqps", [Query(rate("millrace_requests_failed_total", "code"), "{{code}}")], "areas",
        alerts=["MillraceErrorBudgetBurn", "MillraceDeadLetters"],
    ),
])  # fmt: skip

MEMORY: Final = Row("Memory", [
    Panel(
        "Prompt tokens found in the prefix cache",
        "Share of what was looked up. Normal: steady; it falls when prompts begin to differ, or blocks are short.",
        "percentunit", [Query(hit_share("model_name"), "{{model_name}}")],
        highest=1, alerts=["MillracePrefixHitCollapse"],
    ),
    KV_BLOCKS,
    Panel(
        "Preempted", "Sequences that gave up their KV blocks and are computed again. Normal: none.",
        "ops", [Query(rate("vllm:num_preemptions_total", "model_name"), "{{model_name}}")],
        alerts=["MillraceKvPressure"],
    ),
])  # fmt: skip

MODEL: Final = Dashboard(
    "millrace-model", "Model", "How a model answers: its latencies, where the time goes, and what comes out.",
    [LATENCY, TIME, TOKENS, OUTCOMES, MEMORY], MODELS,
)  # fmt: skip

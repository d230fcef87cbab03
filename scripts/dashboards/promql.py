"""The few shapes that our queries have.

$__rate_interval is Grafana's: four scrapes at least, so that a rate never falls between two of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from scripts.dashboards.grafana import Query, Variable

# The model without its revision, and its revisions. Alerts lead here with one of them chosen.
MODELS: Final = (
    Variable("model", "Model", "label_values(millrace_model_info, model_name)", regex="/([^@]+)/"),
    Variable("model_name", "Revision", 'label_values(millrace_model_info{model_name=~"($model)(@.*)?"}, model_name)'),
)
CHOSEN: Final = 'model_name=~"$model_name"'
READY: Final = f'{CHOSEN},state="ready"'
WAITING: Final = f'{CHOSEN},state="waiting"'

FIRST_TOKEN: Final = "vllm:time_to_first_token_seconds"
LATER_TOKENS: Final = "vllm:inter_token_latency_seconds"
WHOLE: Final = "vllm:e2e_request_latency_seconds"
PROMPTED: Final = "vllm:prompt_tokens_total"
GENERATED: Final = "vllm:generation_tokens_total"
ADMITTED: Final = "millrace_requests_admitted_total"
REFUSED: Final = "millrace_refused_total"

QUANTILES: Final = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


def rate(counter: str, by: str = "", where: str = CHOSEN) -> str:
    """A second; of everything, or for each value of the labels `by`."""
    return f"{_over('sum', by)} (rate({_selected(counter, where)}[$__rate_interval]))"


def largest(gauge: str, by: str = "", where: str = CHOSEN) -> str:
    """What gateways say of the queue they all say alike: it must not be summed over them."""
    return f"{_over('max', by)} ({_selected(gauge, where)})"


def per(part: str, whole: str) -> str:
    """The share or the mean; nothing where there is no whole, and 0 where only the part is missing."""
    return f"({part} or 0 * {whole}) / ({whole} > 0)"


def hit_share(by: str, where: str = CHOSEN) -> str:
    """Prompt tokens found in the prefix cache, of those looked up."""
    return per(*(rate(f"vllm:prefix_cache_{each}_total", by, where) for each in ("hits", "queries")))


def quantile(which: float, histogram: str, by: str = "", where: str = CHOSEN) -> str:
    """A quantile of what was observed lately, for each value of the labels `by`."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({which}, {rate(f'{histogram}_bucket', labels, where)})"


def quantiles(histogram: str, by: str = "", where: str = CHOSEN) -> Sequence[Query]:
    """p50, p95 and p99, for each value of the label `by`."""
    of_whom = f" {{{{{by}}}}}" if by else ""
    return [Query(quantile(which, histogram, by, where), name + of_whom) for name, which in QUANTILES.items()]


def heat(histogram: str, where: str = CHOSEN) -> Sequence[Query]:
    """How many fell into each bucket."""
    return [Query(f"sum by (le) (increase({_selected(f'{histogram}_bucket', where)}[$__rate_interval]))", "{{le}}")]


def _over(aggregate: str, labels: str) -> str:
    return f"{aggregate} by ({labels})" if labels else aggregate


def _selected(metric: str, where: str) -> str:
    return f"{metric}{{{where}}}" if where else metric

"""Every metric of every process: one table with name, unit and meaning, and the hooks that feed it.

Names with a colon are vLLM's own, with its labels, wherever the meaning is the same, so that dashboards, autoscaling
rules and gateway endpoint pickers made for vLLM work unchanged; what is ours begins with millrace_. Buckets are a
superset of vLLM's with a finer low end (../docs/metrics.md is made from this table). Label values are bounded: models
served, codes, route templates.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from batcher.engine import EngineLoad
from gateway.telemetry import Completed

FAST_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.025, 0.04, 0.05, 0.06, 0.075, 0.08, 0.1)
TTFT_S: Final = (*FAST_S, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
ITL_S: Final = (*FAST_S, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
LATENCY_S: Final = (
    *(0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60),
    *(120, 240, 480, 960, 1920, 7680),
)
TOKENS: Final = tuple(mantissa * 10**power for power in range(6) for mantissa in (1, 2, 5))


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric. `labels` beside model_name and engine, which every vllm: metric has."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    meaning: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


MODEL: Final = ("model_name", "engine")
REQUEST_METRICS: Final = (
    MetricSpec("vllm:time_to_first_token_seconds", "histogram", "arrival to first token", MODEL, TTFT_S),
    MetricSpec("vllm:inter_token_latency_seconds", "histogram", "time between tokens of one stream", MODEL, ITL_S),
    MetricSpec("vllm:e2e_request_latency_seconds", "histogram", "arrival to last token", MODEL, LATENCY_S),
    MetricSpec("vllm:request_queue_time_seconds", "histogram", "leased to first scheduled", MODEL, LATENCY_S),
    MetricSpec("vllm:request_prefill_time_seconds", "histogram", "first scheduled to first token", MODEL, LATENCY_S),
    MetricSpec("vllm:request_decode_time_seconds", "histogram", "first to last token", MODEL, LATENCY_S),
    MetricSpec("vllm:request_prompt_tokens", "histogram", "tokens of a prompt", MODEL, TOKENS),
    MetricSpec("vllm:request_generation_tokens", "histogram", "tokens of an answer", MODEL, TOKENS),
    MetricSpec("vllm:prompt_tokens", "counter", "prompt tokens of admitted requests", MODEL),
    MetricSpec("vllm:generation_tokens", "counter", "tokens delivered", MODEL),
    MetricSpec("vllm:request_success", "counter", "requests ended with an answer", (*MODEL, "finished_reason")),
    MetricSpec("millrace_requests_admitted", "counter", "requests the queue has accepted", MODEL),
    MetricSpec("millrace_requests_failed", "counter", "admitted requests that ended in an error", (*MODEL, "code")),
    MetricSpec("millrace_refused", "counter", "requests, frames and streams answered with an error", ("code",)),
    MetricSpec("millrace_websockets_open", "gauge", "open WebSockets"),
    MetricSpec(
        "millrace_http_request_duration_seconds", "histogram", "HTTP answers; a stream counts when it ends",
        ("route", "method", "status"), LATENCY_S,
    ),
)  # fmt: skip
ENGINE_METRICS: Final = (
    MetricSpec("vllm:num_requests_running", "gauge", "sequences in the engine's batch", MODEL),
    MetricSpec("vllm:num_requests_waiting", "gauge", "requests leased and waiting for blocks or budget", MODEL),
    MetricSpec("vllm:kv_cache_usage_perc", "gauge", "share of KV blocks in use, 0 to 1", MODEL),
    MetricSpec("vllm:prefix_cache_queries", "counter", "prompt tokens looked up in the prefix cache", MODEL),
    MetricSpec("vllm:prefix_cache_hits", "counter", "prompt tokens found in the prefix cache", MODEL),
    MetricSpec("vllm:num_preemptions", "counter", "sequences preempted for want of KV blocks", MODEL),
    MetricSpec("millrace_engine_steps", "counter", "steps committed", MODEL),
    MetricSpec("millrace_engine_step_seconds", "counter", "time in steps, by part", (*MODEL, "part")),
    MetricSpec("millrace_scheduled_tokens", "counter", "tokens computed, by kind (prefill, decode)", (*MODEL, "kind")),
    MetricSpec("millrace_up", "gauge", "1 while steps commit or nothing waits", MODEL),
)

_KINDS: Final = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
ENGINE_LABEL: Final = "0"


class GatewayMetrics:
    """Implements gateway.telemetry.Telemetry over the registry, and logs one line for each ended request."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._logger = logging.getLogger("millrace.requests")
        self._histograms: dict[str, Histogram] = {}
        self._counters: dict[str, Counter] = {}
        self._sockets = Gauge("millrace_websockets_open", "open WebSockets", registry=registry)
        for spec in REQUEST_METRICS:
            if spec.kind == "histogram":
                self._histograms[spec.name] = Histogram(
                    spec.name, spec.meaning, spec.labels, buckets=spec.buckets, registry=registry
                )
            elif spec.kind == "counter":
                self._counters[spec.name] = Counter(spec.name, spec.meaning, spec.labels, registry=registry)

    def http_answered(self, route: str, method: str, status: int, seconds: float) -> None:
        self._histograms["millrace_http_request_duration_seconds"].labels(route, method, str(status)).observe(seconds)

    def refused(self, code: str) -> None:
        self._counters["millrace_refused"].labels(code).inc()

    def admitted(self, model: str, prompt_tokens: int, max_tokens: int) -> None:
        self._counters["millrace_requests_admitted"].labels(model, ENGINE_LABEL).inc()
        self._counters["vllm:prompt_tokens"].labels(model, ENGINE_LABEL).inc(prompt_tokens)

    def first_token(self, model: str, seconds: float) -> None:
        self._observe("vllm:time_to_first_token_seconds", model, seconds)

    def tokens(self, model: str, count: int, seconds: float) -> None:
        self._counters["vllm:generation_tokens"].labels(model, ENGINE_LABEL).inc(count)
        if seconds > 0:
            self._observe("vllm:inter_token_latency_seconds", model, seconds / count)

    def completed(self, completed: Completed) -> None:
        model = completed.model
        if completed.finish_reason in ("stop", "length", "cancelled"):
            reason = "abort" if completed.finish_reason == "cancelled" else completed.finish_reason  # vLLM's word
            self._counters["vllm:request_success"].labels(model, ENGINE_LABEL, reason).inc()
        else:
            self._counters["millrace_requests_failed"].labels(model, ENGINE_LABEL, completed.finish_reason).inc()
        self._observe("vllm:e2e_request_latency_seconds", model, completed.total_s)
        self._observe("vllm:request_prompt_tokens", model, completed.prompt_tokens)
        self._observe("vllm:request_generation_tokens", model, completed.completion_tokens)
        for name, value in (
            ("vllm:request_queue_time_seconds", completed.queue_s),
            ("vllm:request_prefill_time_seconds", completed.prefill_s),
            ("vllm:request_decode_time_seconds", completed.decode_s),
        ):
            if value is not None:
                self._observe(name, model, value)
        if self._logger.isEnabledFor(logging.INFO):
            self._logger.info("request finished", extra=_facts(completed))

    def sockets(self, change: int) -> None:
        self._sockets.inc(change)

    def _observe(self, name: str, model: str, value: float) -> None:
        self._histograms[name].labels(model, ENGINE_LABEL).observe(value)


def _facts(completed: Completed) -> dict[str, object]:
    ms = {"ttft_ms": completed.ttft_s, "queue_ms": completed.queue_s, "total_ms": completed.total_s}
    return {
        "request": completed.id,
        "model": completed.model,
        "finish_reason": completed.finish_reason,
        "prompt_tokens": completed.prompt_tokens,
        "cached_tokens": completed.cached_tokens,
        "completion_tokens": completed.completion_tokens,
        **{name: None if value is None else round(value * 1000, 1) for name, value in ms.items()},
    }


@dataclass(frozen=True, slots=True)
class EngineSource:
    """One engine to watch."""

    model_id: str
    load: Callable[[], EngineLoad]
    is_alive: Callable[[], bool]


class EngineCollector(Collector):
    """Reads the engines' loads when Prometheus scrapes: a step pays nothing for being watched.

    One for all engines, because a metric's name and type may be said only once in an answer.
    """

    def __init__(self, sources: Sequence[EngineSource]) -> None:
        self._sources = sources

    def collect(self) -> Iterable[Metric]:
        read = [(each.model_id, engine_values(each.load(), is_alive=each.is_alive())) for each in self._sources]
        for spec in ENGINE_METRICS:
            family = CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily
            metric = family(spec.name, spec.meaning, labels=spec.labels)
            for model_id, values in read:
                for extra, value in values[spec.name]:
                    metric.add_metric((model_id, ENGINE_LABEL, *extra), value)
            yield metric


def engine_values(load: EngineLoad, *, is_alive: bool) -> dict[str, list[tuple[tuple[str, ...], float]]]:
    """The value of each ENGINE_METRICS row: (extra label values, value)."""
    return {
        "vllm:num_requests_running": [((), load.running)],
        "vllm:num_requests_waiting": [((), load.waiting)],
        "vllm:kv_cache_usage_perc": [((), load.kv_usage)],
        "vllm:prefix_cache_queries": [((), load.prefix_queried_tokens)],
        "vllm:prefix_cache_hits": [((), load.prefix_hit_tokens)],
        "vllm:num_preemptions": [((), load.preemptions)],
        "millrace_engine_steps": [((), load.steps)],
        "millrace_engine_step_seconds": [
            (("plan",), load.plan_s),
            (("pack",), load.pack_s),
            (("forward",), load.forward_s),
            (("commit",), load.commit_s),
        ],
        "millrace_scheduled_tokens": [(("prefill",), load.prefill_tokens), (("decode",), load.decode_tokens)],
        "millrace_up": [((), float(is_alive))],
    }


# What every record has; anything else came with `extra`.
_PLAIN_RECORD: Final = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message"}


class JsonLines(logging.Formatter):
    """One JSON object a line; the fields of `extra` stand beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _PLAIN_RECORD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(level: str) -> None:
    """JSON lines on standard error, ours and the server's alike."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("uvicorn.access").disabled = True  # one line a request is written by GatewayMetrics
    logging.getLogger("uvicorn.error").setLevel("DEBUG" if level == "debug" else "WARNING")  # its starts and stops

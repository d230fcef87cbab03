"""Every metric of every process: one table with name, unit and meaning.

Names with a colon are vLLM's own, with its labels, wherever the meaning is the same, so that dashboards, autoscaling
rules and gateway endpoint pickers made for vLLM work unchanged; what is ours begins with millrace_. Buckets are a
superset of vLLM's with a finer low end (../../docs/metrics.md is made from this table). Label values are bounded:
models served, codes, route templates, and the tenants of the keys file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

ENGINE_LABEL: Final = "0"

FAST_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.025, 0.04, 0.05, 0.06, 0.075, 0.08, 0.1)
TTFT_S: Final = (*FAST_S, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
ITL_S: Final = (*FAST_S, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
LATENCY_S: Final = (
    *(0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60),
    *(120, 240, 480, 960, 1920, 7680),
)
CALL_S: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
TOKENS: Final = tuple(mantissa * 10**power for power in range(6) for mantissa in (1, 2, 5))


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric. A counter's name is without the _total that it is exposed with."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    meaning: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def exposed(self) -> str:
        """As queries write it."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


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
    MetricSpec("millrace_tenant_requests", "counter", "requests the queue has accepted, by tenant", ("tenant",)),
    MetricSpec(
        "millrace_tenant_tokens", "counter",
        "tokens by tenant and kind: prompt (when accepted), generated (when the request ends)", ("tenant", "kind"),
    ),
    MetricSpec(
        "millrace_streams_resumed", "counter", "streams read again from a token, taken in here or at another gateway"
    ),
)  # fmt: skip
QUEUE_METRICS: Final = (
    MetricSpec("millrace_queue_up", "gauge", "1 while the queue answers and news come in"),
    MetricSpec(
        "millrace_queue_requests", "gauge", "requests of the whole queue, by state (waiting, running)",
        ("model_name", "state"),
    ),
    MetricSpec(
        "millrace_queue_tokens", "gauge", "their tokens, prompt and max_tokens, by state", ("model_name", "state")
    ),
    MetricSpec(
        "millrace_queue_oldest_waiting_seconds", "gauge",
        "how long the oldest of those who wait has waited, since it came or came back; 0 = nobody waits",
        ("model_name",),
    ),
    MetricSpec("millrace_dead_letters", "counter", "requests given up after their last delivery", ("model_name",)),
    MetricSpec(
        "millrace_workers", "gauge", "workers that have reported within 10 s, by state (ready, draining)",
        ("model_name", "state"),
    ),
    MetricSpec(
        "millrace_replica_capacity_tokens", "gauge",
        "KV tokens of one worker: the mean of those seen, else what was last seen, else the setting",
        ("model_name",),
    ),
    MetricSpec("millrace_redis_memory_used_bytes", "gauge", "memory that Redis uses"),
    MetricSpec("millrace_redis_memory_max_bytes", "gauge", "its limit; 0 = none"),
    MetricSpec("millrace_redis_aof_ok", "gauge", "1 if Redis keeps a file of appends and its last writes succeeded"),
    MetricSpec("millrace_redis_connected_replicas", "gauge", "replicas of Redis that are in step"),
    MetricSpec("millrace_redis_expected_replicas", "gauge", "replicas that there should be (setting redis_replicas)"),
)  # fmt: skip
PROCESS_METRICS: Final = (
    MetricSpec("millrace_build_info", "gauge", "1; what runs", ("version",)),
    MetricSpec("millrace_model_info", "gauge", "1; what it serves", ("model_name", "revision")),
    MetricSpec("millrace_draining", "gauge", "1 while this process drains"),
)
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
LEASE_METRICS: Final = (
    MetricSpec(
        "millrace_leases", "counter", "requests leased: first delivery, again, or the last one (suspect)",
        (*MODEL, "kind"),
    ),
    MetricSpec("millrace_leases_fenced", "counter", "leases lost: to another worker, or ended meanwhile", MODEL),
    MetricSpec("millrace_publish_seconds", "histogram", "time of one publish call to the queue", MODEL, CALL_S),
)  # fmt: skip
DEVICE_METRICS: Final = (
    MetricSpec(
        "millrace_device_utilization_ratio", "gauge",
        "0 to 1: of the processor time this process or its container may use, since the last scrape (cpu); "
        "of time with a kernel running, by NVML (gpu0 ...)", ("device",),
    ),
)  # fmt: skip
PROBE_METRICS: Final = (
    MetricSpec("millrace_probe_items", "gauge", "golden items answered in the last run", ("model_name",)),
    MetricSpec("millrace_probe_score", "gauge", "share of them answered right, 0 to 1", ("model_name",)),
    MetricSpec("millrace_probe_score_low", "gauge", "lower end of its 95 % interval", ("model_name",)),
    MetricSpec("millrace_probe_score_high", "gauge", "upper end of its 95 % interval", ("model_name",)),
    MetricSpec("millrace_probe_score_baseline", "gauge", "share that the baseline has right", ("model_name",)),
    MetricSpec(
        "millrace_probe_drop_low", "gauge",
        "lower end of the 95 % interval of the drop against the baseline, relative to it, item by item",
        ("model_name",),
    ),
    MetricSpec(
        "millrace_probe_agreement", "gauge", "share of reference tokens that are the most likely next ones, 0 to 1",
        ("model_name",),
    ),
    MetricSpec("millrace_probe_agreement_baseline", "gauge", "the same, of the baseline", ("model_name",)),
    MetricSpec(
        "millrace_probe_nll", "gauge", "negative log-likelihood of the right answers, nats a token, mean of the items",
        ("model_name",),
    ),
    MetricSpec("millrace_probe_nll_low", "gauge", "lower end of its 95 % interval", ("model_name",)),
    MetricSpec("millrace_probe_nll_high", "gauge", "upper end of its 95 % interval", ("model_name",)),
    MetricSpec("millrace_probe_nll_baseline", "gauge", "the same mean, of the baseline", ("model_name",)),
    MetricSpec(
        "millrace_probe_nll_rise_low", "gauge",
        "lower end of the 95 % interval of its rise against the baseline, in nats a token, item by item",
        ("model_name",),
    ),
    MetricSpec("millrace_probe_last_success_timestamp_seconds", "gauge", "when a run last ended well", ("model_name",)),
)  # fmt: skip

# Who exports what. `millrace up` is gateway and worker in one.
TABLES: Final[Mapping[str, Sequence[MetricSpec]]] = {
    "gateway": (*REQUEST_METRICS, *QUEUE_METRICS, *PROCESS_METRICS),
    "worker": (*ENGINE_METRICS, *LEASE_METRICS, *DEVICE_METRICS, *PROCESS_METRICS),
    "prober": PROBE_METRICS,
}


class Instruments:
    """Rows of the table as things to count with, by name."""

    def __init__(self, specs: Iterable[MetricSpec], registry: CollectorRegistry) -> None:
        self.counters: dict[str, Counter] = {}
        self.gauges: dict[str, Gauge] = {}
        self.histograms: dict[str, Histogram] = {}
        for spec in specs:
            name, meaning, labels = spec.name, spec.meaning, spec.labels
            if spec.kind == "counter":
                self.counters[name] = Counter(name, meaning, labels, registry=registry)
            elif spec.kind == "gauge":
                self.gauges[name] = Gauge(name, meaning, labels, registry=registry)
            else:
                self.histograms[name] = Histogram(name, meaning, labels, buckets=spec.buckets, registry=registry)
        self._counters: dict[tuple[str, ...], Counter] = {}
        self._histograms: dict[tuple[str, ...], Histogram] = {}

    # What `labels` makes is kept: asking the library for it costs more than counting does, and tokens are counted.

    def counter(self, name: str, *labels: str) -> Counter:
        """The counter of these label values."""
        found = self._counters.get((name, *labels))
        if found is None:
            found = self._counters[name, *labels] = self.counters[name].labels(*labels)
        return found

    def histogram(self, name: str, *labels: str) -> Histogram:
        """The histogram of these label values."""
        found = self._histograms.get((name, *labels))
        if found is None:
            found = self._histograms[name, *labels] = self.histograms[name].labels(*labels)
        return found


Samples = Mapping[str, Iterable[tuple[tuple[str, ...], float]]]


def families(specs: Iterable[MetricSpec], samples: Samples) -> Iterator[Metric]:
    """Rows of the table with what a scrape has read: (label values, value) by name. A row without samples says so."""
    for spec in specs:
        family = CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily
        metric = family(spec.name, spec.meaning, labels=spec.labels)
        for labels, value in samples.get(spec.name, ()):
            metric.add_metric(labels, value)
        yield metric

"""The gateway's hooks, fed into the registry, and one log line for each ended request."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from prometheus_client import CollectorRegistry

from gateway.telemetry import Completed
from services.telemetry.table import ENGINE_LABEL, REQUEST_METRICS, Instruments
from wire.errors import CODES

MAX_TENANTS: Final = 200  # whoever comes later is counted as OTHER
OTHER: Final = "other"
ANONYMOUS: Final = "anonymous"  # where no keys are asked for


class GatewayMetrics:
    """Implements gateway.telemetry.Telemetry.

    Counters of `model_ids`, and of every error code, begin at 0, so that a rate sees the first one too.
    """

    def __init__(self, registry: CollectorRegistry, model_ids: Sequence[str] = ()) -> None:
        self._logger = logging.getLogger("millrace.requests")
        self._made = Instruments(REQUEST_METRICS, registry)
        self._sockets = self._made.gauges["millrace_websockets_open"]
        self._tenants: set[str] = set()
        for code in CODES:
            self._made.counter("millrace_refused", code)
        for model in model_ids:
            for name in ("millrace_requests_admitted", "vllm:prompt_tokens", "vllm:generation_tokens"):
                self._made.counter(name, model, ENGINE_LABEL)

    def http_answered(self, route: str, method: str, status: int, seconds: float) -> None:
        self._made.histogram("millrace_http_request_duration_seconds", route, method, str(status)).observe(seconds)

    def refused(self, code: str) -> None:
        self._made.counter("millrace_refused", code).inc()

    def admitted(self, model: str, tenant: str, prompt_tokens: int, max_tokens: int) -> None:
        self._made.counter("millrace_requests_admitted", model, ENGINE_LABEL).inc()
        self._made.counter("vllm:prompt_tokens", model, ENGINE_LABEL).inc(prompt_tokens)
        name = self._tenant(tenant)
        self._made.counter("millrace_tenant_requests", name).inc()
        self._made.counter("millrace_tenant_tokens", name, "prompt").inc(prompt_tokens)

    def first_token(self, model: str, seconds: float, trace_id: str) -> None:
        self._observe("vllm:time_to_first_token_seconds", model, seconds, trace_id)

    def tokens(self, model: str, count: int, seconds: float) -> None:
        self._made.counter("vllm:generation_tokens", model, ENGINE_LABEL).inc(count)
        if seconds > 0:
            self._observe("vllm:inter_token_latency_seconds", model, seconds / count)

    def completed(self, completed: Completed) -> None:
        model = completed.model
        if completed.finish_reason in ("stop", "length", "cancelled"):
            reason = "abort" if completed.finish_reason == "cancelled" else completed.finish_reason  # vLLM's word
            self._made.counter("vllm:request_success", model, ENGINE_LABEL, reason).inc()
        else:
            self._made.counter("millrace_requests_failed", model, ENGINE_LABEL, completed.finish_reason).inc()
        tenant = self._tenant(completed.tenant)
        self._made.counter("millrace_tenant_tokens", tenant, "generated").inc(completed.completion_tokens)
        self._observe("vllm:e2e_request_latency_seconds", model, completed.total_s, completed.trace_id)
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

    def resumed(self) -> None:
        self._made.counters["millrace_streams_resumed"].inc()

    def sockets(self, change: int) -> None:
        self._sockets.inc(change)

    def _observe(self, name: str, model: str, value: float, trace_id: str = "") -> None:
        exemplar = {"trace_id": trace_id} if trace_id else None
        self._made.histogram(name, model, ENGINE_LABEL).observe(value, exemplar)

    def _tenant(self, tenant: str) -> str:
        if not tenant:
            return ANONYMOUS
        if tenant not in self._tenants:
            if len(self._tenants) >= MAX_TENANTS:
                return OTHER
            self._tenants.add(tenant)
        return tenant


def _facts(completed: Completed) -> dict[str, object]:
    ms = {"ttft_ms": completed.ttft_s, "queue_ms": completed.queue_s, "total_ms": completed.total_s}
    facts: dict[str, object] = {
        "request": completed.id,
        "model": completed.model,
        "finish_reason": completed.finish_reason,
        "prompt_tokens": completed.prompt_tokens,
        "cached_tokens": completed.cached_tokens,
        "completion_tokens": completed.completion_tokens,
        **{name: None if value is None else round(value * 1000, 1) for name, value in ms.items()},
    }
    named = {"tenant": completed.tenant, "trace_id": completed.trace_id}
    return facts | {name: value for name, value in named.items() if value}

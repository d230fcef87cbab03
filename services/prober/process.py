"""`millrace probe`: run after run in a process of its own, with /metrics; or one run for a script.

It speaks to the queue as a gateway does, so what it measures has gone the whole way: queue, lease, batch, model, log.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry

from gateway.models import ServedModel
from services.loading import find_model
from services.model_commands import SHIPPED_DIRECTORY, SHIPPED_NAME, ensure_shipped
from services.prober.baseline import Baseline, read_baseline, write_baseline
from services.prober.golden import Item, questions, read_golden
from services.prober.report import ProbeMetrics, Report
from services.prober.run import Outcome, ProbeFailed, Prober
from services.redis_queue import open_queue
from services.serving import (
    Server,
    address_of,
    begin,
    expose_metrics,
    gateway_limits,
    on_signals,
    probe_routes,
    run_loop,
    uvicorn_config,
)
from services.settings import Settings, SettingsError
from services.telemetry.log import configure_logging

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProbeOptions:
    """The command's flags."""

    model: str
    golden: Path | None = None  # None: the shipped model's
    most_items: int = 0  # 0 = all
    concurrency: int = 8
    every_s: float = 300.0
    baseline: Path | None = None
    record: Path | None = None
    is_once: bool = False
    as_json: bool = False


@dataclass(frozen=True, slots=True)
class _Exam:
    """A model, what it is asked, and what it answered when it was known to be good."""

    model: ServedModel
    items: Sequence[Item]
    before: Outcome | None

    def report(self, now: Outcome) -> Report:
        return Report.of(self.model.model_id, now, self.before)


def probe(settings: Settings, options: ProbeOptions) -> int:
    """Until a signal, or one run; the exit code is 1 if that one did not get its answers.

    Raises SettingsError, UnknownModel, Unavailable.
    """
    if options.is_once or options.record is not None:
        configure_logging(settings.log_level)
        ensure_shipped(settings)
        return run_loop(_once(settings, options, _prepare(settings, options)))
    _, listener = begin(settings)
    return run_loop(_serve(settings, options, _prepare(settings, options), listener))


def _prepare(settings: Settings, options: ProbeOptions) -> _Exam:
    model = ServedModel.load(find_model(settings, options.model).directory, gateway_limits(settings))
    golden = options.golden
    if golden is None:
        if model.name != SHIPPED_NAME:
            raise SettingsError(f"model {model.model_id} has no golden items here; give them with --golden FILE")
        golden = SHIPPED_DIRECTORY / "golden.jsonl"
    items = read_golden(golden, options.most_items)
    before = None
    if options.baseline is not None:
        baseline = read_baseline(options.baseline, model.model_id, items)
        if baseline is None:
            logger.warning("no baseline", extra={"model": model.model_id, "file": str(options.baseline)})
        else:
            before = baseline.outcome(items)
    return _Exam(model, items, before)


async def _once(settings: Settings, options: ProbeOptions, exam: _Exam) -> int:
    asked = questions(exam.items, exam.model)
    queue = await open_queue(settings)
    try:
        now = await Prober(queue, exam.model, asked, concurrency=options.concurrency).run()
    except ProbeFailed as failure:
        print(f"millrace: the probe failed: {failure}", file=sys.stderr)
        return 1
    finally:
        await queue.close()
    if options.record is not None:
        write_baseline(options.record, exam.model.model_id, Baseline.of(exam.items, now))
    report = exam.report(now)
    print(report.as_json() if options.as_json else report.as_text())
    return 0


async def _serve(settings: Settings, options: ProbeOptions, exam: _Exam, listener: socket.socket) -> int:
    asked = questions(exam.items, exam.model)
    queue = await open_queue(settings)
    registry = CollectorRegistry()
    metrics = ProbeMetrics(registry)
    prober = Prober(queue, exam.model, asked, concurrency=options.concurrency)
    runs = asyncio.create_task(_run_for_ever(prober, exam, metrics, options.every_s), name="probe")
    stopping = asyncio.Event()
    app = probe_routes(is_live=lambda: not runs.done(), is_ready=lambda: queue.is_connected and not stopping.is_set())
    expose_metrics(settings, app, registry)
    server = Server(uvicorn_config(settings, app))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    on_signals(stopping, server)
    print(f"Millrace prober asks {exam.model.model_id}; probes at {address_of(listener)}", flush=True)
    stop = asyncio.create_task(stopping.wait())
    await asyncio.wait([stop, serving, runs], return_when=asyncio.FIRST_COMPLETED)
    is_lost = runs.done()  # only a bug ends them
    runs.cancel()  # what it has asked is abandoned
    ends = await asyncio.gather(runs, return_exceptions=True)
    if is_lost:
        logger.error("the prober has ended", extra={"reason": repr(ends[0])})
    server.should_exit = True
    await serving
    await queue.close()
    return 1 if is_lost else 0


async def _run_for_ever(prober: Prober, exam: _Exam, metrics: ProbeMetrics, every_s: float) -> None:
    """Start a run every `every_s` seconds, or when the one before has ended, if that is later."""
    while True:
        started_s = time.monotonic()
        try:
            report = exam.report(await prober.run())
            metrics.show(report, time.time())
            facts = {"model": report.model, "score": report.score, "agreement": report.agreement}
            logger.info("probed", extra={**facts, "drop_low": report.drop_low, "seconds": report.seconds})
        except ProbeFailed as failure:
            logger.warning("probe failed", extra={"model": prober.model.model_id, "reason": str(failure)})
        await asyncio.sleep(max(0.0, started_s + every_s - time.monotonic()))

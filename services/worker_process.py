"""`millrace worker`: engines in a process of its own, taking work from the queue that gateways fill.

It takes only what it can run. On SIGTERM it takes nothing new, finishes what runs (drain_s) and hands the rest back;
killed, its leases lapse and another worker continues at the next token. Its port answers probes and /metrics.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Sequence
from dataclasses import replace

from prometheus_client import CollectorRegistry

from services.crew import Crew
from services.loading import StoredModel
from services.redis_queue import open_queue
from services.serving import (
    Server,
    address_of,
    begin,
    expose_metrics,
    on_signals,
    probe_routes,
    run_loop,
    settle,
    uvicorn_config,
)
from services.settings import Settings, package_version
from services.telemetry.process import describe_process


def run_worker(settings: Settings) -> int:
    """Work until a signal; the exit code is 1 if a model's backend was lost."""
    settings = _beside_others(settings)
    os.nice(settings.worker_nice)  # before any thread is there: tokens wait for a millisecond, refusals need not
    return run_loop(_work(settings, *begin(settings)))


def _beside_others(settings: Settings) -> Settings:
    """A worker often shares its cores with a gateway or Redis, or has a quota of them: spinning takes from both."""
    return replace(settings, spin="no") if settings.spin == "auto" else settings


async def _work(settings: Settings, models: Sequence[StoredModel], listener: socket.socket) -> int:
    queue = await open_queue(settings)
    registry = CollectorRegistry()
    name = f"{socket.gethostname()}-{secrets.token_hex(4)}"
    crew = Crew(settings, models, queue, name, registry)
    draining = asyncio.Event()
    app = probe_routes(
        is_live=lambda: crew.is_alive,
        is_ready=lambda: queue.is_connected and not draining.is_set() and crew.is_ready,
    )
    describe_process(registry, package_version(), [model.manifest for model in models], draining.is_set)
    expose_metrics(settings, app, registry)
    server = Server(uvicorn_config(settings, app))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    on_signals(draining, server)
    served = ", ".join(model.manifest.model_id for model in models)
    await crew.announce()
    settle()
    print(f"Millrace worker {name} runs {served}; probes at {address_of(listener)}", flush=True)
    code = await crew.work(draining, serving)
    server.should_exit = True
    await serving
    await queue.close()
    return code

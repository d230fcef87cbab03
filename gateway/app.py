"""The gateway as an application: its parts put together, its routes, its errors, its end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from gateway.admission import Admission
from gateway.edge import Edge
from gateway.generate import add_generate_routes
from gateway.keys import KeyRing
from gateway.ledger import Ledger
from gateway.limits import GatewayLimits
from gateway.models import Models
from gateway.openapi import Json, describe
from gateway.probes import Health, add_probe_routes
from gateway.problems import exception_handler
from gateway.prompts import Prompts
from gateway.room import Room
from gateway.telemetry import NoTelemetry, Telemetry
from gateway.tokenization import add_tokenizer_routes
from gateway.websocket import add_socket_route
from wire.errors import MillraceError
from wire.queue import Queue


def create_app(
    queue: Queue,
    models: Models,
    *,
    limits: GatewayLimits | None = None,
    health: Callable[[], Health],
    telemetry: Telemetry | None = None,
    keys: KeyRing | None = None,
    version: str = "unknown",
) -> FastAPI:
    """A gateway over `queue` for `models`. The caller owns the queue: it is not closed here. No `keys`: open to all.

    When the application shuts down, what runs for its clients runs on: they may come back to another gateway.
    """
    limits = limits or GatewayLimits()
    telemetry = telemetry or NoTelemetry()
    prompts = Prompts(limits)
    room = Room(
        models=models,
        limits=limits,
        telemetry=telemetry,
        health=health,
        prompts=prompts,
        admission=Admission(models, prompts, limits),
        ledger=Ledger(queue, models, telemetry),
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await room.close()

    # docs_url, redoc_url: those pages load scripts from other people's servers.
    app = FastAPI(title="Millrace", version=version, lifespan=lifespan, docs_url=None, redoc_url=None)
    add_generate_routes(app, room)
    add_socket_route(app, room)
    add_tokenizer_routes(app, room)
    add_probe_routes(app, health, models, version)
    for error in (MillraceError, RequestValidationError, HTTPException):
        app.add_exception_handler(error, exception_handler(telemetry))
    app.add_middleware(Edge, limits=limits, telemetry=telemetry, keys=keys)

    def openapi() -> Json:
        if app.openapi_schema is None:
            app.openapi_schema = describe(app, needs_key=keys is not None)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way
    return app

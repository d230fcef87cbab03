"""One server for the tests that do not end it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from services.settings import Settings
from tests.e2e.server import Server, serve


@pytest.fixture(scope="session")
def server(shipped_settings: Settings) -> Iterator[Server]:
    with serve(shipped_settings.store, cancel_grace_s="0.5") as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as connected:
        yield connected

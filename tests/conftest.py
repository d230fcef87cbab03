"""Fixtures that several rooms share: the shipped model, imported once a session into a store of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.loading import StoredModel, find_model
from services.model_commands import SHIPPED_NAME, ensure_shipped
from services.settings import Settings


@pytest.fixture(scope="session")
def shipped_settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings whose store holds the shipped model as w8a8."""
    store: Path = tmp_path_factory.mktemp("store")
    settings = Settings(store=store, kv_memory_bytes=64 * 2**20, threads=2)
    ensure_shipped(settings)
    return settings


@pytest.fixture(scope="session")
def shipped(shipped_settings: Settings) -> StoredModel:
    """The shipped model as an artifact."""
    return find_model(shipped_settings, SHIPPED_NAME)

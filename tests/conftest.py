"""Fixtures that several rooms share."""

from __future__ import annotations

import hypothesis
import pytest

from services.loading import StoredModel
from services.settings import Settings
from tests import shipped as shipped_store

# A shared machine may stall anywhere; how long an example takes proves nothing here.
hypothesis.settings.register_profile("millrace", deadline=None)
hypothesis.settings.load_profile("millrace")


@pytest.fixture(scope="session")
def shipped_settings() -> Settings:
    """Settings whose store holds the shipped model as w8a8."""
    return shipped_store.shipped_settings()


@pytest.fixture(scope="session")
def shipped() -> StoredModel:
    """The shipped model as an artifact."""
    return shipped_store.shipped_model()

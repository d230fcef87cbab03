"""The shipped model, imported once a test process into a store of its own."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

from services.backends.onnxruntime import OnnxRuntimeBackend
from services.backends.sizing import StepLimits, bytes_per_block
from services.loading import StoredModel, find_model
from services.model_commands import SHIPPED_NAME, ensure_shipped
from services.settings import Settings


@lru_cache(maxsize=1)
def shipped_settings() -> Settings:
    """Settings whose store holds the shipped model as w8a8."""
    store = Path(tempfile.mkdtemp(prefix="millrace-store-"))
    atexit.register(shutil.rmtree, store, ignore_errors=True)
    settings = Settings(store=store, kv_memory_bytes=64 * 2**20, threads=2)
    ensure_shipped(settings)
    return settings


def shipped_model() -> StoredModel:
    """The shipped model as an artifact."""
    return find_model(shipped_settings(), SHIPPED_NAME)


def shipped_backend(*, blocks: int = 64, batch_tokens: int = 64, batch_seqs: int = 16) -> OnnxRuntimeBackend:
    """The shipped model, loaded in a small size."""
    model = shipped_model()
    limits = StepLimits(batch_tokens, batch_seqs, blocks * bytes_per_block(model.manifest), threads=2)
    return OnnxRuntimeBackend(model.directory, model.manifest, limits)

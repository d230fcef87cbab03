"""Each fault once, with real processes. `make faults` does many."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest

from services.settings import Settings
from tests.faults.drill import run_fault, tokens_without_faults
from tests.faults.faults import FAULTS, STORM
from tests.faults.scene import Scene

STREAMS = 8
# What a fault that has happened leaves behind, besides tokens that are right.
TRACES: Mapping[str, str] = {"F6": "resumes", "F12": "takeovers"}


@pytest.mark.parametrize("name", [name for name in FAULTS if name != "F4-minute"])
def test_nothing_is_lost_doubled_or_changed(name: str, shipped_settings: Settings, tmp_path: Path) -> None:
    fault, expected = FAULTS[name], tokens_without_faults(shipped_settings.store)
    streams = STREAMS if fault.streams is None else min(STREAMS, fault.streams)
    with Scene(shipped_settings.store, tmp_path, fault.stage).open() as scene:
        tally = asyncio.run(run_fault(scene, fault, expected, runs=1, streams=streams, seed=3))
    assert tally.is_clean, tally
    assert tally.streams >= {"F12": 7, "F15": STORM}.get(name, STREAMS)
    assert name not in TRACES or getattr(tally, TRACES[name]) > 0, tally

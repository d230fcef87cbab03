"""The judge sees what goes wrong, and a few of each fault go well. `make faults` does many."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from services.settings import Settings
from tests.faults.history import History, Verdict, judge
from tests.faults.scene import FAULTS, Scene, run_fault

EXPECTED = [5, 6, 7, 8]


@pytest.mark.parametrize(
    ("events", "finish_reason", "verdict"),
    [
        ([(0.0, 0, [5, 6]), (0.5, 2, [7, 8])], "length", Verdict(0, 0, 0, 0.5)),
        ([(0.0, 0, [5, 6]), (0.5, 1, [6, 7, 8])], "length", Verdict(0, 1, 0, 0.5)),
        ([(0.0, 0, [5, 6]), (0.5, 3, [8])], "length", Verdict(1, 0, 0, 0.5)),
        ([(0.0, 0, [5, 9]), (0.5, 2, [7, 8])], "length", Verdict(0, 0, 1, 0.5)),
        ([(0.0, 0, [5, 6, 7, 8, 9])], "length", Verdict(0, 0, 1, 0.0)),
        ([(0.0, 0, [5, 6]), (2.0, 2, [7, 8])], None, Verdict(1, 0, 0, 2.0)),
        ([], None, Verdict(4, 0, 0, 0.0)),
    ],
)
def test_the_judge_counts_what_went_wrong(
    events: list[tuple[float, int, list[int]]], finish_reason: str | None, verdict: Verdict
) -> None:
    assert judge(History({}, events, finish_reason), EXPECTED) == verdict


@pytest.mark.parametrize("name", FAULTS)
def test_nothing_is_lost_doubled_or_changed(name: str, shipped_settings: Settings, tmp_path: Path) -> None:
    with Scene(shipped_settings.store, tmp_path, num_workers=2).open() as scene:
        tally = asyncio.run(run_fault(scene, name, runs=2, streams=8, seed=3))
    assert tally.is_clean, tally
    assert tally.streams >= 8

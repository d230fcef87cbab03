"""Steps that fail or do not fit leave the run whole, and its results on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.gpu.run import Run


def _refuse() -> object:
    raise MemoryError("no room")


def test_a_failing_step_is_recorded_and_the_next_one_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path / "out", tmp_path, 60.0, ["--x"])
    assert not run.step("first", run.results, "first", _refuse)
    assert run.step("second", run.results, "second", lambda: {"answer": 42})
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert found["first"]["error"] == "MemoryError: no room"
    assert "_refuse" in found["first"]["traceback"]
    assert found["second"] == {"answer": 42}
    assert set(found["steps_s"]) == {"first", "second"}
    assert "first: 0.0 s, FAILED" in capsys.readouterr().out


def test_results_are_on_disk_before_the_next_step_begins(tmp_path: Path) -> None:
    run = Run(tmp_path, tmp_path, 60.0, [])
    run.step("first", run.results, "first", lambda: 1)
    seen: list[object] = []
    run.step("second", run.results, "second", lambda: seen.append(json.loads((tmp_path / "gpu.json").read_text())))
    (before,) = seen
    assert isinstance(before, dict)
    assert before["first"] == 1
    assert "second" not in before


def test_a_step_that_would_not_fit_is_left_out_with_its_numbers(tmp_path: Path) -> None:
    run = Run(tmp_path, tmp_path, 10.0, [])
    assert not run.step("large", run.results, "large", lambda: 1, needs_s=90)
    assert run.step("small", run.results, "small", lambda: 1, needs_s=5)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert "large" not in found
    assert found["notes"] == ["large: left out, 10 s of the budget were left, 90 s are needed"]


def test_without_a_budget_nothing_begins(tmp_path: Path) -> None:
    run = Run(tmp_path, tmp_path, 0.0, [])
    assert not run.step("any", run.results, "any", _refuse)
    assert "any" not in run.results

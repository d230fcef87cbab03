"""The pipeline for GitHub Actions, read: it does what .ci/run does, and names only what exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.bench_gate import too_slow

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / ".github/workflows/ci.yml").read_text()
PIPELINE: dict[Any, Any] = yaml.safe_load(TEXT)
JOBS: dict[str, dict[str, Any]] = PIPELINE["jobs"]
STEPS = [step for job in JOBS.values() for step in job["steps"]]
MAKE = re.compile(r"^\s*(?:if .*; then )?make ([a-z-]+)", re.MULTILINE)


def made(text: str) -> set[str]:
    """The targets that a script calls."""
    return set(MAKE.findall(text))


def test_every_target_that_a_step_makes_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {
        name for line in re.findall(r"^([a-z][a-z0-9 -]*):(?!=)", makefile, flags=re.MULTILINE) for name in line.split()
    }
    called = {target for step in STEPS for target in made(step.get("run", ""))}
    assert {"check", "test", "image-test", "bench-gate"} <= called <= targets


def test_the_pipeline_does_what_ci_does_here() -> None:
    ours = made((ROOT / ".ci/run").read_text())
    assert {"check", "test"} <= ours
    assert ours <= {target for step in STEPS for target in made(step.get("run", ""))}


def test_unit_and_integration_tests_are_all_the_tests() -> None:
    folders = {name for step in JOBS["integration"]["steps"] for name in re.findall(r"tests/\w+", step.get("run", ""))}
    ignored = {
        name for step in JOBS["unit"]["steps"] for name in re.findall(r"--ignore=(\S+?)[\s\"]", step.get("run", ""))
    }
    assert folders == ignored
    assert all((ROOT / folder).is_dir() for folder in folders)


@pytest.mark.parametrize("job", JOBS)
def test_a_job_ends_and_waits_for_jobs_that_exist(job: str) -> None:
    needs = JOBS[job].get("needs", [])
    assert set([needs] if isinstance(needs, str) else needs) <= set(JOBS)
    assert 0 < JOBS[job]["timeout-minutes"] <= 300


def test_an_action_has_a_version() -> None:
    used = [step["uses"] for step in STEPS if "uses" in step]
    assert used
    assert [each for each in used if not re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|\d+\.\d+\.\d+)", each)] == []


def test_nobody_may_write_but_the_job_that_publishes() -> None:
    assert PIPELINE["permissions"] == {"contents": "read"}
    assert [name for name, job in JOBS.items() if "permissions" in job] == ["images"]


def test_what_goes_live_was_tested_scanned_and_signed_and_a_canary_goes_first() -> None:
    assert {"lint", "unit", "integration", "parity", "image-test"} <= set(JOBS["images"]["needs"])
    order = [step.get("uses", step.get("run", "")) for step in JOBS["images"]["steps"]]
    places = [
        next(i for i, text in enumerate(order) if word in text)
        for word in ("build-push", "trivy", "cosign sign", "--tag")
    ]
    assert places == sorted(places)
    rollout = JOBS["rollout"]
    assert rollout["needs"] == "images"
    assert rollout["strategy"] == {
        "max-parallel": 1,
        "fail-fast": True,
        "matrix": {"environment": ["canary", "production"]},
    }
    assert (ROOT / rollout["env"]["OVERLAY"] / "kustomization.yaml").is_file()
    text = "".join(step.get("run", "") for step in rollout["steps"])
    assert (
        text.index("cosign verify")
        < text.index("kubectl apply")
        < text.index("rollout status")
        < text.index("millrace probe")
    )


def test_no_secret_is_written_down() -> None:
    assert set(re.findall(r"secrets\.(\w+)", TEXT)) == {"KUBECONFIG"}
    assert not re.search(r"(?:password|token|key):\s*[A-Za-z0-9+/]{16,}", TEXT)


def test_the_benchmark_gate_compares_medians_at_each_concurrency() -> None:
    there = {1: [100.0, 100.0, 100.0], 8: [500.0, 500.0, 500.0]}
    assert too_slow({1: [90.0, 10.0, 95.0], 8: [500.0, 1.0, 450.0]}, there) == []  # one bad round decides nothing
    assert too_slow({1: [84.0, 84.0, 200.0], 8: [500.0, 500.0, 500.0]}, there) == [1]

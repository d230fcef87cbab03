"""The whole run on the CPU with the tiny shape: every step that needs no GPU and no torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.gpu.__main__ import main, read_options
from bench.gpu.parity import pairs
from model_store.targets import TARGETS

TINY = ["--target", "cpu", "--scheme", "w8a8", "--models", "tiny", "--parity-models", "tiny", "--concurrency", "1,3"]
SHORT = ["--prompt-tokens", "20", "--new-tokens", "5", "--rounds", "2", "--peer-concurrency", "0"]


def _run(tmp_path: Path, *more: str) -> dict[str, object]:
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    scratch.mkdir()
    assert main([*TINY, *SHORT, "--out", str(out), "--scratch", str(scratch), *more]) == 0
    assert not list(scratch.iterdir())
    found = json.loads((out / "gpu.json").read_text())
    assert isinstance(found, dict)
    return found


def test_a_run_on_the_cpu_leaves_figures_report_and_no_scratch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _run(tmp_path)
    assert found["notes"] == []
    parity, models = found["parity"], found["models"]
    assert isinstance(parity, dict)
    assert isinstance(models, dict)
    assert set(parity) == {"tiny w8a8", "tiny fp32"}
    assert all(row["max_relative_error"] <= row["bound"] for row in parity.values())
    assert [row["concurrency"] for row in models["tiny"]["engine"]] == [1, 3]
    assert all(row["rounds"] == 2 for row in models["tiny"]["engine"])
    assert models["tiny"]["parity"]["reference"] == "numpy in float32"
    report = (tmp_path / "out" / "gpu.md").read_text()
    assert "### tiny, w8a8" in report
    assert capsys.readouterr().out.endswith(report)


def test_with_json_the_last_line_is_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = _run(tmp_path, "--json", "--parity-models", "none")
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found


def test_without_time_everything_is_left_out_with_a_line_each(tmp_path: Path) -> None:
    found = _run(tmp_path, "--budget-s", "0")
    notes = found["notes"]
    assert isinstance(notes, list)
    assert [note.split(":")[0] for note in notes] == ["facts", "limits", "parity tiny w8a8", "parity tiny fp32", "tiny"]
    assert (tmp_path / "out" / "gpu.md").exists()


def test_every_scheme_of_the_gpu_is_proved_on_the_first_shape() -> None:
    chosen = pairs("cuda", ("llama", "qwen3", "mistral"))
    assert {scheme for shape, scheme in chosen if shape == "llama"} == set(TARGETS["cuda"])
    assert {("qwen3", "bf16"), ("mistral", "bf16"), ("qwen3", "bf16-kv-int8")} < set(chosen)
    assert len(chosen) == len(set(chosen))
    assert pairs("cuda", ()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "llama-9"], "--models: unknown 'llama-9'"),
        (["--parity-models", "gpt"], "--parity-models: unknown 'gpt'"),
        (["--target", "cpu", "--scheme", "bf16"], "target cpu has w8a8, fp32"),
        (["--concurrency", "1,x"], "expected numbers"),
        (["--concurrency", "0"], "at least 1"),
        (["--prompt-tokens", "8192"], "8320 tokens a request"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_made(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        read_options(["--out", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err


def test_the_default_is_the_gpus_first_scheme_and_both_large_shapes(tmp_path: Path) -> None:
    options = read_options(["--out", str(tmp_path)])
    assert options.scheme == "bf16"
    assert options.models == ("llama-3.2-1b", "llama-3.1-8b")
    assert options.concurrency == (1, 8, 32, 128, 256)

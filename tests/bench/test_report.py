"""The report of whole, cut-off and failed runs."""

from __future__ import annotations

from typing import Any

from bench.gpu.report import spread_text, table

ROW: dict[str, Any] = {
    "concurrency": 128,
    "decode_step_ms": [1.934, 1.927, 1.939],
    "decode_tokens_per_s": [66200.0, 66000.0, 66400.0],
    "generated_tokens_per_s": [49235.3, 49012.0, 50142.0],
    "total_tokens_per_s": [98470.6, 98024.0, 100284.0],
    "prefill_tokens_per_s": [189482.0, 182947.0, 201790.0],
    "last_first_token_ms": [86.5, 81.2, 89.6],
    "decode_share_of_memory_limit": 0.3,
    "decode_share_of_memory_limit_with_kv": 0.397,
    "prefill_share_of_arithmetic_limit": 0.602,
}
PARITY = {"max_relative_error": 8.4e-3, "mean_relative_error": 7.3e-3, "top1_agreement": 0.961, "bound": 0.04}
LIMITS = {"copy_tb_per_s": 4.27, "read_tb_per_s": 4.25, "tera_operations_per_s": 777.0, "operations": "bf16 product"}
PASSES = [{"generated_tokens_per_s": 1500.0, "decode_step_ms": 80.0}, {"generated_tokens_per_s": 1600.0}]


def _results(**model: object) -> dict[str, Any]:
    return {
        "date": "2026-11-26",
        "arguments": ["--out", "some results"],
        "facts": {"device": "NVIDIA H200", "driver": "580", "torch": None},
        "limits": LIMITS,
        "models": {"llama-3.2-1b": {"scheme": "bf16", **model}},
    }


def test_a_whole_run_names_its_machine_command_and_figures() -> None:
    text = table(_results(engine=[ROW], parity=PARITY | {"reference": "transformers in float32"}))
    assert text.startswith("## NVIDIA H200, 2026-11-26\n")
    assert "python -m bench.gpu --out 'some results'" in text
    assert "copy 4.27 TB/s" in text
    assert "bf16 product 777 T/s" in text
    assert "torch" not in text.split("```")[0]
    (row,) = [line for line in text.splitlines() if line.startswith("| 128 |")]
    assert "| 1.934 (1.927-1.939) |" in row
    assert "| 49,235 (49,012-50,142) |" in row
    assert row.endswith("| 30.0% | 39.7% | 60.2% |")
    assert "largest 8.40e-03, mean 7.30e-03; same greedy token 96.1%" in text


def test_every_row_has_as_many_cells_as_its_head() -> None:
    peer = {"configurations": {"graphs": {"passes": PASSES, "concurrency": 128}}, "best": "graphs"}
    results = _results(engine=[ROW, {"concurrency": 1}], peer=peer)
    results["parity"] = {"llama bf16": PARITY, "llama w4a16": {"error": "ParityError: 0.6 | over"}}
    cells: list[int] = []
    for line in table(results).splitlines():
        if not line.startswith("|"):
            cells = []
            continue
        cells.append(line.replace("\\|", "").count("|"))
        assert set(cells) == {cells[0]}, line


def test_what_failed_says_so_in_one_line_and_the_rest_is_there() -> None:
    failed = {"error": "Traceback ...\n  File x\nRuntimeError: out of memory\n"}
    peer = {"configurations": {"graphs": failed, "static": {"passes": PASSES, "concurrency": 128}}}
    text = table(_results(engine=[ROW], parity=failed, peer=peer | {"best": "static", "times_as_fast": 31.8}))
    assert "Parity: failed: RuntimeError: out of memory" in text
    assert "CUDA graphs | | failed: RuntimeError: out of memory | |" in text
    assert "static batch | 128 | 1,500, 1,600 | 80.00 |" in text
    assert "31.8 times the tokens of the best of these (generate(), one static batch)" in text
    assert "| 128 | 1.934" in text
    assert "Engine: failed: RuntimeError: out of memory" in table(_results(engine=failed))


def test_a_run_cut_off_at_once_still_has_a_report() -> None:
    text = table({"notes": ["facts: left out"], "limits": {"error": "no device"}})
    assert "Limits were not measured" in text
    assert text.endswith("- facts: left out")


def test_large_numbers_are_shown_with_fewer_digits() -> None:
    assert spread_text([0.9534, 0.949, 0.96]) == "0.953 (0.949-0.960)"
    assert spread_text([226.04, 224.9, 226.2]) == "226.0 (224.9-226.2)"
    assert spread_text([48152.0, 43007.0, 49279.0]) == "48,152 (43,007-49,279)"

"""A run's results as the short table that is printed last, and as a section for docs/performance.md."""

from __future__ import annotations

from typing import Any

Results = dict[str, Any]


def table(results: Results) -> str:
    """Markdown; what a run did not get to is not there."""
    facts, limits = results.get("facts", {}), results.get("limits", {})
    lines = [
        f"## {facts.get('gpu', 'a GPU')}, {results.get('date', '')}",
        "",
        f"Driver {facts.get('driver')}, onnxruntime {facts.get('onnxruntime')}, torch {facts.get('torch')},"
        f" transformers {facts.get('transformers')}. Limits measured in this run: copy"
        f" {limits.get('copy_tb_per_s')} TB/s (read and written), read {limits.get('read_tb_per_s')} TB/s, bf16 product {limits.get('bf16_tflops')} TFLOP/s.",
        "",
    ]
    if results.get("parity"):
        lines += [
            "| parity with the CPU's fp32 artifact | largest error of a row | mean | same greedy token |",
            "|---|---|---|---|",
        ]
        lines += [_parity_row(name, row) for name, row in results["parity"].items()]
        lines.append("")
    for name, model in results.get("models", {}).items():
        lines += _model(name, model)
    if "ort_capture" in results:
        lines += [f"ONNX Runtime's own graph capture: {results['ort_capture']}", ""]
    lines += [f"- {note}" for note in results.get("notes", [])]
    return "\n".join(lines)


def _parity_row(name: str, row: Results) -> str:
    if "error" in row:
        return f"| {name} | failed: {row['error'][:200]} | | |"
    return (
        f"| {name} | {row['max_relative_error']:.2e} | {row['mean_relative_error']:.2e} | {row['top1_agreement']:.1%} |"
    )


def _model(name: str, model: Results) -> list[str]:
    lines = [f"### {name}, {model.get('scheme')}", ""]
    if "parity" in model:
        lines += [f"Parity with transformers in float32: {_parity_row('', model['parity']).strip('| ')}.", ""]
    if "engine" in model:
        lines += [
            "| concurrency | decode step, ms | decode tokens/s | generated tokens/s, prefill included |"
            " prefill tokens/s | of the memory limit | with KV | prefill of the arithmetic limit |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in model["engine"]:
            lines.append(
                f"| {row['concurrency']} | {_spread(row['decode_step_ms'])} | {row['decode_tokens_per_s']:,.0f} |"
                f" {_spread(row['generated_tokens_per_s'])} | {_spread(row['prefill_tokens_per_s'])} |"
                f" {row['decode_share_of_memory_limit']:.1%} | {row['decode_share_of_memory_limit_with_kv']:.1%} |"
                f" {row['prefill_share_of_arithmetic_limit']:.1%} |"
            )
        lines.append("")
    if "peer" in model:
        lines += [f"transformers continuous batching: {model['peer']}", ""]
    return lines


def _spread(values: list[float]) -> str:
    middle, low, high = values
    return f"{middle:,} ({low:,}-{high:,})"

"""A run's results as Markdown: what is printed last, and a section ready for docs/performance.md."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

Results = Mapping[str, Any]
COLUMNS = (
    ("concurrency", "concurrency"),
    ("decode_step_ms", "decode step, ms"),
    ("decode_tokens_per_s", "decode tokens/s"),
    ("generated_tokens_per_s", "generated tokens/s, prefill included"),
    ("total_tokens_per_s", "all tokens/s"),
    ("prefill_tokens_per_s", "prefill tokens/s"),
    ("last_first_token_ms", "last first token, ms"),
    ("decode_share_of_memory_limit", "of the memory limit"),
    ("decode_share_of_memory_limit_with_kv", "with KV"),
    ("prefill_share_of_arithmetic_limit", "prefill of the arithmetic limit"),
)
PEER_NAMES = {
    "graphs": "continuous batching, cache of the workload's size, CUDA graphs",
    "sized": "continuous batching, cache of the workload's size",
    "defaults": "continuous batching, its defaults",
    "static": "generate(), one static batch",
}


def table(results: Results) -> str:
    """What a run did not get to is not there; what failed says so."""
    facts, limits = results.get("facts", {}), results.get("limits", {})
    lines = [
        f"## {facts.get('device', 'unknown device')}, {results.get('date', '')}",
        "",
        _circumstances(facts, limits),
    ]
    command = shlex.join(["python", "-m", "bench.gpu", *results.get("arguments", ())])
    lines += ["", "```sh", command, "```", ""]
    if results.get("parity"):
        lines += ["| parity, small models | largest error of a row | mean | bound | same greedy token |"]
        lines += ["|---|---|---|---|---|", *(_parity_row(name, row) for name, row in results["parity"].items()), ""]
    for name, model in results.get("models", {}).items():
        lines += _model(name, model)
    if "ort_capture" in results:
        lines += [f"ONNX Runtime's own graph capture: {results['ort_capture']}", ""]
    lines += [f"- {note}" for note in results.get("notes", ())]
    return "\n".join(lines).rstrip()


def _circumstances(facts: Results, limits: Results) -> str:
    names = ("device_memory_gb", "driver", "cuda", "onnxruntime", "torch", "transformers", "processor", "cores")
    found = ", ".join(f"{name} {facts[name]}" for name in names if facts.get(name) is not None)
    if "copy_tb_per_s" not in limits:
        return f"{found}. Limits were not measured."
    return (
        f"{found}. Limits measured in this run: copy {limits['copy_tb_per_s']:.3g} TB/s (read and written), read"
        f" {limits['read_tb_per_s']:.3g} TB/s, {limits['operations']} {limits['tera_operations_per_s']:.4g} T/s."
        " Random weights; medians (smallest-largest) of interleaved rounds."
    )


def _parity_row(name: str, row: Results) -> str:
    if "error" in row:
        return f"| {name} | {_failure(row)} | | | |"
    return (
        f"| {name} | {row['max_relative_error']:.2e} | {row['mean_relative_error']:.2e} | {row['bound']:g} |"
        f" {row['top1_agreement']:.1%} |"
    )


def _model(name: str, model: Results) -> list[str]:
    lines = [f"### {name}, {model.get('scheme')}", ""]
    parity = model.get("parity", {})
    if "error" in parity:
        lines += [f"Parity: {_failure(parity)}", ""]
    elif parity:
        lines += [
            f"Parity with {parity['reference']}, relative error of a row of logits: largest"
            f" {parity['max_relative_error']:.2e}, mean {parity['mean_relative_error']:.2e}; same greedy token"
            f" {parity['top1_agreement']:.1%}.",
            "",
        ]
    engine = model.get("engine", [])
    if isinstance(engine, Mapping):
        lines += [f"Engine: {_failure(engine)}", ""]
    elif engine:
        lines += ["| " + " | ".join(title for _, title in COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
        lines += ["| " + " | ".join(_cell(key, row.get(key)) for key, _ in COLUMNS) + " |" for row in engine]
        lines.append("")
    if "peer" in model:
        lines += _peer(model["peer"])
    if "error" in model.get("config", {}):
        lines += [f"Checkpoint: {_failure(model['config'])}", ""]
    return lines


def _peer(peer: Results) -> list[str]:
    if "error" in peer:
        return [f"transformers: {_failure(peer)}", ""]
    lines = ["| transformers, same weights in bf16 | requests | generated tokens/s, every round | decode step, ms |"]
    lines.append("|---|---|---|---|")
    for name, figures in peer["configurations"].items():
        title = PEER_NAMES.get(name, name)
        if "error" in figures:
            lines.append(f"| {title} | | {_failure(figures)} | |")
            continue
        passes = figures["passes"]
        speeds = ", ".join(f"{each['generated_tokens_per_s']:,.0f}" for each in passes)
        steps = ", ".join(f"{each['decode_step_ms']:.2f}" for each in passes if "decode_step_ms" in each)
        lines.append(f"| {title} | {figures['concurrency']} | {speeds} | {steps or '-'} |")
    if "times_as_fast" in peer:
        best = PEER_NAMES.get(peer["best"], peer["best"])
        lines += ["", f"Millrace gives {peer['times_as_fast']:g} times the tokens of the best of these ({best})."]
    return [*lines, ""]


def _failure(row: Results) -> str:
    """On one line and short: the whole text is in the results."""
    last = [line for line in str(row["error"]).strip().splitlines() if line.strip()][-1:]
    return f"failed: {''.join(last)[:200]}".replace("|", "\\|")


def _cell(key: str, value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return spread_text([float(each) for each in value])
    return f"{float(str(value)):.1%}" if "share" in key else f"{value:,}"


def spread_text(values: Sequence[float]) -> str:
    """[median, smallest, largest] as "1,035 (1,025-1,040)"; fewer digits for larger numbers."""
    digits = 0 if values[0] >= 1000 else 1 if values[0] >= 100 else 3
    middle, low, high = (f"{value:,.{digits}f}" for value in values)
    return f"{middle} ({low}-{high})"

"""`millrace bench engine`: what the engine does with random tokens, scheduler and sampling included, HTTP and queue
not.

Rounds go over all concurrencies in turn, so that a slow spell of a shared machine falls on all of them; medians are
shown with the smallest and largest. The shares of the machine's limits use limits measured in the same run.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np

from batcher.engine import Engine
from kernels import loader
from kernels.limits import Limits, measure_limits
from model_store.manifest import WEIGHTS_FILE, ModelManifest
from services.backends.onnxruntime import OnnxRuntimeBackend
from services.loading import StoredModel, find_model, open_cpu, step_limits
from services.settings import Settings
from wire.errors import BadRequest
from wire.messages import Failed, Generate


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked of the engine: at each concurrency, that many requests at once."""

    prompt_tokens: int
    new_tokens: int
    concurrency: tuple[int, ...]
    rounds: int = 3


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass at one concurrency, in seconds and tokens."""

    elapsed_s: float
    first_token_s: float  # until every request had its first token
    steps: int
    split_s: dict[str, float]


def bench_engine(settings: Settings, name: str, workload: Workload, *, profile: bool, as_json: bool) -> int:
    """Measure and print; see the module's text for what the numbers mean."""
    model = find_model(settings, name)
    _check(model.manifest, workload)
    threads, vocab_size = step_limits(settings).threads, model.manifest.geometry.vocab_size
    backend = open_cpu(settings, model)
    run_pass(Engine(backend), vocab_size, workload.prompt_tokens, 4, 2, seed=0)  # first touch of weights and pool
    passes: dict[int, list[Pass]] = defaultdict(list)
    limits: list[Limits] = []
    for round_index in range(workload.rounds):
        limits.append(measure_limits(threads))
        for count in workload.concurrency:
            # A new engine is a new prefix cache: prompts of earlier passes must not be found.
            engine = Engine(backend)
            passes[count].append(
                run_pass(
                    engine,
                    vocab_size,
                    workload.prompt_tokens,
                    workload.new_tokens,
                    count,
                    seed=1000 * round_index + count,
                )
            )
            if not as_json:
                print(f"\rround {round_index + 1}/{workload.rounds}, concurrency {count}   ", end="", file=sys.stderr)
    print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
    backend.close()
    report = {
        "model": model.manifest.model_id,
        "scheme": model.manifest.scheme,
        "kernels": loader.isa_active(),
        "threads": threads,
        "workload": asdict(workload),
        "limits": {
            "int8_gops": round(median(each.int8_ops_per_s for each in limits) / 1e9, 1),
            "read_gb_per_s": round(median(each.read_bytes_per_s for each in limits) / 1e9, 2),
        },
        "results": [_summary(count, passes[count], workload, model, limits) for count in workload.concurrency],
    }
    if profile:
        report["operators_ms_per_step"] = _profile(settings, model, workload)
    print(json.dumps(report) if as_json else _table(report))
    return 0


def _check(manifest: ModelManifest, workload: Workload) -> None:
    if manifest.target != "cpu":
        raise BadRequest(f"{manifest.model_id} is built for {manifest.target}: measure it with python -m bench.gpu")
    if workload.rounds < 1 or workload.prompt_tokens < 1 or workload.new_tokens < 1 or min(workload.concurrency) < 1:
        raise BadRequest("prompt-tokens, new-tokens, concurrency and rounds are all at least 1")
    total = workload.prompt_tokens + workload.new_tokens
    if total > manifest.geometry.max_model_len:
        raise BadRequest(f"{total} tokens a request; {manifest.model_id} accepts {manifest.geometry.max_model_len}")


def run_pass(engine: Engine, vocab_size: int, prompt_tokens: int, new_tokens: int, count: int, *, seed: int) -> Pass:
    """`count` requests of random tokens at once, to their end. Raises BadRequest if one fails."""
    random = np.random.default_rng(seed)
    for index in range(count):
        prompt = [int(token) for token in random.integers(0, vocab_size, prompt_tokens)]
        engine.add(Generate(request_id=f"bench-{index}", model="", prompt_ids=prompt, max_tokens=new_tokens), (), 1)
    start = time.perf_counter()
    begun: set[str] = set()
    first_token_s, steps = 0.0, 0
    while engine.has_work:
        for append in engine.step():
            if isinstance(append.event, Failed):
                raise BadRequest(f"the engine refused the workload: {append.event.message}")
            begun.add(append.event.request_id)
        steps += 1
        if not first_token_s and len(begun) == count:
            first_token_s = time.perf_counter() - start
    elapsed_s, load = time.perf_counter() - start, engine.load
    split = {"plan": load.plan_s, "pack": load.pack_s, "forward": load.forward_s, "commit": load.commit_s}
    return Pass(elapsed_s, first_token_s, steps, split)


def _summary(
    count: int, passes: list[Pass], workload: Workload, model: StoredModel, limits: list[Limits]
) -> dict[str, object]:
    tokens = count * (workload.prompt_tokens + workload.new_tokens)
    total = sorted(tokens / each.elapsed_s for each in passes)
    decode_s = [each.elapsed_s - each.first_token_s for each in passes]
    # Each generated token after the first passes through every linear weight: the lower limits of time are reading the
    # weights once a step, and two operations for each weight and token.
    weights = model.manifest.files[WEIGHTS_FILE].size_bytes
    steps = workload.new_tokens - 1
    read_share = [
        weights * steps / each / limit.read_bytes_per_s for each, limit in zip(decode_s, limits, strict=True) if steps
    ]
    operations = 2 * model.manifest.num_parameters * tokens
    integer_share = [
        operations / each.elapsed_s / limit.int8_ops_per_s for each, limit in zip(passes, limits, strict=True)
    ]
    return {
        "concurrency": count,
        "total_tokens_per_s": round(median(total), 1),
        "total_tokens_per_s_min": round(total[0], 1),
        "total_tokens_per_s_max": round(total[-1], 1),
        "generated_tokens_per_s": round(median(count * workload.new_tokens / each.elapsed_s for each in passes), 1),
        "prefill_tokens_per_s": round(
            median(count * workload.prompt_tokens / each.first_token_s for each in passes), 1
        ),
        "decode_step_ms": round(median(decode_s) / steps * 1000, 3) if steps else None,
        "share_of_read_limit": round(median(read_share), 3) if read_share else None,
        "share_of_int8_limit": round(median(integer_share), 3),
        "step_split_ms": {
            name: round(median(each.split_s[name] / each.steps for each in passes) * 1000, 3)
            for name in passes[0].split_s
        },
    }


def _profile(settings: Settings, model: StoredModel, workload: Workload) -> dict[str, dict[str, float]]:
    """Mean ms of a step by operator at the largest concurrency, from ONNX Runtime's profile (it costs a little)."""
    vocab_size = model.manifest.geometry.vocab_size
    with tempfile.TemporaryDirectory() as directory:
        backend: OnnxRuntimeBackend = open_cpu(settings, model, profile=Path(directory) / "ort")
        count = max(workload.concurrency)
        done = run_pass(Engine(backend), vocab_size, workload.prompt_tokens, workload.new_tokens, count, seed=7)
        events = json.loads(backend.end_profiling().read_text())
        backend.close()
    spent: dict[str, float] = defaultdict(float)
    for event in events:
        name = event.get("args", {}).get("op_name")
        if event.get("cat") == "Node" and name and event["name"].endswith("_kernel_time"):
            spent[name] += event["dur"] / 1000
    return {"mean": {name: round(total / done.steps, 3) for name, total in sorted(spent.items())}}


def _table(report: dict[str, object]) -> str:
    lines = [
        f"{report['model']} ({report['scheme']}), {report['threads']} threads, {report['kernels']} kernels;"
        f" limits measured: {report['limits']}",
        f"{'C':>4} {'total tok/s':>12} {'(min-max)':>19} {'generated':>10} {'prefill':>9} {'step ms':>8}"
        f" {'read':>6} {'int8':>6}  step split (ms)",
    ]
    results = report["results"]
    if not isinstance(results, list):
        raise TypeError("results is not a list; this is a bug")
    for row in results:
        spread = f"({row['total_tokens_per_s_min']}-{row['total_tokens_per_s_max']})"
        split = " ".join(f"{name} {value}" for name, value in row["step_split_ms"].items())
        lines.append(
            f"{row['concurrency']:>4} {row['total_tokens_per_s']:>12} {spread:>19} {row['generated_tokens_per_s']:>10}"
            f" {row['prefill_tokens_per_s']:>9} {row['decode_step_ms'] or '-':>8}"
            f" {row['share_of_read_limit'] or '-':>6} {row['share_of_int8_limit']:>6}  {split}"
        )
    if "operators_ms_per_step" in report:
        lines.append(f"operators, ms a step: {report['operators_ms_per_step']}")
    return "\n".join(lines)

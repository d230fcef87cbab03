"""What Millrace's engine does on the device, beside the limits measured in the same run. Arithmetic, and the passes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import median

from batcher.backend import Backend
from batcher.engine import Engine
from model_store.manifest import WEIGHTS_FILE, ModelManifest
from services.backends.sizing import bytes_per_block
from services.bench import Pass, Workload, run_pass


def run_engine(
    backend: Backend, manifest: ModelManifest, workload: Workload, copy_bytes_per_s: float, flops: float
) -> list[dict[str, object]]:
    """Rounds over all concurrencies in turn, after a short pass of each that makes what is made once."""
    vocab_size = manifest.geometry.vocab_size
    for count in workload.concurrency:
        run_pass(Engine(backend), vocab_size, workload.prompt_tokens, 4, count, seed=count)
    passes: dict[int, list[Pass]] = defaultdict(list)
    for number in range(workload.rounds):
        for count in workload.concurrency:
            seed = 1000 * number + count
            passes[count].append(
                run_pass(Engine(backend), vocab_size, workload.prompt_tokens, workload.new_tokens, count, seed=seed)
            )
    return [
        summary(count, passes[count], manifest, workload, copy_bytes_per_s, flops) for count in workload.concurrency
    ]


def summary(
    count: int,
    passes: Sequence[Pass],
    manifest: ModelManifest,
    workload: Workload,
    copy_bytes_per_s: float,
    flops: float,
) -> dict[str, object]:
    """Medians with the smallest and largest.

    A decode step must read every weight once, and each sequence's keys and values; prefill multiplies every weight by
    every token, two operations each. The lower limits of time are these over the device's limits.
    """
    steps = workload.new_tokens - 1
    decode_s = sorted((each.elapsed_s - each.first_token_s) / steps for each in passes)
    prefill = sorted(count * workload.prompt_tokens / each.first_token_s for each in passes)
    total = sorted(count * workload.new_tokens / each.elapsed_s for each in passes)
    step_s = median(decode_s)
    weight_bytes = manifest.files[WEIGHTS_FILE].size_bytes
    context = workload.prompt_tokens + workload.new_tokens / 2
    kv_bytes = count * context * bytes_per_block(manifest) / manifest.kv_cache.block_size
    operations = 2 * manifest.num_parameters
    return {
        "concurrency": count,
        "decode_step_ms": spread([1000 * each for each in decode_s], 3),
        "decode_tokens_per_s": round(count / step_s, 1),
        "generated_tokens_per_s": spread(total, 1),
        "prefill_tokens_per_s": spread(prefill, 0),
        "decode_share_of_memory_limit": round(weight_bytes / copy_bytes_per_s / step_s, 3),
        "decode_share_of_memory_limit_with_kv": round((weight_bytes + kv_bytes) / copy_bytes_per_s / step_s, 3),
        "prefill_share_of_arithmetic_limit": round(operations * median(prefill) / flops, 3),
        "step_split_us": {
            name: round(median(each.split_s[name] / each.steps for each in passes) * 1e6, 1)
            for name in passes[0].split_s
        },
    }


def spread(values: Sequence[float], digits: int) -> list[float]:
    """[median, smallest, largest]."""
    return [round(value, digits) for value in (median(values), min(values), max(values))]

"""What Millrace's engine does on the device, beside the limits measured in the same run. Arithmetic, and the passes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import median

from batcher.backend import Backend
from batcher.engine import Engine
from bench.gpu.budget import fits
from bench.gpu.limits import DeviceLimits
from model_store.manifest import WEIGHTS_FILE, ModelManifest
from services.backends.sizing import bytes_per_block
from services.bench import Pass, Workload, run_pass


def run_engine(
    backend: Backend,
    manifest: ModelManifest,
    workload: Workload,
    limits: DeviceLimits,
    *,
    left_s: Callable[[], float],
    note: Callable[[str], None],
) -> list[dict[str, object]]:
    """Rounds over all concurrencies in turn, after a short pass of each that makes what is made once.

    A pass that would not fit what is left of the budget (it took so long in the round before) is left out with a
    note, and the larger ones with it; a row says how many rounds it stands on.
    """
    vocab_size = manifest.geometry.vocab_size
    passes: dict[int, list[Pass]] = defaultdict(list)
    took_s = 0.0  # by the pass before, which had fewer sequences or was of the round before
    for count in sorted(workload.concurrency):
        if not fits(took_s, 1, left_s()):
            break
        start = time.monotonic()
        run_pass(Engine(backend), vocab_size, workload.prompt_tokens, min(4, workload.new_tokens), count, seed=count)
        took_s = time.monotonic() - start
    for number in range(workload.rounds):
        for count in sorted(workload.concurrency):
            took_s = passes[count][-1].elapsed_s if passes[count] else took_s
            if not fits(took_s, 1, left_s()):
                note(f"{manifest.name}: round {number + 1} ended before concurrency {count}: {left_s():.0f} s left")
                break
            seed = 1000 * number + count
            passes[count].append(
                run_pass(Engine(backend), vocab_size, workload.prompt_tokens, workload.new_tokens, count, seed=seed)
            )
            took_s = passes[count][-1].elapsed_s
    return [
        summary(count, passes[count], manifest, workload, limits) for count in workload.concurrency if passes[count]
    ]


def summary(
    count: int, passes: Sequence[Pass], manifest: ModelManifest, workload: Workload, limits: DeviceLimits
) -> dict[str, object]:
    """Medians with the smallest and largest.

    A decode step must read every weight once, and each sequence's keys and values; prefill multiplies every weight by
    every token, two operations each. The lower limits of time are these over the device's limits.
    """
    generated = count * workload.new_tokens
    everything = count * (workload.prompt_tokens + workload.new_tokens)
    prefill = [count * workload.prompt_tokens / each.first_token_s for each in passes]
    split = {name: median(each.split_s[name] / each.steps for each in passes) for name in passes[0].split_s}
    row: dict[str, object] = {
        "concurrency": count,
        "rounds": len(passes),
        "generated_tokens_per_s": spread([generated / each.elapsed_s for each in passes], 1),
        "total_tokens_per_s": spread([everything / each.elapsed_s for each in passes], 1),
        "prefill_tokens_per_s": spread(prefill, 0),
        # All requests come at once: until the last of them has its first token.
        "last_first_token_ms": spread([1000 * each.first_token_s for each in passes], 2),
        "prefill_share_of_arithmetic_limit": round(
            2 * manifest.num_parameters * median(prefill) / limits.operations_per_s, 3
        ),
        "step_split_us": {name: round(seconds * 1e6, 1) for name, seconds in split.items()},
    }
    steps = workload.new_tokens - 1
    if not steps:
        return row  # the first token is prefill's: nothing was decoded
    decode_s = [(each.elapsed_s - each.first_token_s) / steps for each in passes]
    weights, kv = manifest.files[WEIGHTS_FILE].size_bytes, kv_bytes(count, manifest, workload)
    return row | {
        "decode_step_ms": spread([1000 * each for each in decode_s], 3),
        "decode_tokens_per_s": spread([count / each for each in decode_s], 1),
        "decode_share_of_memory_limit": round(weights / limits.copy_bytes_per_s / median(decode_s), 3),
        "decode_share_of_memory_limit_with_kv": round((weights + kv) / limits.copy_bytes_per_s / median(decode_s), 3),
    }


def kv_bytes(count: int, manifest: ModelManifest, workload: Workload) -> float:
    """Keys and values that an average decode step reads: of `count` sequences, half way through their answers."""
    context = workload.prompt_tokens + workload.new_tokens / 2
    return count * context * bytes_per_block(manifest) / manifest.kv_cache.block_size


def spread(values: Sequence[float], digits: int) -> list[float]:
    """[median, smallest, largest]."""
    return [round(value, digits) for value in (median(values), min(values), max(values))]

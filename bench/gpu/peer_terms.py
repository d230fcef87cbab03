"""What the peer is asked, how a pass of it is timed, and what is compared: the parts that need no torch.

The clock runs from handing over the prompts to the last token's own timestamp. Building the cache, the mask and CUDA
graphs, and taking them down, is not counted, as Millrace's opening of a model is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Final

Values = dict[str, Any]
# In this order: what is likely to be best early, and the model is loaded again only once (for another attention).
CONFIGURATIONS: Final = ("static", "graphs", "sized", "defaults")
BLOCK_SIZE: Final = 256  # transformers' own default
STEP_TOKENS: Final = 4096  # as many as Millrace takes in one step


def batching_settings(configuration: str, count: int, tokens: int) -> Values:
    """Keyword arguments of ContinuousBatchingConfig for `count` requests of `tokens` tokens in all.

    "defaults": only block sharing is off, so that no prompt is found again. Without a flash-attn package the only
    attention is SDPA with a dense mask; for that the defaults choose no CUDA graphs, and size the cache by what memory
    there is, and the mask with it. "sized" gives cache, step and mask the size of the workload, "graphs" adds CUDA
    graphs (their warm-up attends to the whole cache with a dense mask; at the default size, asynchronous batching on
    too, nothing came out of an H200 within 80 s). Asynchronous batching copies the whole mask from the host at every
    step: their own defaults choose it only where there is no mask.
    """
    if configuration == "defaults":
        return {"allow_block_sharing": False}
    sized = {
        "allow_block_sharing": False,
        "max_requests_per_batch": count,
        "max_batch_tokens": max(STEP_TOKENS, count),
        "num_blocks": 2 * count * -(-tokens // BLOCK_SIZE),  # the scheduler holds prefill back when few are free
        "block_size": BLOCK_SIZE,
    }
    if configuration == "sized":
        return sized | {"use_cuda_graph": False}
    if configuration == "graphs":
        return sized | {"use_cuda_graph": True, "use_async_batching": False, "kv_padding_interval_size": 4096}
    raise ValueError(f"unknown configuration {configuration!r}")


def accepted(wanted: Mapping[str, Any], names: Sequence[str]) -> tuple[Values, list[str]]:
    """Those of `wanted` that this version knows, and the names of those it does not."""
    return {key: wanted[key] for key in wanted if key in names}, sorted(set(wanted) - set(names))


def timed(
    start: float,
    seconds: float,
    lengths: Sequence[int],
    stamps: Sequence[Sequence[float] | None],
    count: int,
    new_tokens: int,
) -> Values:
    """One pass's figures. `stamps`: when each token of each answer was there, where the version says so.

    Raises RuntimeError unless all answers have all their tokens.
    """
    if len(lengths) != count or set(lengths) != {new_tokens}:
        raise RuntimeError(
            f"the peer gave {len(lengths)} answers of {sorted(set(lengths))} tokens; expected {count} of {new_tokens}"
        )
    figures: Values = {"call_s": round(seconds, 4)}
    known = [each for each in stamps if each]
    if len(known) == count:
        seconds = max(each[-1] for each in known) - start
        first_s = max(each[0] for each in known) - start
        figures["last_first_token_ms"] = round(1000 * first_s, 2)
        if new_tokens > 1:
            figures["decode_step_ms"] = round(1000 * (seconds - first_s) / (new_tokens - 1), 3)
    return figures | {"elapsed_s": round(seconds, 4), "generated_tokens_per_s": round(count * new_tokens / seconds, 1)}


def speed(figures: Mapping[str, Any]) -> float:
    """Median generated tokens a second, prefill included; 0 for a configuration that failed."""
    passes = figures.get("passes")
    return float(median(each["generated_tokens_per_s"] for each in passes)) if passes else 0.0


def ratio(found: Mapping[str, Mapping[str, Any]], model: Mapping[str, Any], count: int) -> Values:
    """The best configuration, and how many times as fast the engine's row of the same concurrency is, if there is one.

    The best of all: also one that is no server (a static batch), because it may be the faster one.
    """
    best = max(found, key=lambda name: speed(found[name]))
    rows = model.get("engine")
    ours = [row for row in rows if row["concurrency"] == count] if isinstance(rows, list) else []
    answer: Values = {"best": best}
    if ours:
        answer["times_as_fast"] = round(ours[0]["generated_tokens_per_s"][0] / speed(found[best]), 2)
    return answer

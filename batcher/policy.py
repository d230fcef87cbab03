"""Who goes first, how much of a step each gets, and who is refused: the scheduler's decisions as pure functions.

Integers in, integers out, apart from the scheduler so that the policy can be read and tested without blocks or models.
"""

from __future__ import annotations

from collections.abc import Sequence

from batcher.backend import BackendLimits
from wire.errors import BadRequest, ContextLengthExceeded, Internal, MillraceError, RequestTooLarge
from wire.messages import Generate


def order_key(priority: int, arrival: int) -> tuple[int, int]:
    """Sorts requests: higher priority first, then earlier arrival. The last in this order is the one to preempt."""
    return (-priority, arrival)


def split_budget(pending: Sequence[int], budget: int, prefill_budget: int) -> list[int]:
    """How many tokens each candidate computes in this step.

    `pending` are the uncomputed tokens of the candidates, in order, each at least 1. Those with one pending token
    decode and come first, one token each; the others share what is left, at most `prefill_budget` (at least 1), in
    order. The first candidate always gets a token, so the oldest request moves even when decodes alone would fill the
    budget.
    """
    counts = [0] * len(pending)
    reserved = 1 if pending and pending[0] > 1 else 0
    if reserved:
        counts[0] = 1
    left = budget - reserved
    for i, tokens in enumerate(pending):
        if tokens == 1 and left:
            counts[i] = 1
            left -= 1
    share = min(left, prefill_budget - reserved)
    for i, tokens in enumerate(pending):
        if share <= 0:
            break
        if tokens > 1:
            chunk = min(tokens - counts[i], share)
            counts[i] += chunk
            share -= chunk
    return counts


# Aim a little under the target; leave the share alone while the step is anywhere in between.
_AIM, _CONTENT = 0.9, 0.8


def adapt_prefill_budget(
    share: int, *, target_s: float, step_s: float, decode_tokens: int, prefill_tokens: int, lowest: int, highest: int
) -> int:
    """The next prefill share, after a step that took `step_s` with `prefill_tokens` beside `decode_tokens`.

    Holds the step under `target_s`, the inter-token time promised to the decoding sequences, with a step that costs
    base + slope * prefill_tokens and both unknown. Scaling by aim / step_s converges on the target; growing from
    below never overshoots in that model, so the share starts at `lowest`. A step without decodes kept nobody waiting
    and one without prefill says nothing about it: both leave the share as it is.
    """
    if not decode_tokens or not prefill_tokens:
        return share
    scale = min(2.0, max(0.25, _AIM * target_s / max(step_s, 1e-9)))
    if step_s > target_s:
        share = min(share, int(prefill_tokens * scale))
    elif step_s < _CONTENT * target_s and prefill_tokens >= share:
        share = max(share + 1, int(prefill_tokens * scale))
    return max(lowest, min(highest, share))


def refusal(generate: Generate, num_logged: int, limits: BackendLimits) -> MillraceError | None:
    """Why this request can never run here, or None. `num_logged` tokens of its completion exist already.

    What passes can run alone to its end, whatever else happens: this is what lets the scheduler promise progress.
    """
    total = generate.max_total_tokens
    capacity = limits.num_blocks * limits.block_size
    if not generate.prompt_ids:
        return BadRequest("the prompt is empty", param="prompt_ids")
    if generate.max_tokens < 1:
        return BadRequest(f"max_tokens is {generate.max_tokens}; at least 1 is needed", param="max_tokens")
    forced = generate.forced_ids
    if forced and len(forced) != generate.max_tokens:
        what = f"{len(forced):,} tokens are given, max_tokens is {generate.max_tokens:,}"
        return BadRequest(f"{what}; they must be equal", param="forced_ids")
    for param, ids in (("prompt_ids", generate.prompt_ids), ("forced_ids", forced)):
        largest, smallest = max(ids, default=0), min(ids, default=0)
        if smallest < 0 or largest >= limits.vocab_size:
            wrong = smallest if smallest < 0 else largest
            return BadRequest(f"token id {wrong} is not in the vocabulary of {limits.vocab_size:,}", param=param)
    if total > limits.max_model_len:
        return ContextLengthExceeded(
            f"prompt of {len(generate.prompt_ids):,} plus max_tokens of {generate.max_tokens:,} is {total:,} tokens; "
            f"model {limits.model} accepts {limits.max_model_len:,}",
            param="max_tokens",
        )
    if total - 1 > capacity:  # the last token is sent, never computed
        return RequestTooLarge(f"the request can grow to {total:,} tokens; this worker's KV pool holds {capacity:,}")
    if num_logged > generate.max_tokens:
        return Internal(f"{num_logged:,} tokens are logged of a completion of at most {generate.max_tokens:,}")
    return None

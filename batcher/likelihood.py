"""How likely a model finds tokens that are given (teacher forcing), from the logits that a step computes anyway.

A given token is treated as one that was sampled: one a step, in the same batches and over the same KV cache as
everybody's. So what is measured is what is served, and it is as reproducible as the logits are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from batcher.backend import StepOutput
from batcher.step_plan import StepPlan


def forces(plan: StepPlan) -> bool:
    """Whether this step decides over a token that is given."""
    return any(s.samples and s.request.is_forced for s in plan.sequences)


def forced_logprobs(plan: StepPlan, output: StepOutput) -> list[float]:
    """Of each given token of this step, in the plan's order. Read before the next forward."""
    rows = [s.request for s in plan.sequences if s.samples]
    logits = output.logits
    return [logprob(logits[row], request.next_forced_id) for row, request in enumerate(rows) if request.is_forced]


def logprob(logits: NDArray[np.float32], token_id: int) -> float:
    """The natural logarithm of the softmax of `logits` [V] at `token_id`, in float64. NaN if there is no softmax."""
    z = logits.astype(np.float64)
    largest = z.max()
    if not np.isfinite(largest):
        return float("nan")
    return float(z[token_id] - largest - np.log(np.exp(z - largest).sum()))

"""How far an artifact's logits are from its checkpoint's, and the limit it is held to.

Works on callables, because what runs the artifact (ONNX Runtime) is not known in this room.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from model_store.errors import ParityError
from model_store.manifest import Parity

TokenIds = NDArray[np.int64]
Logits = NDArray[np.float32]
Reference = Callable[[Sequence[TokenIds]], list[Logits]]  # prompts -> logits [T, V] of each
Candidate = Callable[[TokenIds], Logits]  # token ids [T] -> logits [T, V], or [R, V] of the last R rows

PROMPT_LENGTHS = (1, 17, 47, 64)  # a lone token, and lengths on both sides of block boundaries


def parity_prompts(vocab_size: int, max_model_len: int) -> list[TokenIds]:
    """The prompts every import is measured on: random ids, the same ones each time."""
    random = np.random.default_rng(20)
    lengths = sorted({min(length, max_model_len) for length in PROMPT_LENGTHS})
    return [random.integers(0, vocab_size, length, dtype=np.int64) for length in lengths]


def relative_errors(expected: Logits, given: Logits) -> NDArray[np.float64]:
    """|a - b|_2 / |b|_2 of every row. A row that is not finite counts as infinitely far."""
    difference = np.linalg.norm(given.astype(np.float64) - expected, axis=-1)
    size = np.linalg.norm(expected.astype(np.float64), axis=-1)
    errors = difference / np.maximum(size, np.finfo(np.float64).tiny)
    return np.where(np.isfinite(errors), errors, np.inf)


def measure(reference: Reference, candidate: Candidate, prompts: Sequence[TokenIds], bound: float) -> Parity:
    """Compare row by row. Raises ParityError with the numbers of every prompt if a row is further off than `bound`."""
    errors, agreements, reports = [], [], []
    for prompt, expected in zip(prompts, reference(prompts), strict=True):
        given = candidate(prompt)
        if given.ndim != 2 or not 0 < len(given) <= len(expected) or given.shape[1] != expected.shape[1]:
            raise ParityError(f"the artifact gave logits {list(given.shape)}; expected {list(expected.shape)}")
        expected = expected[-len(given) :]
        errors.append(relative_errors(expected, given))
        agreements.append(expected.argmax(axis=-1) == given.argmax(axis=-1))
        worst = int(errors[-1].argmax())
        reports.append(f"{len(prompt)} tokens: {errors[-1][worst]:.3g} at row {len(prompt) - len(given) + worst}")
    rows, agreed = np.concatenate(errors), np.concatenate(agreements)
    if not rows.max() <= bound:
        raise ParityError(f"relative error {rows.max():.3g} is over the bound {bound:g} ({'; '.join(reports)})")
    return Parity(
        prompts=len(prompts),
        tokens=len(rows),
        max_relative_error=float(rows.max()),
        mean_relative_error=float(rows.mean()),
        top1_agreement=float(agreed.mean()),
        bound=bound,
    )

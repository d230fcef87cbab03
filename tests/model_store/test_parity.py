"""How artifacts are judged: the numbers, and the refusal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from model_store.errors import ParityError
from model_store.parity import measure, parity_prompts, relative_errors

Floats = NDArray[np.float32]
VOCABULARY = 50


def logits_of(prompt: NDArray[np.int64]) -> Floats:
    """Rows that depend on the tokens, all of length about 1."""
    rows: NDArray[np.float64] = np.cos(prompt[:, None] * 0.7 + np.arange(VOCABULARY))
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows.astype(np.float32)


def reference(prompts: Sequence[NDArray[np.int64]]) -> list[Floats]:
    return [logits_of(prompt) for prompt in prompts]


def shifted(by: float) -> Floats:
    return np.full(VOCABULARY, by / np.sqrt(VOCABULARY), np.float32)


PROMPTS = parity_prompts(VOCABULARY, 512)


def test_equal_logits_have_no_error_and_agree_everywhere() -> None:
    parity = measure(reference, logits_of, PROMPTS, bound=1e-6)
    assert (parity.max_relative_error, parity.mean_relative_error, parity.top1_agreement) == (0.0, 0.0, 1.0)
    assert (parity.prompts, parity.tokens, parity.bound) == (4, 129, 1e-6)


def test_the_error_is_the_length_of_the_difference_over_the_length_of_the_row() -> None:
    parity = measure(reference, lambda prompt: logits_of(prompt) + shifted(0.125), PROMPTS, bound=0.2)
    assert parity.max_relative_error == pytest.approx(0.125, rel=1e-5)


def test_one_row_over_the_bound_refuses_with_its_numbers() -> None:
    def candidate(prompt: NDArray[np.int64]) -> Floats:
        rows = logits_of(prompt)
        if len(prompt) == 17:
            rows[3] += shifted(0.5)
        return rows

    with pytest.raises(ParityError, match=r"0\.5 is over the bound 0\.25 .*17 tokens: 0\.5 at row 3") as caught:
        measure(reference, candidate, PROMPTS, bound=0.25)
    assert caught.value.http_status == 500


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_refused_under_any_bound(bad: float) -> None:
    with pytest.raises(ParityError, match="inf is over the bound"):
        measure(reference, lambda prompt: logits_of(prompt) * np.float32(bad), PROMPTS, bound=1e30)


def test_a_candidate_may_give_only_the_last_rows() -> None:
    parity = measure(reference, lambda prompt: logits_of(prompt)[-2:], PROMPTS, bound=1e-6)
    assert parity.tokens == 1 + 3 * 2


@pytest.mark.parametrize("shape", [(0, VOCABULARY), (200, VOCABULARY), (1, VOCABULARY - 1), (VOCABULARY,)])
def test_logits_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ParityError, match="gave logits"):
        measure(reference, lambda _: np.ones(shape, np.float32), PROMPTS, bound=1.0)


def test_prompts_are_the_same_each_time_and_fit_the_model() -> None:
    again = parity_prompts(VOCABULARY, 512)
    assert all(np.array_equal(a, b) for a, b in zip(PROMPTS, again, strict=True))
    assert [len(prompt) for prompt in parity_prompts(2, 16)] == [1, 16]
    assert max(prompt.max() for prompt in parity_prompts(2, 16)) == 1


def test_a_row_of_zeros_that_stays_zero_has_no_error() -> None:
    zeros = np.zeros((1, VOCABULARY), np.float32)
    assert relative_errors(zeros, zeros)[0] == 0.0

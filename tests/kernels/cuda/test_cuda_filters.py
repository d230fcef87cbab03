"""Which tokens the GPU's filters leave, and which of close ones wins: every row is drawn so often that the cut shows.

One draw seldom tells where a cut lies. Here the kept tokens are few or nearly alike, each drawn under many seeds.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from batcher.backend import SamplingInput
from batcher.sampling import sample, uniforms
from tests.kernels.cuda.test_cuda_sample import BIG_SEED, TOP_P_BOUND, Floats, on_device, random_logits, sampling


def reference(logits: Floats, how: SamplingInput) -> list[set[int]]:
    """What each row may draw: the reference's token, and those of a top_p that is the same to float32 weights."""
    shifts = [how.top_p * np.float32(1 + shift) for shift in (-TOP_P_BOUND, 0, TOP_P_BOUND)]
    drawn = [sample(logits, replace(how, top_p=np.where(how.top_p < 1, shifted, how.top_p))) for shifted in shifts]
    return [{int(token) for token in row} for row in zip(*drawn, strict=True)]


def assert_drawn_as_the_reference(logits: Floats, how: SamplingInput, threads: int) -> None:
    for row, (token, allowed) in enumerate(zip(on_device(logits, how, threads), reference(logits, how), strict=True)):
        assert token in allowed, f"row {row}: {token}, not of {allowed}"


def often(row: Floats, times: int = 64) -> Floats:
    return np.tile(row, (times, 1))


@pytest.mark.parametrize("threads", [32, 64])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_p": 0.3},
        {"top_p": 0.9},
        {"min_p": 0.3},
        {"top_k": 9, "top_p": 0.5},
        {"top_k": 30, "top_p": 0.9, "min_p": 0.4},
        {"top_k": 7, "seed": BIG_SEED},
    ],
    ids=str,
)
def test_under_many_seeds_the_same_tokens_are_kept(how: dict[str, float], ties: bool, threads: int) -> None:
    flat = random_logits(1, 200, 3, ties=ties) / np.float32(4)  # many tokens are likely
    assert_drawn_as_the_reference(often(flat), sampling(64, temperature=1.0, **how), threads)


@pytest.mark.parametrize("threads", [32, 64])
def test_of_equals_at_the_cut_the_lowest_ids_are_kept(threads: int) -> None:
    row = np.zeros((1, 150), np.float32)
    row[0, [3, 140]] = 0.5
    for how in ({"top_k": 5}, {"top_p": 0.04}, {"top_k": 10, "top_p": 0.5}):
        parameters = sampling(64, temperature=1.0, **how)
        drawn = set(on_device(often(row), parameters, threads))
        assert_drawn_as_the_reference(often(row), parameters, threads)
        assert {0, 1, 3, 140} <= drawn <= {0, 1, 2, 3, 4, 140}, how


def test_a_weight_beside_min_p_is_decided_exactly() -> None:
    """Their weights are within 1e-4 of min_p, on both sides."""
    least = np.float32(0.25)
    row = np.array([[0, np.log(least) + 3e-5, np.log(least) - 3e-5]], np.float32)
    parameters = sampling(64, temperature=1.0, min_p=float(least))
    assert set(on_device(often(row), parameters)) == {0, 1}
    assert_drawn_as_the_reference(often(row), parameters, 32)


def test_scores_closer_than_float32_can_tell_are_decided_in_float64() -> None:
    """The first token's logit makes up the difference of the draws, up to its own rounding."""
    rows = 200
    parameters = sampling(rows, temperature=1.0)
    logits = np.zeros((rows, 2), np.float32)
    for row in range(rows):
        u = uniforms(2, int(parameters.seed[row]), int(parameters.position[row]))
        gumbel: NDArray[np.float64] = -np.log(-np.log(u))
        logits[row, 0] = gumbel[1] - gumbel[0]
    expected = sample(logits, parameters).tolist()
    assert 50 < sum(expected) < 150  # both win
    assert on_device(logits, parameters) == expected


@pytest.mark.parametrize("threads", [32, 64])
def test_scores_that_round_to_the_same_number_give_the_lowest_id(threads: int) -> None:
    logits = np.full((3, 300), 1e30, np.float32)
    logits[1, :130] = logits[2, :299] = 0  # the last warp alone holds the best
    parameters = sampling(3, temperature=1.0)
    assert on_device(logits, parameters, threads) == sample(logits, parameters).tolist() == [0, 130, 299]


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-39, 1e-45])
@pytest.mark.parametrize("how", [{}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_the_smallest_temperatures_draw_the_largest_logit(temperature: float, how: dict[str, float]) -> None:
    """1 / temperature is no float32 from 2.9e-39 down."""
    logits = np.array([[1, 3, 2], [3, 3, 3], [-3, -2, -1], [-np.inf, 1, np.nan]], np.float32)
    parameters = sampling(4, temperature=temperature, **how)
    drawn = on_device(logits, parameters)
    assert drawn == sample(logits, parameters).tolist()
    assert [drawn[0], *drawn[2:]] == [1, 2, 1]


@hypothesis_settings(max_examples=20)
@given(st.data())
def test_any_row_is_filtered_as_the_reference_does(data: st.DataObject) -> None:
    values = st.integers(-6, 6).map(float) | st.floats(-8, 8, width=32) | st.sampled_from([np.inf, -np.inf, np.nan])
    row = np.array([data.draw(st.lists(values, min_size=1, max_size=90))], np.float32)
    how = sampling(
        24,
        temperature=data.draw(st.sampled_from([0.5, 1.0, 8.0])),
        top_k=data.draw(st.integers(0, 95)),
        top_p=data.draw(st.sampled_from([1.0, 0.95, 0.5, 0.1, 0.0])),
        min_p=data.draw(st.sampled_from([0.0, 0.05, 0.5, 1.0])),
        seed=data.draw(st.integers(0, 2**62)),
        position=data.draw(st.integers(0, 2**62)),
    )
    assert_drawn_as_the_reference(often(row, 24), how, data.draw(st.sampled_from([32, 64])))

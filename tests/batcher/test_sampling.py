"""What sampling means, pinned: published random numbers, each filter, and the distribution that comes out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from batcher.backend import SamplingInput
from batcher.sampling import kept, philox4x32, sample, uniforms


def params(
    rows: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    position: int = 5,
) -> SamplingInput:
    return SamplingInput(
        np.full(rows, temperature, np.float32),
        np.full(rows, top_k, np.int32),
        np.full(rows, top_p, np.float32),
        np.full(rows, min_p, np.float32),
        np.full(rows, seed, np.int64),
        np.full(rows, position, np.int64),
    )


def row(*logits: float) -> NDArray[np.float32]:
    return np.array([logits], np.float32)


ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    assert philox4x32(np.array([counter, counter], np.uint32), key).tolist() == [list(words)] * 2


def test_a_uniform_number_is_a_word_of_its_own_counter() -> None:
    seed, position = (7 << 32) + 9, (3 << 32) + 4
    u = uniforms(10, seed, position)
    words = philox4x32(np.array([[2, 4, 3, 0]], np.uint32), (9, 7))[0]
    assert u[9] == (float(words[1]) + 0.5) / 2**32
    assert (u > 0).all()
    assert (u < 1).all()


def test_greedy_takes_the_largest_and_the_lowest_id_of_a_tie() -> None:
    assert sample(row(1.0, 3.0, 3.0, 2.0), params(1)).tolist() == [1]


def test_nan_never_wins_and_plus_infinity_does() -> None:
    nan, inf = float("nan"), float("inf")
    for temperature in (0.0, 1.0):
        logits = np.array([[nan, 1.0, nan], [-inf, inf, 9.0], [-inf, -inf, 0.5]], np.float32)
        assert sample(logits, params(3, temperature=temperature)).tolist() == [1, 1, 2]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_without_a_finite_logit_gives_minus_one_and_spares_the_others(temperature: float) -> None:
    nan, inf = float("nan"), float("inf")
    logits = np.array([[nan, nan], [0.0, 1.0], [-inf, -inf], [inf, inf]], np.float32)
    token_ids = sample(logits, params(4, temperature=temperature))
    assert [token_ids[0], token_ids[2], token_ids[3]] == [-1, -1, -1]
    assert token_ids[1] in (0, 1)


def test_no_rows_give_no_tokens() -> None:
    assert sample(np.zeros((0, 7), np.float32), params(0)).tolist() == []


LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.2, 0.25], np.float32))  # best first: 1, 4, 3, 0, 2


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "expected", "remark"),
    [
        (0, 1.0, 0.0, [1, 4, 3, 0, 2], "no filter"),
        (2, 1.0, 0.0, [1, 4], "top_k"),
        (9, 1.0, 0.0, [1, 4, 3, 0, 2], "top_k beyond the vocabulary"),
        (0, 0.5, 0.0, [1, 4], "0.4 has not reached 0.5, 0.65 has"),
        (0, 0.3, 0.0, [1], "at least one"),
        (0, 1e-9, 0.0, [1], "at least one, however small top_p is"),
        (0, 0.86, 0.0, [1, 4, 3, 0], "0.85 has not reached 0.86"),
        (2, 0.6, 0.0, [1], "top_p is of the softmax over what top_k left: 0.4 / 0.65 has reached 0.6"),
        (0, 1.0, 0.45, [1, 4, 3], "min_p: at least 0.18"),
        (0, 1.0, 1.0, [1], "min_p of one keeps the best"),
        (4, 0.9, 0.3, [1, 4, 3], "all together"),
    ],
)
def test_the_filters_keep(top_k: int, top_p: float, min_p: float, expected: list[int], remark: str) -> None:
    token_ids, _ = kept(LOGITS, 1.0, top_k, top_p, min_p)
    assert token_ids.tolist() == expected, remark


def test_equal_logits_are_kept_by_lower_id() -> None:
    logits = np.tile(np.array([0.0, 2.0, 1.0], np.float32), 100)
    token_ids, _ = kept(logits, 1.0, 150, 1.0, 0.0)
    assert token_ids.tolist() == [*range(1, 300, 3), *range(2, 150, 3)]


def test_temperature_widens_what_min_p_keeps() -> None:
    assert len(kept(LOGITS, 1.0, 0, 1.0, 0.49)[0]) == 3
    assert len(kept(LOGITS, 4.0, 0, 1.0, 0.49)[0]) == 5


def test_the_draws_follow_the_softmax() -> None:
    draws = 5_000
    logits = np.repeat(LOGITS[None], draws, axis=0)
    sampling = params(draws, temperature=1.0, seed=3)
    sampling.position[:] = np.arange(draws)
    share = np.bincount(sample(logits, sampling), minlength=5) / draws
    # Five standard deviations of a binomial share.
    p = np.exp(LOGITS.astype(np.float64))
    assert (np.abs(share - p) < 5 * np.sqrt(p * (1 - p) / draws)).all()


def test_another_seed_or_position_is_another_draw() -> None:
    logits = np.zeros((1, 1000), np.float32)
    base = sample(logits, params(1, temperature=1.0, seed=1, position=1))[0]
    assert sample(logits, params(1, temperature=1.0, seed=1, position=1))[0] == base
    others = [(2, 1), (1, 2), (1 + 2**40, 1), (1, 1 + 2**40)]
    assert all(
        sample(logits, params(1, temperature=1.0, seed=seed, position=position))[0] != base for seed, position in others
    )


@settings(deadline=None)
@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40),
    temperature=st.floats(0.0625, 5, width=32),
    top_k=st.integers(0, 10),
    top_p=st.floats(0.0078125, 1, width=32),
    min_p=st.floats(0, 1, width=32),
    seed=st.integers(0, 2**63 - 1),
    position=st.integers(0, 2**40),
)
def test_a_draw_is_one_of_the_kept_and_does_not_depend_on_its_neighbours(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, seed: int, position: int
) -> None:
    one = np.array([logits], np.float32)
    drawn = sample(
        np.concatenate([one, one[:, ::-1], one]),
        params(3, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, position=position),
    )
    assert drawn[0] == drawn[2]
    assert drawn[0] in kept(one[0], temperature, top_k, top_p, min_p)[0]

"""The GPU's sampling draws what batcher/sampling.py says, row by row: its own text runs here, on the CPU."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from batcher.backend import SamplingInput
from batcher.sampling import sample
from tests.kernels.cuda.emulation import launch

Floats = NDArray[np.float32]
PARTS = 16  # sample.cu's
TOP_P_BOUND = 2e-6  # sample.cu: within that of a cumulative probability its cut may be the next one
BIG_SEED, BIG_POSITION = 2**62 + 12345, 2**33 + 7


def sampling(rows: int, **values: float) -> SamplingInput:
    def column(name: str, default: float, dtype: type[np.generic]) -> NDArray[Any]:
        return np.full(rows, values.get(name, default), dtype)

    return SamplingInput(
        temperature=column("temperature", 0.0, np.float32),
        top_k=column("top_k", 0, np.int32),
        top_p=column("top_p", 1.0, np.float32),
        min_p=column("min_p", 0.0, np.float32),
        seed=np.arange(rows, dtype=np.int64) + int(values.get("seed", 1)),
        position=np.arange(rows, dtype=np.int64) * 3 + int(values.get("position", 5)),
    )


def on_device(logits: Floats, how: SamplingInput, threads: int = 32) -> list[int]:
    token_ids = np.full(len(logits), -7, np.int64)
    tops = np.zeros((len(logits), PARTS, 2), np.uint64)
    rows = (np.ascontiguousarray(logits), ctypes.c_longlong(logits.shape[1]))
    launch("millrace_top", len(logits) * PARTS, threads, *rows, tops)
    launch(
        "millrace_sample",
        len(logits),
        threads,
        *rows,
        tops,
        *(how.temperature, how.top_k, how.top_p, how.min_p, how.seed, how.position),
        token_ids,
    )
    return token_ids.tolist()


def random_logits(rows: int, vocab_size: int, seed: int, *, ties: bool = False) -> Floats:
    logits = np.random.default_rng(seed).standard_normal((rows, vocab_size)).astype(np.float32) * 3
    return np.rint(logits * 2).astype(np.float32) / np.float32(2) if ties else logits


CASES: list[dict[str, float]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "seed": BIG_SEED, "position": BIG_POSITION},
    {"temperature": 1.3, "top_k": 1},
    {"temperature": 1.3, "top_k": 7},
    {"temperature": 0.9, "top_p": 0.9},
    {"temperature": 2.0, "top_p": 0.01},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 100.0, "top_k": 900, "top_p": 0.999},
]


@pytest.mark.parametrize(("vocab_size", "ties"), [(1, False), (33, True), (700, False)])
@pytest.mark.parametrize("how", CASES, ids=str)
def test_the_device_draws_the_reference_token(vocab_size: int, how: dict[str, float], ties: bool) -> None:
    logits = random_logits(2, vocab_size, vocab_size, ties=ties)
    parameters = sampling(2, **how)
    assert on_device(logits, parameters) == sample(logits, parameters).tolist()


@pytest.mark.parametrize("threads", [64, 128])
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    logits = random_logits(1, 400, 8, ties=True)
    parameters = sampling(1, temperature=0.9, top_k=100, top_p=0.7)
    assert on_device(logits, parameters, threads) == sample(logits, parameters).tolist()


def test_rows_that_are_not_finite_follow_the_rules() -> None:
    nan, inf = np.nan, np.inf
    logits = np.array(
        [
            [nan, 1.0, 2.0, nan],
            [-inf, -inf, -inf, -inf],
            [nan, nan, nan, nan],
            [inf, 0.0, inf, 3.0],
            [inf, inf, -inf, nan],
            [-0.0, 0.0, -0.0, 0.0],
            [-inf, -3e38, 3e38, -inf],
        ],
        np.float32,
    )
    for how in ({}, {"temperature": 0.5}, {"temperature": 1.0, "top_k": 2}, {"temperature": 1.0, "top_p": 0.5}):
        parameters = sampling(len(logits), **how)
        assert on_device(logits, parameters) == sample(logits, parameters).tolist(), how


def test_what_a_filter_leaves_is_drawn_as_often_as_it_is_likely() -> None:
    """Not against the reference: against the probabilities themselves, so that both cannot be wrong alike."""
    logits = np.tile(np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32)), (120, 1))
    drawn = np.bincount(on_device(logits, sampling(120, temperature=1.0, top_p=0.9)), minlength=4) / 120
    np.testing.assert_allclose(drawn, np.array([0.5, 0.3, 0.15, 0.0]) / 0.95, atol=0.14)
    assert drawn[3] == 0


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_row_draws_the_reference_token(data: st.DataObject) -> None:
    values = st.floats(-50, 50, width=32) | st.sampled_from([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, 1.0])
    row = data.draw(st.lists(values, min_size=1, max_size=70))
    top_p = data.draw(st.sampled_from([1.0, 0.95, 0.5, 0.1]))
    others = {
        "temperature": data.draw(st.sampled_from([0.0, 0.1, 1.0, 3.0])),
        "top_k": data.draw(st.integers(0, 80)),
        "min_p": data.draw(st.sampled_from([0.0, 0.1, 1.0])),
        "seed": data.draw(st.integers(0, 2**63 - 1)),
    }
    logits = np.array([row], np.float32)
    # Where a cumulative probability falls on top_p, as it does with tokens that are equally likely, sums in another
    # order may cut one token apart.
    bounds = [top_p] if top_p == 1 else [top_p - TOP_P_BOUND, top_p, top_p + TOP_P_BOUND]
    accepted = [sample(logits, sampling(1, top_p=bound, **others)).tolist() for bound in bounds]
    assert on_device(logits, sampling(1, top_p=top_p, **others)) in accepted

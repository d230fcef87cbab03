"""The device moves a decode step on exactly as the host's advance() says, and nothing beside its rows."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from services.backends.step_image import advance
from tests.kernels.cuda.emulation import launch

NAMES = ("input_ids", "past_lens", "slot_mapping", "position")
Step = dict[str, NDArray[Any]]


def step(input_ids: list[int], past_lens: list[int], slot_mapping: list[int], position: list[int]) -> Step:
    kinds = (np.int64, np.int32, np.int32, np.int64)
    columns = (input_ids, past_lens, slot_mapping, position)
    return {name: np.array(values, kind) for name, values, kind in zip(NAMES, columns, kinds, strict=True)}


def advanced(before: Step, token_ids: NDArray[np.int64], *, rows: int, blocks: int = 1) -> Step:
    after = {name: values.copy() for name, values in before.items()}
    launch("millrace_advance", blocks, 32, *(after[name] for name in NAMES), token_ids, ctypes.c_int(rows))
    return after


def values_of(image: Step) -> dict[str, list[int]]:
    return {name: values.tolist() for name, values in image.items()}


def test_a_row_moves_on_a_row_that_failed_reads_zero_and_padding_stays() -> None:
    far = 2**40
    before = step([5, 6, 7, 8], [10, 20, 0, 0], [42, 0, -1, -1], [11, far, 3, 3])
    after = advanced(before, np.array([9, -1, 4, 4]), rows=4)
    assert values_of(after) == {
        "input_ids": [9, 0, 7, 8],
        "past_lens": [11, 21, 0, 0],
        "slot_mapping": [43, 1, -1, -1],
        "position": [12, far + 1, 3, 3],
    }


@pytest.mark.parametrize(("rows", "blocks"), [(3, 1), (32, 1), (33, 2), (70, 3), (40, 3)])
def test_rows_past_the_last_are_not_touched(rows: int, blocks: int) -> None:
    """70 rows lie there, and blocks are launched for more than `rows`."""
    column = list(range(70))
    before = step(column, column, column, column)
    after = advanced(before, np.full(70, 1000), rows=rows, blocks=blocks)
    for name, values in after.items():
        assert (values[:rows] != before[name][:rows]).all()
        np.testing.assert_array_equal(values[rows:], before[name][rows:])


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.integers(-1, 2**21), st.integers(0, 2**20), st.integers(-1, 2**30), st.integers(0, 2**62)),
        min_size=1,
        max_size=40,
    )
)
def test_any_step_moves_on_as_on_the_host(drawn: list[tuple[int, int, int, int]]) -> None:
    token_ids = np.array([row[0] for row in drawn])
    before = step([3] * len(drawn), *([row[i] for row in drawn] for i in (1, 2, 3)))
    expected = {name: values.copy() for name, values in before.items()}
    advance(expected, token_ids)
    assert values_of(advanced(before, token_ids, rows=len(drawn), blocks=2)) == values_of(expected)

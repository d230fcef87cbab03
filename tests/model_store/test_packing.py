"""Packed weights: every element where the operators look for it, zeros elsewhere, and the way back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_store.packing import (
    column_sums,
    interleave_gate_up,
    num_blocks,
    pack_float,
    pack_int8,
    pad_columns,
    split_gate_up,
    unpack_float,
    unpack_int8,
)

SHAPES = {"outputs": st.integers(1, 200), "inputs": st.integers(1, 50), "seed": st.integers(0, 2**32)}


@given(**SHAPES)
def test_int8_weights_lie_in_blocks_of_64_columns_with_four_inputs_side_by_side(
    outputs: int, inputs: int, seed: int
) -> None:
    weight = np.random.default_rng(seed).integers(-127, 128, (outputs, inputs), dtype=np.int8)
    packed = pack_int8(weight)
    assert packed.shape == (num_blocks(outputs), -(-inputs // 4), 64, 4)
    assert packed.flags.c_contiguous
    n, k = np.random.default_rng(seed).integers(0, [outputs, inputs])
    assert packed[n // 64, k // 4, n % 64, k % 4] == weight[n, k]
    assert np.count_nonzero(packed) == np.count_nonzero(weight)
    np.testing.assert_array_equal(unpack_int8(packed, outputs, inputs), weight)
    np.testing.assert_array_equal(column_sums(packed)[:outputs], weight.sum(axis=1, dtype=np.int32))
    assert not column_sums(packed)[outputs:].any()


@given(**SHAPES)
def test_float_weights_lie_in_blocks_of_64_columns(outputs: int, inputs: int, seed: int) -> None:
    weight = np.random.default_rng(seed).standard_normal((outputs, inputs), dtype=np.float32)
    packed = pack_float(weight)
    assert packed.shape == (num_blocks(outputs), inputs, 64)
    assert packed.flags.c_contiguous
    n, k = np.random.default_rng(seed).integers(0, [outputs, inputs])
    assert packed[n // 64, k, n % 64] == weight[n, k]
    assert np.count_nonzero(packed) == np.count_nonzero(weight)
    np.testing.assert_array_equal(unpack_float(packed, outputs), weight)


@given(**SHAPES)
def test_a_block_holds_32_columns_of_gate_and_the_same_32_of_up(outputs: int, inputs: int, seed: int) -> None:
    gate, up = np.random.default_rng(seed).standard_normal((2, outputs, inputs), dtype=np.float32)
    both = interleave_gate_up(gate, up)
    assert both.shape == (64 * -(-outputs // 32), inputs)
    n = outputs - 1
    np.testing.assert_array_equal(both[64 * (n // 32) + n % 32], gate[n])
    np.testing.assert_array_equal(both[64 * (n // 32) + 32 + n % 32], up[n])
    for half, original in zip(split_gate_up(both, outputs), (gate, up), strict=True):
        np.testing.assert_array_equal(half, original)


def test_vectors_are_interleaved_like_the_rows_of_a_matrix() -> None:
    gate, up = np.arange(40), np.arange(100, 140)
    both = interleave_gate_up(gate, up)
    np.testing.assert_array_equal(both, interleave_gate_up(gate[:, None], up[:, None])[:, 0])


def test_gate_and_up_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gate is float64\[2\], up is float64\[3\]"):
        interleave_gate_up(np.zeros(2), np.zeros(3))


def test_more_columns_than_the_blocks_hold_are_refused() -> None:
    assert pad_columns(np.ones(64), 1).shape == (64,)
    with pytest.raises(ValueError, match="65 columns do not fit in 1 blocks of 64"):
        pad_columns(np.ones(65), 1)

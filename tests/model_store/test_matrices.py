"""Rows in packed order: any range of blocks is that range of the whole."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from model_store.matrices import GateUp, Matrix, Stacked
from model_store.packing import split_gate_up
from model_store.tensors import Tensor


@dataclass(frozen=True, slots=True)
class Array:
    """A tensor's source that is already in memory."""

    values: NDArray[np.float32]

    def get_shape(self) -> list[int]:
        return list(self.values.shape)

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, rows: slice) -> NDArray[np.generic]:
        return self.values[rows]


def tensor(*shape: int, seed: int = 0) -> Tensor:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return Tensor(f"t{seed}", shape, "F32", Array(values))


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.integers(1, 150), min_size=1, max_size=4), st.data())
def test_any_blocks_of_stacked_tensors_are_those_of_the_whole(heights: list[int], data: st.DataObject) -> None:
    parts = tuple(tensor(height, 3, seed=seed) for seed, height in enumerate(heights))
    matrix = Stacked(parts)
    whole = np.zeros((matrix.num_blocks * 64, 3), np.float32)
    whole[: sum(heights)] = np.concatenate([part.read() for part in parts])
    start = data.draw(st.integers(0, matrix.num_blocks - 1))
    stop = data.draw(st.integers(start + 1, matrix.num_blocks))
    np.testing.assert_array_equal(matrix.blocks(start, stop), whole[start * 64 : stop * 64])
    assert (matrix.num_columns, matrix.num_inputs) == (sum(heights), 3)


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(1, 200))
def test_gate_and_up_interleave_by_half_blocks(height: int) -> None:
    gate, up = tensor(height, 2, seed=1), tensor(height, 2, seed=2)
    matrix = GateUp(gate, up)
    pieces = np.concatenate([matrix.blocks(block, block + 1) for block in range(matrix.num_blocks)])
    np.testing.assert_array_equal(pieces, matrix.blocks(0, matrix.num_blocks))
    for found, expected in zip(split_gate_up(pieces, height), (gate, up), strict=True):
        np.testing.assert_array_equal(found, expected.read())
    np.testing.assert_array_equal(pieces[0:32][:height], gate.read()[:32])
    assert matrix.num_columns == height


@pytest.mark.parametrize(
    "matrix", [Stacked((tensor(70), tensor(3))), GateUp(tensor(33), tensor(33))], ids=["stacked", "gated"]
)
def test_biases_follow_the_columns_of_their_weight(matrix: Matrix) -> None:
    assert matrix.blocks(0, matrix.num_blocks).shape == (matrix.num_blocks * 64,)

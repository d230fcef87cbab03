"""Lay weights out the way the CPU operators read them (kernels/README.md), and back.

Apart from quantization because this moves numbers and changes none, and from kernels/ because packing happens once,
at import, while the operators use the stored bytes as they are. A matrix is [N, K], N outputs (columns of the packed
form) and K inputs. Blocks hold 64 columns; everything is padded with zeros, which add nothing to any sum.
"""

from __future__ import annotations

from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

BLOCK: Final = 64  # columns in a block
HALF_BLOCK: Final = BLOCK // 2  # gate columns in a block of a gate-and-up matrix; as many of up follow
INPUTS_PER_WORD: Final = 4  # int8 inputs of one column that lie side by side

Scalar = TypeVar("Scalar", bound=np.generic)


def num_blocks(columns: int) -> int:
    """Blocks that `columns` columns take."""
    return -(-columns // BLOCK)


def pack_int8(weight: NDArray[np.int8]) -> NDArray[np.int8]:
    """[N, K] int8 -> [NB, K4, 64, 4]: block, input / 4, column, input % 4."""
    outputs, inputs = weight.shape
    blocks, words = num_blocks(outputs), -(-inputs // INPUTS_PER_WORD)
    padded = np.zeros((blocks * BLOCK, words * INPUTS_PER_WORD), np.int8)
    padded[:outputs, :inputs] = weight
    # Four inputs move together: transposing them as one 32-bit word is several times faster than as bytes.
    by_word = padded.view(np.uint32).reshape(blocks, BLOCK, words)
    packed = np.ascontiguousarray(by_word.transpose(0, 2, 1)).view(np.int8)
    return packed.reshape(blocks, words, BLOCK, INPUTS_PER_WORD)


def unpack_int8(packed: NDArray[np.int8], outputs: int, inputs: int) -> NDArray[np.int8]:
    """The [outputs, inputs] matrix that pack_int8 packed."""
    blocks, words = packed.shape[:2]
    by_column = np.ascontiguousarray(packed).view(np.uint32).reshape(blocks, words, BLOCK).transpose(0, 2, 1)
    matrix = np.ascontiguousarray(by_column).view(np.int8).reshape(blocks * BLOCK, words * INPUTS_PER_WORD)
    return matrix[:outputs, :inputs].copy()


def pack_float(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """[N, K] float32 -> [NB, K, 64]: block, input, column."""
    outputs, inputs = weight.shape
    packed = np.zeros((num_blocks(outputs), inputs, BLOCK), np.float32)
    for block, first in zip(
        packed, range(0, outputs, BLOCK), strict=True
    ):  # a block fits in the cache, the matrix does not
        columns = weight[first : first + BLOCK]
        block[:, : len(columns)] = columns.T
    return packed


def unpack_float(packed: NDArray[np.float32], outputs: int) -> NDArray[np.float32]:
    """The [outputs, K] matrix that pack_float packed."""
    blocks, inputs = packed.shape[:2]
    return packed.transpose(0, 2, 1).reshape(blocks * BLOCK, inputs)[:outputs].copy()


def pad_columns(values: NDArray[Scalar], blocks: int) -> NDArray[Scalar]:
    """Rows (one a column of the packed form) padded with zeros to `blocks` blocks: [N, ...] -> [blocks * 64, ...].

    For scales and biases as they are; for matrices before packing.
    """
    if len(values) > blocks * BLOCK:
        raise ValueError(f"{len(values)} columns do not fit in {blocks} blocks of {BLOCK}")
    padded = np.zeros((blocks * BLOCK, *values.shape[1:]), values.dtype)
    padded[: len(values)] = values
    return padded


def interleave_gate_up(gate: NDArray[Scalar], up: NDArray[Scalar]) -> NDArray[Scalar]:
    """Gate and up as one matrix (or vector) in the column order of silu_mul: 32 of gate, the same 32 of up, and so on.

    [N, ...] and [N, ...] -> [64 * ceil(N / 32), ...], padded with zeros. Matrices go through it before packing; scales,
    biases and column sums in the same way.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate is {gate.dtype}{list(gate.shape)}, up is {up.dtype}{list(up.shape)}; they must be alike"
        )
    outputs = len(gate)
    blocks = -(-outputs // HALF_BLOCK)
    both = np.zeros((2, blocks * HALF_BLOCK, *gate.shape[1:]), gate.dtype)
    both[0, :outputs] = gate
    both[1, :outputs] = up
    halves = both.reshape(2, blocks, HALF_BLOCK, *gate.shape[1:])
    return np.ascontiguousarray(np.moveaxis(halves, 0, 1)).reshape(blocks * BLOCK, *gate.shape[1:])


def split_gate_up(both: NDArray[Scalar], outputs: int) -> tuple[NDArray[Scalar], NDArray[Scalar]]:
    """The (gate, up) that interleave_gate_up interleaved, [outputs, ...] each."""
    halves = np.moveaxis(both.reshape(-1, 2, HALF_BLOCK, *both.shape[1:]), 1, 0)
    gate, up = (half.reshape(-1, *both.shape[1:])[:outputs].copy() for half in halves)
    return gate, up


def column_sums(packed: NDArray[np.int8]) -> NDArray[np.int32]:
    """`colsum` of a packed int8 matrix: the sum over its inputs of every column, [NB * 64] int32."""
    sums: NDArray[np.int32] = packed.sum(axis=(1, 3), dtype=np.int32)
    return sums.reshape(-1)

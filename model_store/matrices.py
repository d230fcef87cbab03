"""Weights in the order a kernel wants their rows, read a few blocks of columns at a time.

A linear layer of the graph is often several of the checkpoint: q, k and v one below the other; gate and up
interleaved. Apart from packing (what a block looks like in memory) and from quantization (which numbers are in it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from model_store.packing import BLOCK, HALF_BLOCK, interleave_gate_up
from model_store.tensors import Tensor

Floats = NDArray[np.float32]


class Matrix(Protocol):
    """A weight [rows, K], or a bias [rows], whose rows are the layer's packed output columns."""

    @property
    def num_columns(self) -> int:
        """Outputs of the layer: without padding, and after gate and up have become one."""
        ...

    @property
    def num_rows(self) -> int:
        """Rows of the weight, padding of the last block not counted."""
        ...

    @property
    def num_blocks(self) -> int: ...

    @property
    def num_inputs(self) -> int: ...

    def blocks(self, start: int, stop: int) -> Floats:
        """Rows of blocks [start, stop): [(stop - start) * 64, K]; rows past the end are zero."""
        ...


@dataclass(frozen=True, slots=True)
class Stacked:
    """Tensors one below the other: output columns side by side."""

    parts: tuple[Tensor, ...]

    @property
    def num_columns(self) -> int:
        return self.num_rows

    @property
    def num_rows(self) -> int:
        return sum(part.shape[0] for part in self.parts)

    @property
    def num_blocks(self) -> int:
        return -(-self.num_columns // BLOCK)

    @property
    def num_inputs(self) -> int:
        return self.parts[0].shape[-1]

    def blocks(self, start: int, stop: int) -> Floats:
        first, end = start * BLOCK, stop * BLOCK
        rows = np.zeros((end - first, *self.parts[0].shape[1:]), np.float32)
        offset = 0  # of the current part's first row
        for part in self.parts:
            low, high = max(first, offset), min(end, offset + part.shape[0])
            if low < high:
                rows[low - first : high - first] = part.rows(low - offset, high - offset)
            offset += part.shape[0]
        return rows


@dataclass(frozen=True, slots=True)
class GateUp:
    """The two halves of a gated feed-forward layer, interleaved so that a block holds both factors of its products."""

    gate: Tensor
    up: Tensor

    @property
    def num_columns(self) -> int:
        return self.gate.shape[0]

    @property
    def num_rows(self) -> int:
        return self.num_blocks * BLOCK  # padding lies between gate and up

    @property
    def num_blocks(self) -> int:
        return -(-self.num_columns // HALF_BLOCK)

    @property
    def num_inputs(self) -> int:
        return self.gate.shape[-1]

    def blocks(self, start: int, stop: int) -> Floats:
        rows = slice(start * HALF_BLOCK, min(stop * HALF_BLOCK, self.num_columns))
        return interleave_gate_up(self.gate.rows(rows.start, rows.stop), self.up.rows(rows.start, rows.stop))

"""Carry weights from a checkpoint into the graph: read, quantize and pack a few blocks at a time, write in order.

Apart from the schemes (what a packed block is) and the decoder (which layers there are). Memory holds the pieces in
flight.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from model_store.graph import Graph, Value
from model_store.matrices import Matrix
from model_store.packing import BLOCK
from model_store.quantization import Packed, Packing, Scheme

PIECE_ELEMENTS = 1 << 19  # of float32: 2 MiB, so that the passes over a piece stay in the cache
Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A linear layer's weight in the graph."""

    parts: tuple[Value, ...]  # in the order of Packing.parts
    num_inputs: int
    num_columns: int  # logical outputs
    num_blocks: int


class WeightPacker:
    """Writes one model's weights. A context manager: it owns threads."""

    def __init__(self, graph: Graph, scheme: Scheme, num_matrices: int, progress: Progress) -> None:
        self._graph = graph
        self._scheme = scheme
        self._num_matrices = num_matrices
        self._num_packed = 0
        self._progress = progress
        self._num_threads = min(8, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(self._num_threads, "pack")

    def __enter__(self) -> WeightPacker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def matrix(self, name: str, matrix: Matrix) -> PackedMatrix:
        """Pack the weight [N, K] of a layer."""
        return self._pack(name, matrix, self._scheme.layers)

    def table(self, name: str, matrix: Matrix) -> PackedMatrix:
        """Pack the embedding or the output layer."""
        return self._pack(name, matrix, self._scheme.tables)

    def vector(self, name: str, vector: NDArray[np.generic]) -> Value:
        """A small tensor as it is."""
        return self._graph.constant(name, vector)

    def _pack(self, name: str, matrix: Matrix, packing: Packing) -> PackedMatrix:
        """The largest part is written as it comes; the others (scales, sums), one a column, after it."""
        if packing.finish is not None:
            return self._pack_whole(name, matrix, packing, packing.finish)
        pieces = self._packed_pieces(matrix, packing)
        first = next(pieces)
        rest: list[Packed] = [first[1:]]

        def largest() -> Iterator[NDArray[np.generic]]:
            yield first[0]
            for piece in pieces:
                rest.append(piece[1:])
                yield piece[0]

        count = matrix.num_rows if packing.is_row_major else matrix.num_blocks
        shape = (count, *first[0].shape[1:])
        parts = [self._graph.weight(f"{name}.{packing.parts[0]}", first[0].dtype.name, shape, largest())]
        for part, arrays in zip(packing.parts[1:], zip(*rest, strict=True), strict=True):
            whole = np.concatenate(arrays)
            parts.append(self._graph.weight(f"{name}.{part}", whole.dtype.name, whole.shape, [whole]))
        return PackedMatrix(tuple(parts), matrix.num_inputs, matrix.num_columns, matrix.num_blocks)

    def _pack_whole(
        self, name: str, matrix: Matrix, packing: Packing, finish: Callable[[Packed], Packed]
    ) -> PackedMatrix:
        """For layouts that need all rows at once: memory holds the matrix."""
        wholes = finish(tuple(map(np.concatenate, zip(*self._packed_pieces(matrix, packing), strict=True))))
        parts = tuple(
            self._graph.weight(f"{name}.{part}", whole.dtype.name, whole.shape, [whole])
            for part, whole in zip(packing.parts, wholes, strict=True)
        )
        return PackedMatrix(parts, matrix.num_inputs, matrix.num_columns, matrix.num_blocks)

    def _packed_pieces(self, matrix: Matrix, packing: Packing) -> Iterator[Packed]:
        """The matrix packed, piece after piece; as many pieces are under way as keep the threads busy."""
        step = max(1, PIECE_ELEMENTS // (BLOCK * matrix.num_inputs))

        def pack(start: int) -> Packed:
            rows = matrix.blocks(start, min(start + step, matrix.num_blocks))
            return packing.pack(rows[: matrix.num_rows - start * BLOCK] if packing.is_row_major else rows)

        pending: deque[Future[Packed]] = deque()
        for start in range(0, matrix.num_blocks, step):
            pending.append(self._threads.submit(pack, start))
            if len(pending) > 2 * self._num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
        self._num_packed += 1
        self._progress("packing", self._num_packed, self._num_matrices)

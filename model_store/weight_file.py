"""weights.bin: tensors one after another, aligned so that they can be used where they lie in a mapped file.

Apart from graph.py because it knows bytes and no ONNX. Tensors arrive in pieces and leave at once: memory holds a
piece. The SHA-256 is taken while writing, so that no byte is read twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from model_store.manifest import FileEntry

PAGE_BYTES = 4096  # large tensors begin on a page: a mapping needs no copy
LINE_BYTES = 64  # small ones on a cache line: aligned vector loads
LARGE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Span:
    """Where a tensor lies in the file."""

    offset: int
    num_bytes: int


class WeightFile:
    """Append-only writer of one weights.bin."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._digest = hashlib.sha256()
        self._num_bytes = 0

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, num_bytes: int, pieces: Iterable[NDArray[np.generic]]) -> Span:
        """Write a tensor of `num_bytes` piece by piece. Raises ValueError if the pieces have another size (a bug)."""
        alignment = PAGE_BYTES if num_bytes >= LARGE_BYTES else LINE_BYTES
        self._write(b"\0" * (-self._num_bytes % alignment))
        start = self._num_bytes
        for piece in pieces:
            self._write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        if self._num_bytes - start != num_bytes:
            raise ValueError(f"a tensor of {num_bytes} bytes got {self._num_bytes - start}; this is a bug")
        return Span(start, num_bytes)

    def entry(self) -> FileEntry:
        """Digest and size of what was written so far."""
        return FileEntry(self._digest.hexdigest(), self._num_bytes)

    def _write(self, raw: bytes | memoryview) -> None:
        self._file.write(raw)
        self._digest.update(raw)
        self._num_bytes += len(raw)

"""How a weight becomes what a kernel multiplies by: one row of the table for each scheme.

A scheme packs the rows of a few blocks at a time; each output column is quantized on its own, so the pieces can be
packed in any order and on any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from model_store.packing import pack_float, pack_int8

Floats = NDArray[np.float32]
Packed = tuple[NDArray[np.generic], ...]  # every part's first axis is blocks, or columns in blocks

# Clipping a column's largest weights buys the others a finer grid. Ratios of the largest magnitude that are tried.
CLIP_RATIOS: Final = (0.95, 0.9, 0.85, 0.8, 0.7)


@dataclass(frozen=True, slots=True)
class Scheme:
    """A way to store weights and the KV cache."""

    name: str
    pack: Callable[[Floats], Packed]  # rows [n * 64, K] of n whole blocks -> their packed tensors
    parts: tuple[str, ...]  # what the packed tensors are called
    kv_dtype: str  # numpy name
    parity_bound: float  # largest relative error of a row of logits that an import accepts


def quantize_rows(rows: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Symmetric int8 per row: codes [N, K] in -127..127 and scales [N] with rows ~ codes * scale.

    The scale is that of the clipping ratio with the least squared error. A ratio is tried only on rows where it could
    win: clipping alone costs (1 - ratio)^2 * amax^2 at the largest weight, which must be under the error without
    clipping.
    """
    peak = np.abs(rows).max(axis=1, initial=0.0)
    codes, scales, errors = _round(rows, peak)
    for ratio in CLIP_RATIOS:
        could_win = np.flatnonzero(((1 - ratio) * peak) ** 2 < errors)
        if not could_win.size:
            break  # smaller ratios cost more still
        tried, tried_scales, tried_errors = _round(rows[could_win], peak[could_win] * np.float32(ratio))
        is_better = tried_errors < errors[could_win]
        won = could_win[is_better]
        codes[won], scales[won], errors[won] = tried[is_better], tried_scales[is_better], tried_errors[is_better]
    return codes, scales


def _round(rows: Floats, limit: Floats) -> tuple[NDArray[np.int8], Floats, Floats]:
    """Codes, scales and squared errors with the grid -limit..limit. A row of zeros has scale 0."""
    scales = limit / np.float32(127)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > np.finfo(np.float32).tiny)
    scales = np.where(inverse > 0, scales, np.float32(0))
    grid = rows * inverse[:, None]
    np.rint(grid, out=grid)
    np.clip(grid, -127, 127, out=grid)
    codes = grid.astype(np.int8)
    grid *= scales[:, None]
    grid -= rows
    return codes, scales, np.einsum("nk,nk->n", grid, grid)


def _pack_fp32(rows: Floats) -> Packed:
    return (pack_float(rows),)


def _pack_w8a8(rows: Floats) -> Packed:
    codes, scales = quantize_rows(rows)
    return pack_int8(codes), scales, codes.sum(axis=1, dtype=np.int32)


SCHEMES: Mapping[str, Scheme] = {
    "fp32": Scheme("fp32", _pack_fp32, ("weight",), kv_dtype="float32", parity_bound=1e-4),
    "w8a8": Scheme("w8a8", _pack_w8a8, ("weight", "scale", "colsum"), kv_dtype="float16", parity_bound=0.25),
}

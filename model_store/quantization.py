"""How a weight becomes what a kernel multiplies by: a packing for each kind of kernel, a scheme for each choice.

A packing takes the rows of a few blocks at a time; each output column is quantized on its own, so the pieces can be
packed in any order and on any thread. Which schemes a target has stands in targets.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import ml_dtypes  # noqa: F401 (teaches numpy the name bfloat16)
import numpy as np
from numpy.typing import NDArray

from model_store.packing import pack_float, pack_int8

Floats = NDArray[np.float32]
Packed = tuple[NDArray[np.generic], ...]  # every part's first axis is blocks, or columns (in blocks, or row by row)

# Clipping a column's largest weights buys the others a finer grid. Ratios of the largest magnitude that are tried.
CLIP_RATIOS: Final = (0.95, 0.9, 0.85, 0.8, 0.7)


@dataclass(frozen=True, slots=True)
class Packing:
    """How the rows of a matrix lie in the artifact."""

    parts: tuple[str, ...]  # what the packed tensors are called
    pack: Callable[[Floats], Packed]  # rows [n * 64, K] of n whole blocks -> their packed tensors
    is_row_major: bool = False  # one row of every part for each row of the matrix, no padding
    # What becomes of the parts of a whole matrix; None: they are written as they come, and memory holds a few blocks.
    finish: Callable[[Packed], Packed] | None = None


@dataclass(frozen=True, slots=True)
class Scheme:
    """A way to store weights and the KV cache, and to compute with them."""

    name: str
    layers: Packing
    tables: Packing  # of the embedding and the output layer
    activations: str  # numpy name of what linear layers and attention read and write
    kv_dtype: str  # numpy name
    parity_bound: float  # largest relative error of a row of logits that an import accepts
    needs_calibration: bool = False  # ranges of activations or of the KV cache are measured on text


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


def quantize_groups(rows: Floats, bits: int, group: int) -> tuple[NDArray[np.uint8], Floats]:
    """Symmetric codes per group of `group` inputs: rows ~ (codes - 2^(bits-1)) * scale.

    codes uint8 [N, G, group] with G = ceil(K / group), the padding being zero weights; scales float32 [N, G]. The grid
    is -2^(bits-1) .. 2^(bits-1) - 1: the largest magnitude of a group falls on the side that has one step more. As in
    quantize_rows, the clipping ratio with the least squared error wins.
    """
    count, inputs = rows.shape
    groups = -(-inputs // group)
    padded = np.zeros((count, groups * group), np.float32)
    padded[:, :inputs] = rows
    blocks = padded.reshape(count * groups, group)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)[:, 0]
    codes, scales, errors = _round_groups(blocks, extreme, bits)
    for ratio in CLIP_RATIOS:
        tried, tried_scales, tried_errors = _round_groups(blocks, extreme * np.float32(ratio), bits)
        won = tried_errors < errors
        codes[won], scales[won], errors[won] = tried[won], tried_scales[won], tried_errors[won]
    return codes.reshape(count, groups, group), scales.reshape(count, groups)


def _round_groups(blocks: Floats, extreme: Floats, bits: int) -> tuple[NDArray[np.uint8], Floats, Floats]:
    """Codes, scales and squared errors of each group with its `extreme` on the last step of the grid."""
    low = -(1 << (bits - 1))
    scales = (extreme / np.float32(low)).astype(np.float32)
    is_used = np.abs(scales) > np.finfo(np.float32).tiny
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=is_used)
    scales = np.where(is_used, scales, np.float32(0))
    grid = blocks * inverse[:, None]
    np.rint(grid, out=grid)
    np.clip(grid, low, -low - 1, out=grid)
    codes = (grid - low).astype(np.uint8)
    grid *= scales[:, None]
    grid -= blocks
    return codes, scales, np.einsum("nk,nk->n", grid, grid)


def float_packing(dtype: str) -> Packing:
    """Weights as they are, [N, K] of a 16-bit float type (numpy name)."""
    round_to = round_to_bfloat16 if dtype == "bfloat16" else lambda rows: rows.astype(dtype)
    return Packing(("weight",), lambda rows: (round_to(rows),), is_row_major=True)


def round_to_bfloat16(values: Floats) -> NDArray[np.generic]:
    """Finite float32 to the nearest bfloat16, ties to even: in integers, several times faster than numpy's cast."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return (rounded >> np.uint32(16)).astype(np.uint16).view(np.dtype("bfloat16"))


def nbits_packing(bits: int, group: int, dtype: str) -> Packing:
    """Weights as com.microsoft:MatMulNBits reads them: uint8 [N, G, group * bits / 8] and scales [N, G] of `dtype`.

    The first of two 4-bit codes lies in the lower half of a byte. Code 2^(bits - 1) is zero, the operator's default.
    """

    def pack(rows: Floats) -> Packed:
        codes, scales = quantize_groups(rows, bits, group)
        packed = codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4)) if bits == 4 else codes
        return np.ascontiguousarray(packed), scales.astype(dtype)

    return Packing(("weight", "scale"), pack, is_row_major=True)


def _pack_w8a8(rows: Floats) -> Packed:
    codes, scales = quantize_rows(rows)
    return pack_int8(codes), scales, codes.sum(axis=1, dtype=np.int32)


BLOCKED_FP32: Final = Packing(("weight",), lambda rows: (pack_float(rows),))
BLOCKED_W8A8: Final = Packing(("weight", "scale", "colsum"), _pack_w8a8)

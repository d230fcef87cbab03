"""Weights as TensorRT's matrix products take them: [K, N], K inputs and N outputs, before DequantizeLinear.

The layout is what NVIDIA's own exporters feed MatMul with; that they lie along N needs whole matrices in memory, one
at a time. Scales are float16 and positive, as TensorRT demands, and codes are chosen for the scale as it is stored, so
that rounding it costs nothing. Ranges of codes: int8 -127..127, int4 -8..7, E4M3 to 448 ("Quantization Schemes" in
TensorRT's documentation).
"""

from __future__ import annotations

from typing import Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from model_store.quantization import CLIP_RATIOS, Packed, Packing, quantize_rows

Floats = NDArray[np.float32]
Halfs = NDArray[np.float16]

LEAST_SCALE: Final = float(np.finfo(np.float16).smallest_subnormal)
LARGEST_FP8: Final = 448.0
ROWS_AT_ONCE: Final = 1024


def stored_scale(scales: NDArray[np.floating]) -> Halfs:
    """Scales as float16, none of them zero."""
    return np.asarray(np.maximum(scales, LEAST_SCALE), np.float16)


def _transposed(parts: Packed) -> Packed:
    return tuple(np.ascontiguousarray(part.T) for part in parts)


def _pack_int8(rows: Floats) -> Packed:
    _, wanted = quantize_rows(rows)
    scales = stored_scale(wanted)
    codes = np.clip(np.rint(rows / scales.astype(np.float32)[:, None]), -127, 127)
    return codes.astype(np.int8), scales


def int8_packing() -> Packing:
    """int8 [K, N] and a scale for each output [N]."""
    return Packing(("weight", "scale"), _pack_int8, is_row_major=True, finish=_transposed)


def int4_packing(block: int) -> Packing:
    """int4 [K, N] and scales [K / block, N], one for `block` inputs of an output. K is a multiple of `block`."""

    def pack(rows: Floats) -> Packed:
        codes, scales = quantize_blocks(rows.reshape(-1, block))
        return codes.reshape(rows.shape).astype(ml_dtypes.int4), scales.reshape(len(rows), -1)

    return Packing(("weight", "scale"), pack, is_row_major=True, finish=_transposed)


def quantize_blocks(blocks: Floats) -> tuple[NDArray[np.int8], Halfs]:
    """int4 codes [n, block] and scales [n]; of several clipping ratios the one with the least squared error."""
    peak = np.abs(blocks).max(axis=1, initial=0.0)
    codes, scales, errors = _round_blocks(blocks, peak)
    for ratio in CLIP_RATIOS:
        tried, tried_scales, tried_errors = _round_blocks(blocks, peak * np.float32(ratio))
        won = tried_errors < errors
        codes[won], scales[won], errors[won] = tried[won], tried_scales[won], tried_errors[won]
    return codes, scales


def _round_blocks(blocks: Floats, limit: Floats) -> tuple[NDArray[np.int8], Halfs, Floats]:
    """Codes, scales and squared errors of each block with `limit` on the step 7."""
    scales = stored_scale(limit / np.float32(7))
    step = scales.astype(np.float32)[:, None]
    codes = np.clip(np.rint(blocks / step), -8, 7)
    wrong = codes * step - blocks
    return codes.astype(np.int8), scales, np.einsum("nk,nk->n", wrong, wrong)


def fp8_packing() -> Packing:
    """E4M3 [K, N] and one scale for the matrix: what the tensor cores' products of two such matrices take."""
    return Packing(("weight", "scale"), lambda rows: (rows,), is_row_major=True, finish=_finish_fp8)


def _finish_fp8(parts: Packed) -> Packed:
    (rows,) = parts
    peak = max(float(np.abs(rows[start : start + ROWS_AT_ONCE]).max()) for start in range(0, len(rows), ROWS_AT_ONCE))
    scale = stored_scale(np.array(peak / LARGEST_FP8, np.float32))
    codes = np.empty(rows.shape[::-1], ml_dtypes.float8_e4m3fn)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[start : start + ROWS_AT_ONCE] / scale.astype(np.float32)
        codes[:, start : start + len(some)] = np.clip(some, -LARGEST_FP8, LARGEST_FP8).T.astype(codes.dtype)
    return codes, scale

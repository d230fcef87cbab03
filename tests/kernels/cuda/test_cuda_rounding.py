"""float32 becomes the 16-bit type bit for bit as IEEE says: to nearest, ties to even, NaN stays NaN."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from tests.kernels.cuda.emulation import launch
from tests.kernels.cuda.test_cuda_linear import DTYPES, NOTHING


@pytest.mark.parametrize("dtype", DTYPES)
def test_floats_are_rounded_to_nearest_and_ties_to_even(dtype: str) -> None:
    kind = DTYPES[dtype]
    exact = np.arange(65536, dtype=np.uint16).view(kind).astype(np.float32)
    exact = np.sort(exact[np.isfinite(exact)])
    between = (exact[1:].astype(np.float64) + exact[:-1]) / 2  # the ties, most of which float32 holds
    ties = between.astype(np.float32)
    special = np.array(
        [0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 65520, 65519.996, 1e-45, -1e-45], np.float32
    )
    around = (np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf)))
    x = np.concatenate([exact, ties, *around, special])
    x = np.concatenate([x, np.zeros(-len(x) % 8, np.float32)])[None, :]
    y = np.zeros(x.shape, kind)
    launch("millrace_norm_rows", 1, 256, x, NOTHING, y, ctypes.c_int(x.shape[1]), ctypes.c_float(0), dtype=dtype)
    with np.errstate(over="ignore"):
        expected = x.astype(kind)
    is_nan = np.isnan(x)
    assert is_nan.any()
    np.testing.assert_array_equal(np.isnan(y.astype(np.float32)), is_nan)
    np.testing.assert_array_equal(y.view(np.uint16)[~is_nan], expected.view(np.uint16)[~is_nan])

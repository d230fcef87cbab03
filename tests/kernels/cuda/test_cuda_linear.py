"""The GPU's linear layers against float64: the fused kernel for few rows, and the small ones around cuBLAS."""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.cuda.emulation import launch

DTYPES: dict[str, type[Any]] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
EPSILON = 1e-5
ROUNDING = {"bfloat16": 2**-8, "float16": 2**-11}
NOTHING = ctypes.c_void_p(None)
WARPS = 2  # of a block


def silu(x: NDArray[np.float64]) -> NDArray[np.float64]:
    y: NDArray[np.float64] = x / (1 + np.exp(-x))
    return y


def normed(x: NDArray[Any], norm: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = x.astype(np.float64)
    y: NDArray[np.float64] = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + EPSILON) * norm
    return y


class Layer:
    """One random layer and its exact answer."""

    def __init__(
        self, rows: int, inputs: int, outputs: int, dtype: str, *, gated: bool, norm: bool, bias: bool, residual: bool
    ) -> None:
        random = np.random.default_rng([rows, inputs, outputs])
        columns = 2 * outputs if gated else outputs
        kind = DTYPES[dtype]
        self.weight = (random.standard_normal((columns, inputs)) / np.sqrt(inputs)).astype(kind)
        self.x = random.standard_normal((rows, inputs)).astype(np.float32 if norm else kind)
        self.norm = (1 + 0.1 * random.standard_normal(inputs)).astype(np.float32) if norm else None
        self.bias = random.standard_normal(columns).astype(np.float32) if bias else None
        self.residual = random.standard_normal((rows, outputs)).astype(np.float32) if residual else None
        wide = self.x.astype(np.float64) if self.norm is None else normed(self.x, self.norm)
        y = wide @ self.weight.astype(np.float64).T + (0 if self.bias is None else self.bias)
        y = silu(y[:, :outputs]) * y[:, outputs:] if gated else y
        self.expected = y + (0 if self.residual is None else self.residual)


def pointer(array: NDArray[Any] | None) -> NDArray[Any] | ctypes.c_void_p:
    return NOTHING if array is None else array


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "form"), [(1, "1"), (1, "1_wide"), (1, "2"), (2, "2"), (2, "2_wide")])
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 4), (72, 7), (2056, 9)])
@pytest.mark.parametrize(
    "parts",
    [
        {"gated": False, "norm": True, "bias": True, "residual": False},
        {"gated": False, "norm": False, "bias": False, "residual": True},
        {"gated": True, "norm": True, "bias": True, "residual": False},
    ],
    ids=["norm, bias", "residual", "gated"],
)
def test_the_fused_kernel_computes_the_whole_layer(
    dtype: str, rows: int, form: str, inputs: int, outputs: int, parts: dict[str, bool]
) -> None:
    layer = Layer(rows, inputs, outputs, dtype, **parts)
    owned = (8 if "wide" in form else 4) // (2 if parts["gated"] else 1)
    is_f32 = parts["residual"]  # what a residual is added to stays float32
    y = np.full((rows, outputs), 99, np.float32 if is_f32 else DTYPES[dtype])
    guard = y.copy()
    launch(
        f"millrace_gemv_{form}",
        -(-outputs // owned),
        32 * WARPS,
        layer.x,
        ctypes.c_int(layer.x.dtype == np.float32),
        layer.weight,
        *(pointer(each) for each in (layer.bias, layer.norm, layer.residual)),
        *((NOTHING, y) if is_f32 else (y, NOTHING)),
        *(ctypes.c_int(each) for each in (rows, outputs, inputs)),
        ctypes.c_float(EPSILON),
        ctypes.c_int(parts["gated"]),
        dtype=dtype,
    )
    assert (y != guard).any(axis=1).all()
    tolerance = 1e-5 if is_f32 else ROUNDING[dtype]
    np.testing.assert_allclose(y.astype(np.float64), layer.expected, rtol=tolerance, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norm", [True, False])
def test_rows_are_normalized_and_rounded(dtype: str, has_norm: bool) -> None:
    random = np.random.default_rng(3)
    inputs = 8 * 70  # more than the block reads at once
    x = random.standard_normal((3, inputs)).astype(np.float32)
    norm = random.standard_normal(inputs).astype(np.float32)
    y = np.zeros((3, inputs), DTYPES[dtype])
    arguments = (x, norm if has_norm else NOTHING, y, ctypes.c_int(inputs), ctypes.c_float(EPSILON))
    launch("millrace_norm_rows", 3, 64, *arguments, dtype=dtype)
    expected = normed(x, norm) if has_norm else x
    np.testing.assert_allclose(y.astype(np.float64), expected, rtol=ROUNDING[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs", [16, 9])
@pytest.mark.parametrize("has_bias", [True, False])
def test_gate_and_up_become_one(dtype: str, outputs: int, has_bias: bool) -> None:
    random = np.random.default_rng(4)
    both = random.standard_normal((5, 2 * outputs)).astype(DTYPES[dtype])
    bias = random.standard_normal(2 * outputs).astype(np.float32)
    y = np.zeros((5, outputs), DTYPES[dtype])
    blocks = -(-5 * outputs // (8 if outputs % 8 == 0 else 1) // 32) + 1
    arguments = (both, bias if has_bias else NOTHING, y, ctypes.c_int(5), ctypes.c_int(outputs))
    launch("millrace_silu_mul", blocks, 32, *arguments, dtype=dtype)
    wide = both.astype(np.float64) + (bias if has_bias else 0)
    expected = silu(wide[:, :outputs]) * wide[:, outputs:]
    np.testing.assert_allclose(y.astype(np.float64), expected, rtol=ROUNDING[dtype], atol=1e-6)


def test_residual_and_bias_are_where_a_product_is_added() -> None:
    random = np.random.default_rng(5)
    residual, bias = (random.standard_normal(shape).astype(np.float32) for shape in ((3, 7), 7))
    for has_residual, has_bias in ((True, True), (True, False), (False, True)):
        y = np.zeros((3, 7), np.float32)
        given = (residual if has_residual else NOTHING, bias if has_bias else NOTHING)
        launch("millrace_residual_bias", 1, 32, *given, y, ctypes.c_int(3), ctypes.c_int(7))
        np.testing.assert_array_equal(y, np.where(has_residual, residual, 0) + np.where(has_bias, bias, 0))


def test_a_bias_is_added_in_sixteen_bits() -> None:
    random = np.random.default_rng(6)
    y = random.standard_normal((3, 7)).astype(ml_dtypes.bfloat16)
    bias = random.standard_normal(7).astype(np.float32)
    expected = (y.astype(np.float32) + bias).astype(ml_dtypes.bfloat16)
    launch("millrace_add_bias", 1, 32, y, bias, ctypes.c_int(3), ctypes.c_int(7))
    np.testing.assert_array_equal(y, expected)

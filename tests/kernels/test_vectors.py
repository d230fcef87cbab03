"""The vector arithmetic under all kernels: right, and the same bits in every form."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import IntEnum

import numpy as np
import pytest
from numpy.typing import NDArray

from kernels.loader import isa_available, load
from tests.kernels.attention_case import form
from tests.kernels.linear_case import Floats, fused, sum_lanes

COUNT = 1 << 16


class Function(IntEnum):
    """The functions of probe.c."""

    EXP = 0
    LOG = 1
    TANH = 2
    SIGMOID = 3
    SILU = 4
    ROUND = 5
    FMA = 6
    SUM_LANES = 7
    MAX_LANES = 8
    HALF = 9


def probe(function: Function, a: Floats, b: Floats | None = None, c: Floats | None = None) -> Floats:
    """The function's results; asserts that all forms agree on every bit (NaN all alike)."""
    results = []
    for name in isa_available():
        out = np.empty_like(a)
        operands = [(array if array is not None else a).ctypes.data for array in (a, b, c)]
        with form(name):
            load().millrace_probe(
                ctypes.c_uint32(function), *map(ctypes.c_void_p, [*operands, out.ctypes.data]), ctypes.c_size_t(len(a))
            )
        results.append(out)
    for other in results[1:]:
        same = (other.view(np.uint32) == results[0].view(np.uint32)) | (np.isnan(other) & np.isnan(results[0]))
        assert same.all(), f"{function.name}({a[~same][:3]}) = {results[0][~same][:3]} and {other[~same][:3]}"
    return results[0]


def any_bits(seed: int) -> Floats:
    """Every kind of float: normal, subnormal, infinite, NaN."""
    return np.random.default_rng(seed).integers(0, 2**32, COUNT, dtype=np.uint32).view(np.float32)


def sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 / (1 + e^-x)."""
    return 1 / (1 + np.exp(-x))


# function, exact, range of arguments, largest relative error in units of 2^-24
ACCURACY: list[tuple[Function, Callable[[NDArray[np.float64]], NDArray[np.float64]], tuple[float, float], float]] = [
    (Function.EXP, np.exp, (-87, 87), 2),
    (Function.LOG, np.log, (1e-30, 1e-3), 2),
    (Function.LOG, np.log, (0.01, 100), 2),
    (Function.TANH, np.tanh, (-10, 10), 4),
    (Function.TANH, np.tanh, (-0.01, 0.01), 4),
    (Function.SIGMOID, sigmoid, (-80, 80), 4),
    (Function.SILU, lambda x: x * sigmoid(x), (-80, 80), 4),
]


@pytest.mark.parametrize(("function", "exact", "span", "bound"), ACCURACY)
def test_approximations_are_within_a_few_units_in_the_last_place(
    function: Function,
    exact: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    span: tuple[float, float],
    bound: float,
) -> None:
    x = np.random.default_rng(0).uniform(*span, COUNT).astype(np.float32)
    right = exact(x.astype(np.float64))
    error = np.abs(probe(function, x) - right) / np.abs(right)
    assert error.max() <= bound * 2.0**-24


@pytest.mark.parametrize("function", list(Function))
def test_forms_agree_on_every_kind_of_number(function: Function) -> None:
    if function is Function.ROUND:  # defined below 2^22 only
        probe(function, np.random.default_rng(3).uniform(-(2**22), 2**22, COUNT).astype(np.float32))
    else:
        probe(function, any_bits(0), any_bits(1), any_bits(2))


def test_edges_of_the_approximations() -> None:
    x = np.array([0, -0.0, np.inf, -np.inf, np.nan, 100, -100, 1, *[0] * 8], np.float32)
    top = 6.0760302e37  # e^87
    np.testing.assert_allclose(probe(Function.EXP, x)[:8], [1, 1, top, 0, np.nan, top, 0, 2.7182818], rtol=1e-6)
    np.testing.assert_allclose(probe(Function.TANH, x)[:8], [0, -0.0, 1, -1, np.nan, 1, -1, 0.76159416], rtol=1e-6)
    logs = probe(Function.LOG, x)[:8]
    np.testing.assert_allclose(logs, [-np.inf, -np.inf, np.inf, np.nan, np.nan, 4.6051702, np.nan, 0], rtol=1e-6)
    np.testing.assert_allclose(probe(Function.SIGMOID, x)[:7], [0.5, 0.5, 1, 0, np.nan, 1, 0], rtol=1e-6, atol=1e-30)


def cases_that_round_twice() -> tuple[Floats, Floats, Floats]:
    """Products in the middle between two floats, and addends so small that a sum in double loses them."""
    rng = np.random.default_rng(4)
    a = rng.integers(1 << 10, 1 << 11, COUNT) * 2 + 1
    b = rng.integers(1 << 11, 1 << 12, COUNT) * 2 + 1
    c = rng.choice([-(2.0**-33), 2.0**-33], COUNT)
    return a.astype(np.float32), b.astype(np.float32), c.astype(np.float32)


def test_a_fused_multiply_add_rounds_once() -> None:
    a, b, c = cases_that_round_twice()
    twice = (a.astype(np.float64) * b + c).astype(np.float32)
    once = fused(a, b, c)
    assert (twice != once).any(), "these cases would not tell the two apart"
    np.testing.assert_array_equal(probe(Function.FMA, a, b, c), once)


def test_fused_multiply_adds_that_cancel_or_underflow_agree() -> None:
    rng = np.random.default_rng(5)
    a, b = (rng.standard_normal(COUNT, dtype=np.float32) for _ in range(2))
    c = (-a.astype(np.float64) * b * (1 + rng.integers(-3, 4, COUNT) * 2.0**-24)).astype(np.float32)
    np.testing.assert_array_equal(probe(Function.FMA, a, b, c), fused(a, b, c))
    tiny_a, tiny_b, tiny_c = np.ldexp(a, -75), np.ldexp(b, -75), np.ldexp(c, -149)
    np.testing.assert_array_equal(probe(Function.FMA, tiny_a, tiny_b, tiny_c), fused(tiny_a, tiny_b, tiny_c))


def test_sums_of_lanes_follow_the_tree() -> None:
    x = np.random.default_rng(6).standard_normal(COUNT, dtype=np.float32)
    np.testing.assert_array_equal(probe(Function.SUM_LANES, x), np.repeat(sum_lanes(x.reshape(-1, 16)), 16))
    np.testing.assert_array_equal(probe(Function.MAX_LANES, x), np.repeat(x.reshape(-1, 16).max(axis=1), 16))


def test_half_precision_rounds_to_even_and_saturates() -> None:
    rng = np.random.default_rng(7)
    x = (rng.standard_normal(COUNT) * np.exp2(rng.integers(-30, 18, COUNT))).astype(np.float32)
    np.testing.assert_array_equal(
        probe(Function.HALF, x), np.clip(x, -65504, 65504).astype(np.float16).astype(np.float32)
    )
    every_half = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = np.isfinite(every_half)
    np.testing.assert_array_equal(probe(Function.HALF, every_half)[finite], every_half[finite])
    np.testing.assert_array_equal(np.isnan(probe(Function.HALF, every_half)), np.isnan(every_half))

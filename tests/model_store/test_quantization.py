"""Schemes: what is stored multiplies like the weight it came from."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from model_store.packing import unpack_float, unpack_int8
from model_store.quantization import SCHEMES, Scheme, quantize_rows

Floats = NDArray[np.float32]
ROWS = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 40)),
    elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
)


def squared_error(rows: Floats, codes: NDArray[np.int8], scales: Floats) -> NDArray[np.float64]:
    restored = codes.astype(np.float64) * scales[:, None]
    errors: NDArray[np.float64] = np.square(restored - rows).sum(axis=1)
    return errors


@settings(deadline=None)  # a busy machine is no failure
@given(ROWS)
def test_no_row_is_worse_than_plain_rounding_to_127_steps(rows: Floats) -> None:
    codes, scales = quantize_rows(rows)
    step = np.abs(rows).max(axis=1).astype(np.float64) / 127
    assert np.abs(codes.astype(np.int32)).max() <= 127
    assert (squared_error(rows, codes, scales) <= rows.shape[1] * (step / 2) ** 2 * 1.001 + 1e-12).all()


@settings(deadline=None)  # a busy machine is no failure
@given(ROWS, st.integers(-8, 8))
def test_scaling_a_row_by_a_power_of_two_scales_only_its_scale(rows: Floats, power: int) -> None:
    factor = np.float32(2.0**power)
    codes, scales = quantize_rows(rows)
    scaled_codes, scaled_scales = quantize_rows(rows * factor)
    is_normal = np.abs(rows).max(axis=1) > 1e-20  # where 2^power neither under- nor overflows
    np.testing.assert_array_equal(codes[is_normal], scaled_codes[is_normal])
    np.testing.assert_allclose(scales[is_normal] * factor, scaled_scales[is_normal], rtol=1e-6)


def test_an_outlier_is_clipped_when_that_costs_less_than_a_coarser_grid() -> None:
    random = np.random.default_rng(0)
    rows = random.standard_normal((1, 16384)).astype(np.float32)
    rows[0, 0] = 6.0
    codes, scales = quantize_rows(rows)
    plain_scale = np.abs(rows).max(axis=1) / np.float32(127)
    plain = np.rint(rows / plain_scale[:, None]).astype(np.int8)
    assert scales[0] < plain_scale[0]
    assert codes[0, 0] == 127
    assert squared_error(rows, codes, scales)[0] < squared_error(rows, plain, plain_scale)[0]


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-39])
def test_a_row_of_nothing_becomes_zeros_and_no_infinity(value: float) -> None:
    codes, scales = quantize_rows(np.full((2, 8), value, np.float32))
    assert not codes.any()
    assert not scales.any()


def test_fp32_stores_the_weight_itself() -> None:
    rows = np.random.default_rng(1).standard_normal((128, 24)).astype(np.float32)
    (weight,) = SCHEMES["fp32"].pack(rows)
    np.testing.assert_array_equal(unpack_float(weight.view(np.float32), 128), rows)


def test_w8a8_stores_codes_scales_and_the_sums_of_the_codes() -> None:
    rows = np.random.default_rng(1).standard_normal((128, 26)).astype(np.float32)
    weight, scales, sums = SCHEMES["w8a8"].pack(rows)
    codes = unpack_int8(weight.view(np.int8), 128, 26)
    np.testing.assert_array_equal(sums, codes.sum(axis=1, dtype=np.int32))
    steps = scales.view(np.float32)
    np.testing.assert_allclose(codes * steps[:, None], rows, atol=float(steps.max()) * 0.51)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
def test_packing_in_pieces_gives_the_same_bytes_as_packing_at_once(scheme: Scheme) -> None:
    rows = np.random.default_rng(2).standard_normal((256, 20)).astype(np.float32)
    whole = scheme.pack(rows)
    halves = zip(scheme.pack(rows[:128]), scheme.pack(rows[128:]), strict=True)
    for part, pieces in zip(whole, halves, strict=True):
        np.testing.assert_array_equal(part, np.concatenate(pieces))
    assert len(whole) == len(scheme.parts)

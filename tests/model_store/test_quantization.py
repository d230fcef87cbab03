"""Packings: what is stored multiplies like the weight it came from."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from model_store.packing import unpack_float, unpack_int8
from model_store.quantization import (
    BLOCKED_FP32,
    BLOCKED_W8A8,
    Packing,
    float_packing,
    nbits_packing,
    quantize_groups,
    quantize_rows,
    round_to_bfloat16,
)
from model_store.targets import TARGETS

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
    (weight,) = BLOCKED_FP32.pack(rows)
    np.testing.assert_array_equal(unpack_float(weight.view(np.float32), 128), rows)


def test_w8a8_stores_codes_scales_and_the_sums_of_the_codes() -> None:
    rows = np.random.default_rng(1).standard_normal((128, 26)).astype(np.float32)
    weight, scales, sums = BLOCKED_W8A8.pack(rows)
    codes = unpack_int8(weight.view(np.int8), 128, 26)
    np.testing.assert_array_equal(sums, codes.sum(axis=1, dtype=np.int32))
    steps = scales.view(np.float32)
    np.testing.assert_allclose(codes * steps[:, None], rows, atol=float(steps.max()) * 0.51)


@settings(deadline=None)  # a busy machine is no failure
@given(ROWS, st.sampled_from([4, 8]), st.sampled_from([16, 32]))
def test_no_weight_of_a_group_is_off_by_more_than_half_a_step(rows: Floats, bits: int, group: int) -> None:
    codes, scales = quantize_groups(rows, bits, group)
    count, inputs = rows.shape
    groups = -(-inputs // group)
    assert codes.shape == (count, groups, group)
    assert scales.shape == (count, groups)
    assert codes.max() < 1 << bits
    steps = codes.astype(np.float64) - (1 << (bits - 1))
    errors = (steps * scales[..., None].astype(np.float64)).reshape(count, -1)[:, :inputs] - rows
    # What is not at an end of the grid is rounded to the nearest step.
    allowed = np.repeat(np.abs(scales.astype(np.float64)), group, axis=1)[:, :inputs]
    is_inside = ((codes > 0) & (codes < (1 << bits) - 1)).reshape(count, -1)[:, :inputs]
    assert (np.abs(errors)[is_inside] <= allowed[is_inside] * 0.501 + 1e-30).all()


@settings(deadline=None)  # a busy machine is no failure
@given(ROWS, st.sampled_from([4, 8]))
def test_no_group_is_worse_than_its_largest_weight_kept_exactly(rows: Floats, bits: int) -> None:
    codes, scales = quantize_groups(rows, bits, 64)  # one group
    zero = 1 << (bits - 1)
    padding = codes.reshape(len(rows), -1)[:, rows.shape[1] :]
    assert (padding == zero).all()
    steps = codes[:, 0, : rows.shape[1]].astype(np.float64) - zero
    errors = np.square(steps * scales.astype(np.float64) - rows).sum(axis=1)
    at = np.abs(rows).argmax(axis=1)[:, None]
    plain_scale = np.take_along_axis(rows, at, axis=1).astype(np.float64) / -zero
    is_used = plain_scale[:, 0] != 0
    plain = np.clip(np.rint(rows[is_used] / plain_scale[is_used]), -zero, zero - 1) * plain_scale[is_used]
    plain_errors = np.square(plain - rows[is_used]).sum(axis=1)
    assert (errors[is_used] <= plain_errors * (1 + 1e-5) + 1e-10 * np.square(rows[is_used]).sum(axis=1) + 1e-60).all()


def test_an_outlier_of_a_group_is_clipped_when_that_costs_less() -> None:
    random = np.random.default_rng(0)
    rows = random.standard_normal((1, 128)).astype(np.float32)
    rows[0, 0] = 5.0
    _, scales = quantize_groups(rows, 4, 128)
    assert abs(scales[0, 0]) < 5.0 / 8


def test_groups_do_not_touch_each_other() -> None:
    rows = np.random.default_rng(3).standard_normal((5, 96)).astype(np.float32)
    codes, scales = quantize_groups(rows, 4, 32)
    for number in range(3):
        alone, scale = quantize_groups(rows[:, 32 * number : 32 * (number + 1)], 4, 32)
        np.testing.assert_array_equal(codes[:, number], alone[:, 0])
        np.testing.assert_array_equal(scales[:, number], scale[:, 0])


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-39])
def test_a_group_of_nothing_becomes_zeros_and_no_infinity(value: float) -> None:
    codes, scales = quantize_groups(np.full((2, 40), value, np.float32), 4, 32)
    assert (codes == 8).all()
    assert not scales.any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (8, 128)])
def test_nbits_packing_stores_the_groups_codes_low_half_first(bits: int, group: int, dtype: str) -> None:
    rows = np.random.default_rng(1).standard_normal((6, 150)).astype(np.float32)
    packing = nbits_packing(bits, group, dtype)
    weight, stored = packing.pack(rows)
    codes, scales = quantize_groups(rows, bits, group)
    assert packing.parts == ("weight", "scale")
    assert (weight.dtype.name, stored.dtype.name) == ("uint8", dtype)
    np.testing.assert_array_equal(stored, scales.astype(dtype))
    groups = -(-150 // group)
    assert weight.shape == (6, groups, group * bits // 8)
    raw = weight.view(np.uint8)
    unpacked = np.stack([raw & 15, raw >> 4], axis=-1).reshape(6, groups, group) if bits == 4 else raw
    np.testing.assert_array_equal(unpacked, codes)


def test_every_bfloat16_and_every_value_between_two_rounds_as_ml_dtypes_rounds() -> None:
    """All 2^16 upper halves with the lower halves at which rounding changes its mind."""
    upper = np.arange(1 << 16, dtype=np.uint32)[:, None] << np.uint32(16)
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    values = (upper | lower).view(np.float32)
    values = values[np.isfinite(values)]
    expected = values.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(round_to_bfloat16(values).view(np.uint16), expected.view(np.uint16))


@settings(deadline=None)  # a busy machine is no failure
@given(
    arrays.arrays(np.float32, st.integers(0, 50), elements=st.floats(width=32, allow_nan=False, allow_infinity=False))
)
def test_rounding_to_bfloat16_is_ml_dtypes_own(values: Floats) -> None:
    for given_values in (values, values[::2]):  # also where they do not lie side by side
        expected = given_values.astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(round_to_bfloat16(given_values).view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float_packing_stores_the_nearest_values_row_by_row(dtype: str) -> None:
    rows = np.random.default_rng(1).standard_normal((70, 24)).astype(np.float32)
    packing = float_packing(dtype)
    (weight,) = packing.pack(rows)
    assert packing.is_row_major
    np.testing.assert_array_equal(weight, rows.astype(dtype))


PACKINGS = {
    f"{target}-{scheme}-{what}": packing
    for target, choices in TARGETS.items()
    for scheme, choice in choices.items()
    for what, packing in (("layers", choice.scheme.layers), ("tables", choice.scheme.tables))
}


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
def test_packing_in_pieces_gives_the_same_bytes_as_packing_at_once(packing: Packing) -> None:
    inputs = 20 if packing.finish is None else 128  # TensorRT's layers have multiples of something
    rows = np.random.default_rng(2).standard_normal((256, inputs)).astype(np.float32)
    whole = packing.pack(rows)
    halves = zip(packing.pack(rows[:128]), packing.pack(rows[128:]), strict=True)
    for part, pieces in zip(whole, halves, strict=True):
        np.testing.assert_array_equal(part, np.concatenate(pieces))
        assert not packing.is_row_major or len(part) == len(rows)
    assert len(whole if packing.finish is None else packing.finish(whole)) == len(packing.parts)

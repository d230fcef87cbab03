"""QLinear and Linear: what they compute, and that nothing but a row decides its bits. In every form, alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.loader import isa_available
from tests.kernels.attention_case import form, parallel
from tests.kernels.guarded import before_a_guard
from tests.kernels.linear_case import Floats, Layer, assert_is_expected, layers, random_layer, run_layer

FORMS = isa_available()
BOTH = pytest.mark.parametrize("quantized", [True, False], ids=["QLinear", "Linear"])
EXAMPLES = settings(max_examples=60, deadline=None)


def bits(values: Floats) -> np.ndarray[tuple[int, ...], np.dtype[np.uint32]]:
    """The bits of an array; all NaN alike."""
    return np.where(np.isnan(values), np.float32(np.nan), values).view(np.uint32)


def in_every_form(layer: Layer) -> list[Floats]:
    """The layer's output in each form of this processor."""
    outputs = []
    for name in FORMS:
        with form(name):
            outputs.append(run_layer(layer))
    return outputs


@EXAMPLES
@given(layer=layers(quantized=True))
def test_qlinear_computes_what_the_contract_says_in_every_form(layer: Layer) -> None:
    for y in in_every_form(layer):
        assert_is_expected(layer, y)


@EXAMPLES
@given(layer=layers(quantized=False, max_rows=20))
def test_linear_computes_what_the_contract_says_in_every_form(layer: Layer) -> None:
    for y in in_every_form(layer):
        assert_is_expected(layer, y)


@EXAMPLES
@given(layer=st.one_of(layers(quantized=True), layers(quantized=False)))
def test_all_forms_give_the_same_bits(layer: Layer) -> None:
    first, *others = in_every_form(layer)
    for other in others:
        np.testing.assert_array_equal(bits(first), bits(other))


@EXAMPLES
@given(layer=st.one_of(layers(quantized=True), layers(quantized=False)), data=st.data())
def test_a_row_has_the_same_bits_alone_and_in_any_batch(layer: Layer, data: st.DataObject) -> None:
    whole = run_layer(layer)
    start = data.draw(st.integers(0, len(layer.x) - 1))
    end = data.draw(st.integers(start + 1, len(layer.x)))
    np.testing.assert_array_equal(bits(run_layer(layer.rows(start, end))), bits(whole[start:end]))
    np.testing.assert_array_equal(bits(run_layer(layer.rows(start, start + 1))), bits(whole[start : start + 1]))


@BOTH
@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("rows", [1, 9, 40, 129])
def test_the_number_of_threads_changes_no_bit(quantized: bool, threads: int, rows: int) -> None:
    layer = random_layer(1, rows, 260, 700, quantized=quantized, extras="bias norm residual")
    np.testing.assert_array_equal(bits(run_layer(layer, parallel(threads))), bits(run_layer(layer)))


# rows x inputs x outputs, for each cut into tasks: many blocks, one block, many rows for few blocks, a wide input
SHAPES = [(64, 576, 960), (1, 4, 1), (200, 1536, 64), (3, 8192, 65)]


@BOTH
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forms_agree_on_the_shapes_of_models(quantized: bool, shape: tuple[int, int, int]) -> None:
    layer = random_layer(2, *shape, quantized=quantized, extras="bias norm residual")
    first, *others = in_every_form(layer)
    for other in others:
        np.testing.assert_array_equal(bits(first), bits(other))


def test_a_quantized_layer_is_close_to_the_layer_it_stands_for() -> None:
    layer = random_layer(3, 16, 512, 256, quantized=True)
    assert layer.scale is not None
    exact = layer.x.astype(np.float64) @ (layer.weight.astype(np.float64) * layer.scale[:, None]).T
    error = np.linalg.norm(run_layer(layer) - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert error.max() < 0.02


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_do_not_overflow(sign: int) -> None:
    """Every product at its largest, K at its limit: 127 * 127 * 65536 fits, and so must 255 * 127 * 65536 before."""
    layer = random_layer(4, 2, 65536, 64, quantized=True)
    layer = replace(layer, x=np.full_like(layer.x, 5), weight=np.full_like(layer.weight, 127 * sign))
    for y in in_every_form(layer):
        assert_is_expected(layer, y)


@BOTH
def test_a_row_of_zeros_gives_the_bias(quantized: bool) -> None:
    layer = random_layer(5, 3, 70, 90, quantized=quantized, extras="bias")
    layer.x[1] = 0
    for y in in_every_form(layer):
        np.testing.assert_array_equal(y[1], layer.bias)


@BOTH
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_broken_row_breaks_only_itself(quantized: bool, poison: float) -> None:
    layer = random_layer(6, 7, 70, 90, quantized=quantized, extras="norm")
    clean = run_layer(layer)
    layer.x[3, 50] = poison
    for y in in_every_form(layer):
        assert np.isnan(y[3]).all()
        np.testing.assert_array_equal(bits(np.delete(y, 3, axis=0)), bits(np.delete(clean, 3, axis=0)))


def test_numbers_too_small_to_scale_count_as_zero() -> None:
    layer = random_layer(7, 2, 40, 64, quantized=True)
    layer.x[:] = 1e-44
    for y in in_every_form(layer):
        np.testing.assert_array_equal(y, np.zeros_like(y))


@BOTH
@pytest.mark.parametrize("silu_mul", [False, True])
@pytest.mark.parametrize("rows", [1, 6, 13])
def test_nothing_outside_the_tensors_is_touched(quantized: bool, silu_mul: bool, rows: int) -> None:
    """Inputs and outputs end where memory ends: one element too far would be a fault."""
    layer = random_layer(8, rows, 37, 53, quantized=quantized, silu_mul=silu_mul, extras="bias norm residual")
    expected = run_layer(layer)
    for name in FORMS:
        with form(name):
            np.testing.assert_array_equal(bits(run_layer(layer, place=before_a_guard)), bits(expected))

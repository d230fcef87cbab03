"""QEmbed and Embed: rows out of the packed table of the output layer. In every form, without a runtime."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kernels.loader import isa_available, load
from model_store.packing import num_blocks, pack_float, pack_int8, pad_columns
from tests.kernels.attention_case import Parallel, form, parallel
from tests.kernels.guarded import before_a_guard
from tests.kernels.linear_case import Floats


class EmbedArguments(ctypes.Structure):
    """struct mr_embed and struct mr_qembed, which has `scale` at its end."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("ids", "y")),
        *((name, ctypes.c_size_t) for name in ("rows", "K", "N")),
        *((name, ctypes.c_void_p) for name in ("weight", "scale")),
    )


def run_embed(
    ids: NDArray[np.int64], table: NDArray[np.int8] | Floats, scale: Floats | None, loop: Parallel | None = None
) -> Floats:
    """Rows `ids` of `table` [N, K] through the kernels in use; every tensor ends where memory ends."""
    size, hidden = table.shape
    packed = pack_float(table.astype(np.float32)) if scale is None else pack_int8(table.astype(np.int8))
    tensors: dict[str, NDArray[np.generic]] = {"ids": before_a_guard(ids), "weight": before_a_guard(packed)}
    if scale is not None:
        tensors["scale"] = before_a_guard(pad_columns(scale, num_blocks(size)))
    tensors["y"] = y = before_a_guard(np.full((len(ids), hidden), np.nan, np.float32))
    arguments = EmbedArguments(rows=len(ids), K=hidden, N=size)
    for name, tensor in tensors.items():
        setattr(arguments, name, tensor.ctypes.data)
    function = load().millrace_embed if scale is None else load().millrace_qembed
    function(ctypes.byref(arguments), None if loop is None else ctypes.byref(loop))
    return y


@settings(max_examples=60, deadline=None)
@given(data=st.data(), size=st.integers(1, 200), hidden=st.integers(1, 100), rows=st.integers(1, 30))
@pytest.mark.parametrize("name", isa_available())
def test_rows_are_the_tables_times_their_scale(
    name: str, data: st.DataObject, size: int, hidden: int, rows: int
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    ids = rng.integers(0, size, rows)
    quantized = rng.integers(-127, 128, (size, hidden), dtype=np.int8)
    scale = rng.uniform(1e-4, 1e-2, size).astype(np.float32)
    table = rng.standard_normal((size, hidden), dtype=np.float32)
    with form(name):
        np.testing.assert_array_equal(run_embed(ids, quantized, scale), quantized[ids] * scale[ids, None])
        np.testing.assert_array_equal(run_embed(ids, table, None), table[ids])


def test_threads_share_the_rows() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 300, 50)
    quantized, scale = rng.integers(-127, 128, (300, 33), dtype=np.int8), rng.uniform(1, 2, 300).astype(np.float32)
    np.testing.assert_array_equal(run_embed(ids, quantized, scale, parallel(3)), quantized[ids] * scale[ids, None])

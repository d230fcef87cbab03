"""Linear layers for tests: random cases, the kernels behind ctypes, and what the layers mean in numpy.

The references repeat the kernels' float32 steps one by one (kernels/README.md), so that results can be compared bit by
bit; only SiLU, an approximation, gets a tolerance. A fused multiply-add is done in extended precision and rounded once
more, which differs from a true one about once in 2^40 times.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from kernels.loader import load
from model_store.packing import column_sums, num_blocks, pack_float, pack_int8, pad_columns, split_gate_up
from tests.kernels.attention_case import Parallel
from tests.kernels.guarded import Place, in_place

Floats = NDArray[np.float32]
ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Layer:
    """One linear layer and its input. With silu_mul the weight's rows are gate and up, interleaved and padded."""

    x: Floats  # [T, K]
    weight: NDArray[np.int8] | Floats  # [columns, K]
    outputs: int  # N
    scale: Floats | None = None  # [columns]; None: a float layer
    bias: Floats | None = None  # [columns]
    norm: Floats | None = None  # [K]
    residual: Floats | None = None  # [T, N]
    silu_mul: bool = False
    norm_epsilon: float = 1e-5

    def rows(self, start: int, end: int) -> Layer:
        """The same layer with rows [start, end) of its input."""
        residual = None if self.residual is None else self.residual[start:end].copy()
        return replace(self, x=self.x[start:end].copy(), residual=residual)


def random_layer(
    seed: int, rows: int, inputs: int, outputs: int, *, quantized: bool, silu_mul: bool = False, extras: str = ""
) -> Layer:
    """A layer of random numbers; `extras` names the optional inputs it has: bias, norm, residual."""
    rng = np.random.default_rng(seed)
    columns = 64 * -(-outputs // 32) if silu_mul else outputs

    def normal(*shape: int) -> Floats:
        return rng.standard_normal(shape, dtype=np.float32)

    return Layer(
        x=normal(rows, inputs) * np.exp(normal(rows, 1)),
        weight=rng.integers(-127, 128, (columns, inputs), dtype=np.int8) if quantized else normal(columns, inputs),
        outputs=outputs,
        scale=rng.uniform(1e-4, 1e-3, columns).astype(np.float32) if quantized else None,
        bias=normal(columns) if "bias" in extras else None,
        norm=rng.uniform(0.5, 1.5, inputs).astype(np.float32) if "norm" in extras else None,
        residual=normal(rows, outputs) if "residual" in extras else None,
        silu_mul=silu_mul,
    )


@st.composite
def layers(draw: st.DrawFn, quantized: bool, max_rows: int = 70) -> Layer:
    """Layers of any shape with any of the optional inputs."""
    return random_layer(
        seed=draw(st.integers(0, 2**32)),
        rows=draw(st.integers(1, max_rows)),
        inputs=draw(st.integers(1, 300)),
        outputs=draw(st.integers(1, 200)),
        quantized=quantized,
        silu_mul=draw(st.booleans()),
        extras=" ".join(draw(st.lists(st.sampled_from(["bias", "norm", "residual"]), unique=True))),
    )


# ---- the kernels ----


class LinearArguments(ctypes.Structure):
    """struct mr_linear."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y")),
        *((name, ctypes.c_size_t) for name in ("rows", "K", "N")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "norm", "residual")),
        ("norm_epsilon", ctypes.c_float),
        ("activation", ctypes.c_int32),
        ("scratch", ctypes.c_void_p),
    )


class QLinearArguments(ctypes.Structure):
    """struct mr_qlinear."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y")),
        *((name, ctypes.c_size_t) for name in ("rows", "K", "N")),
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "colsum", "bias", "norm", "residual")),
        ("norm_epsilon", ctypes.c_float),
        ("activation", ctypes.c_int32),
        ("scratch", ctypes.c_void_p),
    )


def aligned_bytes(size: int) -> NDArray[np.uint8]:
    """`size` bytes of garbage at a multiple of 64."""
    block = np.full(size + ALIGNMENT, 0xA5, np.uint8)
    start = -block.ctypes.data % ALIGNMENT
    return block[start : start + size]


def packed(layer: Layer) -> dict[str, NDArray[np.generic]]:
    """The layer's constant tensors as the operators take them."""
    blocks = num_blocks(len(layer.weight))
    tensors: dict[str, NDArray[np.generic]] = {}
    if layer.scale is None:
        tensors["weight"] = pack_float(layer.weight.astype(np.float32))
    else:
        weight = pack_int8(layer.weight.astype(np.int8))
        tensors |= {"weight": weight, "scale": pad_columns(layer.scale, blocks), "colsum": column_sums(weight)}
    if layer.bias is not None:
        tensors["bias"] = pad_columns(layer.bias, blocks)
    if layer.norm is not None:
        tensors["norm"] = layer.norm
    return tensors


def run_layer(layer: Layer, parallel: Parallel | None = None, place: Place = in_place) -> Floats:
    """The layer through the kernels in use, its tensors put in `place`; without `parallel` on the calling thread."""
    library = load()
    rows, inputs = layer.x.shape
    name = "linear" if layer.scale is None else "qlinear"
    scratch_bytes = getattr(library, f"millrace_{name}_scratch_bytes")
    scratch_bytes.argtypes, scratch_bytes.restype = [ctypes.c_size_t, ctypes.c_size_t], ctypes.c_size_t
    y = place(np.full((rows, layer.outputs), np.nan, np.float32))
    tensors = {name: place(tensor) for name, tensor in {"x": layer.x, **packed(layer)}.items()}
    if layer.residual is not None:
        tensors["residual"] = place(layer.residual)
    tensors |= {"y": y, "scratch": aligned_bytes(scratch_bytes(rows, inputs))}
    arguments = (LinearArguments if layer.scale is None else QLinearArguments)(
        rows=rows, K=inputs, N=layer.outputs, norm_epsilon=layer.norm_epsilon, activation=int(layer.silu_mul)
    )
    for field, tensor in tensors.items():
        setattr(arguments, field, tensor.ctypes.data)
    getattr(library, f"millrace_{name}")(ctypes.byref(arguments), None if parallel is None else ctypes.byref(parallel))
    return y


# ---- what they mean ----


def fused(a: Floats, b: Floats, c: Floats) -> Floats:
    """a * b + c, rounded once."""
    exact: NDArray[np.longdouble] = a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(np.longdouble)
    return exact.astype(np.float32)


def sum_lanes(lanes: Floats) -> Floats:
    """[..., 16] -> [...]: lanes i and i + 8, then i + 4, i + 2, i + 1."""
    for half in (8, 4, 2, 1):
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes.reshape(lanes.shape[:-1])


def rms_norm(x: Floats, weight: Floats, epsilon: float) -> Floats:
    """x / rms(x) * weight, with the kernel's four sums of 16 lanes in turn."""
    rows, inputs = x.shape
    padded = np.zeros((rows, -(-inputs // 64) * 64), np.float32)
    padded[:, :inputs] = x
    chunks = padded.reshape(rows, -1, 4, 16)
    sums = np.zeros((rows, 4, 16), np.float32)
    for chunk in range(chunks.shape[1]):
        sums = fused(chunks[:, chunk], chunks[:, chunk], sums)
    total = sum_lanes((sums[:, 0] + sums[:, 1]) + (sums[:, 2] + sums[:, 3]))
    inverse_rms = np.float32(1) / np.sqrt(total / np.float32(inputs) + np.float32(epsilon))
    normalized: Floats = x * inverse_rms[:, None] * weight
    return normalized


def quantize_rows(x: Floats) -> tuple[NDArray[np.int64], Floats]:
    """(q [T, K], s [T]) with x about q * s, |q| <= 127, rounded half to even."""
    scale = np.abs(x).max(axis=1) / np.float32(127)
    usable = scale >= np.finfo(np.float32).tiny
    inverse = np.where(usable, np.float32(1) / np.where(usable, scale, np.float32(1)), np.float32(0))
    return np.rint(x * inverse[:, None]).astype(np.int64), scale


def expected(layer: Layer) -> Floats:
    """The layer's output up to and with the bias, and after it where there is no SiLU: exactly the kernel's bits."""
    sums = sums_with_bias(layer)
    if layer.silu_mul:
        gate, up = (half.T.astype(np.float64) for half in split_gate_up(np.ascontiguousarray(sums.T), layer.outputs))
        sums = (gate / (1 + np.exp(np.minimum(-gate, 700))) * up).astype(np.float32)
    return sums if layer.residual is None else sums + layer.residual


def sums_with_bias(layer: Layer) -> Floats:
    """x W^T (+ bias) [T, columns]."""
    x = layer.x if layer.norm is None else rms_norm(layer.x, layer.norm, layer.norm_epsilon)
    if layer.scale is None:
        sums = np.zeros((len(x), len(layer.weight)), np.float32)
        for k in range(x.shape[1]):
            sums = fused(x[:, k, None], layer.weight[None, :, k].astype(np.float32), sums)
    else:
        q, row_scale = quantize_rows(x)
        exact = q @ layer.weight.T.astype(np.int64)
        sums = exact.astype(np.float32) * layer.scale * row_scale[:, None]
    return sums if layer.bias is None else sums + layer.bias


def assert_is_expected(layer: Layer, y: Floats) -> None:
    """Bit for bit without SiLU; with it within 1e-6 of the size of the numbers that were added."""
    if not layer.silu_mul:
        np.testing.assert_array_equal(y, expected(layer))
        return
    product = expected(replace(layer, residual=None))
    size = np.abs(product) + (0 if layer.residual is None else np.abs(layer.residual))
    assert (np.abs(y - expected(layer)) <= 1e-6 * size + 1e-30).all()

"""What the operators of the CUDA target mean, in NumPy: a graph for the GPU can then be run, and proved, without one.

Operators for onnx.reference's evaluator. Values of 16 bits stay in their own dtype between nodes, so rounding happens
where the device rounds; sums are float32 as in its kernels. What an operator refuses on the device it refuses here.

Sources: the schemas of ONNX Runtime 1.31 (get_all_operator_schema) and, for rounding and refusals, its CUDA provider
(paged_attention.cc, paged_attention_impl.cu, paged_attention_helper.h, matmul_nbits.cc); ours are kernels/cuda.
Attention itself is in cuda_attention.py.
"""

from __future__ import annotations

from typing import Any, ClassVar

import ml_dtypes
import numpy as np
from onnx.reference.op_run import OpRun

from tests.model_store.cuda_arithmetic import Array, require, rms_norm, row_by_row, silu, widened
from tests.model_store.cuda_attention import Attention, attend

ALIGNMENT = 8  # elements of a row that our linear layers read at once


class _Linear(OpRun):
    """millrace:LinearBf16 and LinearF16: activation(rms_norm(x) @ weight^T + bias) + residual, rounded once."""

    op_domain = "millrace"
    DTYPE: ClassVar[np.dtype[np.generic]]

    def run(self, *inputs: Array | None, **context: Any) -> tuple[Array | None, ...]:
        """As the base class, with None before the output: the evaluator reads missing inputs from the unnamed one."""
        (y,) = super().run(*inputs, **context)  # type: ignore[no-untyped-call]
        return (*[None] * _connected_output(self.output), y)

    def _run(
        self,
        x: Array,
        weight: Array,
        bias: Array | None = None,
        norm: Array | None = None,
        residual: Array | None = None,
        *,
        norm_epsilon: float,
        activation: str,
    ) -> tuple[Array]:
        is_float = _connected_output(self.output) == 1
        self._check(x, weight, bias, norm, residual, gated=activation == "silu_mul", is_float=is_float)
        rows = x if norm is None else rms_norm(x, norm_epsilon) * norm
        y = row_by_row(widened(rows.astype(self.DTYPE)), widened(weight))
        if bias is not None:
            y = y + bias
        if activation == "silu_mul":
            gate, up = np.split(y, 2, axis=1)
            y = silu(gate) * up
        if residual is not None:
            y = y + residual
        return (y.astype(np.float32 if is_float else self.DTYPE),)

    def _check(
        self,
        x: Array,
        weight: Array,
        bias: Array | None,
        norm: Array | None,
        residual: Array | None,
        *,
        gated: bool,
        is_float: bool,
    ) -> None:
        """As linear_op.c does. Raises Refused."""
        (num_rows, inputs), (columns, weight_inputs) = x.shape, weight.shape
        require(inputs == weight_inputs and inputs % ALIGNMENT == 0, f"K is {inputs}, the weight's {weight_inputs}")
        require(weight.dtype == self.DTYPE, f"the weight is {weight.dtype}")
        require(x.dtype in (np.float32, self.DTYPE), f"x is {x.dtype}")
        require(not gated or columns % 2 == 0, f"the weight has {columns} rows: gate and up are not alike")
        expected = {
            "bias": (bias, (columns,)),
            "norm": (norm, (inputs,)),
            "residual": (residual, (num_rows, columns // 2 if gated else columns)),
        }
        for name, (given, shape) in expected.items():
            if given is not None:
                require(given.dtype == np.float32 and given.shape == shape, f"{name} is {given.dtype}{given.shape}")
        require(norm is None or x.dtype == np.float32, "a norm reads float32 only")
        require(residual is None or is_float, "a residual is added in float32 only")
        require(not gated or not is_float, "silu_mul gives 16 bits only")


class LinearBf16(_Linear):
    DTYPE = np.dtype(ml_dtypes.bfloat16)


class LinearF16(_Linear):
    DTYPE = np.dtype(np.float16)


class MatMulNBits(OpRun):
    """com.microsoft:MatMulNBits with the default zero point: A @ ((codes - 2^(bits-1)) * scales)^T + bias.

    Weights are rounded to A's dtype before they are multiplied, products before the bias is added.
    """

    op_domain = "com.microsoft"

    def _run(
        self,
        a: Array,
        b: Array,
        scales: Array,
        zero_points: Array | None = None,
        g_idx: Array | None = None,
        bias: Array | None = None,
        *,
        K: int,  # noqa: N803 (the schema's name)
        N: int,  # noqa: N803
        bits: int,
        block_size: int,
    ) -> tuple[Array]:
        require(zero_points is None and g_idx is None, "zero points and groups that we never write")
        require(bits in (4, 8), f"bits is {bits}")
        groups = -(-K // block_size)
        require(a.ndim == 2 and a.shape[1] == K, f"A is {a.shape}")
        require(b.dtype == np.uint8 and b.shape == (N, groups, block_size * bits // 8), f"B is {b.dtype}{b.shape}")
        require(scales.dtype == a.dtype and scales.shape == (N, groups), f"scales are {scales.dtype}{scales.shape}")
        codes = b if bits == 8 else np.stack([b & 15, b >> 4], axis=-1).reshape(N, groups, block_size)
        steps = codes.astype(np.float32) - np.float32(1 << (bits - 1))
        weight = (steps * widened(scales)[:, :, None]).reshape(N, -1)[:, :K].astype(a.dtype)
        y = row_by_row(widened(a), widened(weight)).astype(a.dtype)
        if bias is None:
            return (y,)
        require(bias.dtype == a.dtype and bias.shape == (N,), f"bias is {bias.dtype}{bias.shape}")
        return ((widened(y) + widened(bias)).astype(a.dtype),)


class QuickGelu(OpRun):
    """com.microsoft:QuickGelu: x * sigmoid(alpha * x)."""

    op_domain = "com.microsoft"

    def _run(self, x: Array, *, alpha: float) -> tuple[Array]:
        return (silu(widened(x), alpha).astype(x.dtype),)


class SimplifiedLayerNormalization(OpRun):
    """RMSNorm over the last axis; rounded before and after the multiplication by `scale`."""

    op_domain = ""

    def _run(self, x: Array, scale: Array, *, axis: int, epsilon: float, stash_type: int) -> tuple[Array]:
        require(axis in (-1, x.ndim - 1) and stash_type == 1, f"axis {axis}, stash_type {stash_type}")
        require(scale.dtype == x.dtype and scale.shape == x.shape[-1:], f"scale is {scale.dtype}{scale.shape}")
        normed = rms_norm(widened(x), epsilon).astype(x.dtype)
        return ((widened(normed) * widened(scale)).astype(x.dtype),)


class PagedAttention(OpRun):
    """com.microsoft:PagedAttention; the caches it is given are written in place."""

    op_domain = "com.microsoft"

    def _run(
        self,
        query: Array,
        key: Array | None,
        value: Array | None,
        key_cache: Array,
        value_cache: Array,
        cumulative_sequence_length: Array,
        past_seqlens: Array,
        block_table: Array,
        cos_cache: Array,
        sin_cache: Array,
        slot_mapping: Array,
        head_sink: Array | None,
        q_norm_weight: Array | None,
        k_norm_weight: Array | None,
        k_scale: Array | None,
        v_scale: Array | None,
        attention_metadata: Array,
        **attributes: Any,
    ) -> tuple[Array]:
        require(key is None and value is None and head_sink is None, "inputs that we never connect")
        return (
            attend(
                Attention(**attributes),
                query,
                caches=(key_cache, value_cache),
                cu_seqlens=cumulative_sequence_length,
                past_lens=past_seqlens,
                block_table=block_table,
                rotation=(cos_cache, sin_cache),
                slot_mapping=slot_mapping,
                head_norms=(q_norm_weight, k_norm_weight),
                scales=(k_scale, v_scale),
                metadata=attention_metadata,
            ),
        )


def _connected_output(names: Any) -> int:
    """The number of the one output that has a name. Raises Refused."""
    connected = [slot for slot, name in enumerate(names) if name]
    require(len(connected) == 1 and connected[0] < 2, f"exactly one of two outputs must be connected, not {connected}")
    return connected[0]


OPERATORS: list[type[OpRun]] = [
    LinearBf16,
    LinearF16,
    MatMulNBits,
    PagedAttention,
    QuickGelu,
    SimplifiedLayerNormalization,
]

"""The decoder for ONNX Runtime's TensorRT provider: dense layers as standard nodes between the CUDA target's attention.

Embedding, attention and output layer are those of cuda_nodes.py; what lies between is Q/DQ and MatMul, of which
TensorRT makes one engine for each stretch (tensorrt_seams.py). Types are meant as they are written: without precision
flags the provider builds strongly typed networks, so norms and the residual stream are float32 and nothing overflows.

Everything else is float16, not bfloat16: every TensorRT since 8 has int8, int4 and fp8 products that end in it, it
rounds eight times finer, and ONNX Runtime's CPU kernels know it, so the dense parts can be run without a GPU. Import
measures logits and refuses a model whose activations do not fit.

A weight's nodes are written before those of the activations it meets: a graph is divided in the order of its nodes, and
weights that came first of all would be carried from engine to engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from model_store.calibration import Calibration
from model_store.cuda_nodes import CudaNodes
from model_store.graph import STANDARD, Graph, GraphError, Value
from model_store.matrices import Matrix
from model_store.nodes import Linear, StepInputs
from model_store.quantization import Scheme
from model_store.rope import Rope
from model_store.spec import DecoderSpec
from model_store.tensorrt_packing import LARGEST_FP8, stored_scale
from model_store.tensorrt_seams import JOINT
from model_store.weight_packer import PackedMatrix, WeightPacker
from wire.errors import BadRequest

DTYPE: Final = "float16"
LARGEST_INT8: Final = 127.0
ALIGNMENT: Final = 16  # bytes that 8-bit tensor cores read at once of a row


class TensorRtNodes(CudaNodes, ABC):
    """Writes for one scheme. A subclass says what weights and activations become before they are multiplied."""

    def __init__(self, scheme: Scheme, calibration: Calibration | None = None, *, multiple: int = ALIGNMENT) -> None:
        """`multiple`: of how many inputs a layer can have."""
        if scheme.activations != DTYPE:
            raise GraphError(f"{scheme.name} has activations of {scheme.activations}: this is a bug")
        super().__init__(scheme, calibration)
        self._scheme = scheme.name
        self._multiple = multiple

    def bias(self, weights: WeightPacker, name: str, bias: Matrix) -> Value:
        return weights.vector(name, bias.blocks(0, bias.num_blocks)[: bias.num_rows].astype(DTYPE))

    def begin(self, graph: Graph, spec: DecoderSpec, weights: WeightPacker, rope: Rope) -> StepInputs:
        sizes = (  # what layers have as inputs; qkv is an output only
            ("hidden_size", spec.hidden_size, self._multiple),
            ("intermediate_size", spec.intermediate_size, self._multiple),
            ("num_heads * head_dim", spec.q_size, self._multiple),
            ("(num_heads + 2 * num_kv_heads) * head_dim", spec.qkv_size, ALIGNMENT),
        )
        for name, size, multiple in sizes:
            if size % multiple:
                raise BadRequest(
                    f"{name} is {size}; scheme {self._scheme} takes multiples of {multiple}", param="scheme"
                )
        graph.join_names_with(JOINT)
        return super().begin(graph, spec, weights, rope)

    def attention(self, graph: Graph, address: str, qkv: Value, *, layer: int, head_norms: Sequence[Value]) -> Value:
        attended = super().attention(graph, address, qkv, layer=layer, head_norms=head_norms)
        graph.declare(attended)  # TensorRT must know the shapes of what it does not compute
        return attended

    def linear(self, graph: Graph, address: str, x: Value, layer: Linear) -> Value:
        matrix = layer.matrix
        weight = self._weight(graph, address, matrix)
        if layer.norm is not None:
            x = self._normed(graph, address, x, layer.norm, layer.norm_epsilon)
        x.expect(DTYPE, x.shape[0], matrix.num_inputs)
        x = self._activations(graph, address, x)
        y = self._apply(graph, "MatMul", f"{address}/matmul", x, weight, width=matrix.num_columns)
        if layer.bias is not None:
            y = self._apply(graph, "Add", f"{address}/bias", y, layer.bias.expect(DTYPE, matrix.num_columns))
        if layer.activation == "silu_mul":
            gate, up = graph.halves(f"{address}/halves", y)
            sigmoid = self._apply(graph, "Sigmoid", f"{address}/sigmoid", gate)
            y = self._apply(graph, "Mul", f"{address}/silu", gate, sigmoid)
            y = self._apply(graph, "Mul", f"{address}/mul", y, up)
        if layer.residual is not None:
            y = self._cast(graph, f"{address}/float", y, "float32")
            y = self._apply(graph, "Add", f"{address}/add", layer.residual.expect("float32", *y.shape), y)
        return y

    @abstractmethod
    def _weight(self, graph: Graph, address: str, matrix: PackedMatrix) -> Value:
        """The matrix [K, N] in float16."""

    def _activations(self, graph: Graph, address: str, x: Value) -> Value:
        """What meets the matrix of the layer at `address`: x [T, K], as it is or rounded."""
        return x

    def _normed(self, graph: Graph, address: str, x: Value, gains: Value, epsilon: float) -> Value:
        """RMSNorm in float32, rounded once: x [T, K] -> float16."""
        x.expect("float32", *x.shape)
        gains.expect("float32", *x.shape[1:])
        squares = self._apply(graph, "Mul", f"{address}/norm/squares", x, x)
        last = graph.constant(f"{address}/norm/axes", np.array([-1], np.int64))
        mean = self._apply(graph, "ReduceMean", f"{address}/norm/mean", squares, last, width=1)
        least = graph.constant(f"{address}/norm/epsilon", np.array([[epsilon]], np.float32))
        mean = self._apply(graph, "Add", f"{address}/norm/above_zero", mean, least)
        root = self._apply(graph, "Sqrt", f"{address}/norm/root", mean)
        normed = self._apply(graph, "Div", f"{address}/norm/divided", x, root)
        normed = self._apply(graph, "Mul", f"{address}/norm/gained", normed, gains)
        return self._cast(graph, f"{address}/norm/rounded", normed, DTYPE)

    def _apply(self, graph: Graph, op_type: str, address: str, *inputs: Value, width: int | None = None) -> Value:
        """A standard node whose output is like its first input, of `width` columns."""
        rows, columns = inputs[0].shape
        return graph.node(op_type, address, inputs, inputs[0].dtype, rows, width or columns, domain=STANDARD)

    def _dequantized(
        self, graph: Graph, address: str, matrix: PackedMatrix, *, axis: int = 1, block_size: int = 0
    ) -> Value:
        """A matrix [K, N] of codes and its scales: one, one for each index of `axis`, or for blocks of them."""
        return graph.node(
            "DequantizeLinear",
            f"{address}/weight",
            matrix.parts,
            DTYPE,
            matrix.num_inputs,
            matrix.num_columns,
            domain=STANDARD,
            axis=axis,
            block_size=block_size,
        )

    def _quantized(
        self, graph: Graph, address: str, x: Value, limit: float, zero: NDArray[np.generic], largest: float
    ) -> Value:
        """`x` on the grid of `zero`'s dtype, whose `largest` code is worth `limit`."""
        scale = graph.constant(f"{address}/scale", stored_scale(np.array(limit / largest, np.float32)))
        origin = graph.constant(f"{address}/zero", zero)
        inputs = (x, scale, origin)
        codes = graph.node("QuantizeLinear", f"{address}/quantize", inputs, zero.dtype.name, *x.shape, domain=STANDARD)
        inputs = (codes, scale, origin)
        return graph.node("DequantizeLinear", f"{address}/dequantize", inputs, DTYPE, *x.shape, domain=STANDARD)

    def _range(self, address: str, measured: Callable[[Calibration, str], float]) -> float:
        """What calibration measured of the activation that enters the layer at `address`."""
        if self._calibration is None:
            raise GraphError(f"{address} needs calibration: this is a bug")
        return measured(self._calibration, address.strip("/").replace("/", "."))


class TensorRtInt8Nodes(TensorRtNodes):
    """int8 by int8: activations with one scale, clipped where entropy says; weights with a scale for each output."""

    def _weight(self, graph: Graph, address: str, matrix: PackedMatrix) -> Value:
        return self._dequantized(graph, address, matrix)  # axis 1: the outputs

    def _activations(self, graph: Graph, address: str, x: Value) -> Value:
        limit = self._range(address, Calibration.threshold)
        return self._quantized(graph, f"{address}/x", x, limit, np.array(0, np.int8), LARGEST_INT8)


class TensorRtFp8Nodes(TensorRtNodes):
    """E4M3 by E4M3, one scale each: the peak of what was measured is the largest code."""

    def _weight(self, graph: Graph, address: str, matrix: PackedMatrix) -> Value:
        return self._dequantized(graph, address, matrix)

    def _activations(self, graph: Graph, address: str, x: Value) -> Value:
        limit = self._range(address, Calibration.peak)
        return self._quantized(graph, f"{address}/x", x, limit, np.array(0, ml_dtypes.float8_e4m3fn), LARGEST_FP8)


class TensorRtInt4Nodes(TensorRtNodes):
    """int4 weights with a scale for each block of inputs; activations as they are."""

    def __init__(self, scheme: Scheme, calibration: Calibration | None = None, *, block: int) -> None:
        super().__init__(scheme, calibration, multiple=block)
        self._block = block

    def _weight(self, graph: Graph, address: str, matrix: PackedMatrix) -> Value:
        return self._dequantized(graph, address, matrix, axis=0, block_size=self._block)

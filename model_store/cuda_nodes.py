"""The decoder for ONNX Runtime's CUDA provider.

Attention is com.microsoft:PagedAttention with everything inside: packed QKV, q/k norm, rotation, the write to the
cache. Linear layers with 16-bit weights are our operator (kernels/cuda/README.md), so that a layer is five nodes as on
the CPU and the residual stream stays float32; weights of 4 or 8 bits are com.microsoft:MatMulNBits between standard
nodes. Sampling is no part of the graph: it runs on the same stream after it (services/backends/cuda.py).

Each layer's keys and values are inputs of their own, written in place. `attention_metadata` lies in host memory: with
it, attention copies nothing back from the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from model_store.calibration import Calibration
from model_store.graph import ELEMENT_TYPES, MICROSOFT, STANDARD, Graph, GraphError, Value
from model_store.manifest import KvCache
from model_store.matrices import Matrix, Stacked
from model_store.nodes import Linear, StepInputs
from model_store.quantization import Scheme
from model_store.rope import Rope
from model_store.spec import DecoderSpec
from model_store.tensors import Tensor
from model_store.weight_packer import PackedMatrix, WeightPacker
from wire.errors import BadRequest

ALIGNMENT: Final = 8  # elements of 16 bits that move as one: widths and halves of heads are multiples of it
LARGEST_CODE: Final = {"int8": 127.0, "float8_e4m3fn": 448.0}
# Text to come reaches further than the text that was measured, and what is beyond the range is cut off. Codes of int8
# grow coarser with the range; those of a float hardly do.
HEADROOM: Final = {"int8": 1.25, "float8_e4m3fn": 2.0}


def block_size(head_dim: int) -> int:
    """Tokens in a KV block: the least that FlashAttention's paged kernel takes.

    A tile of keys must not straddle a block; its height depends on the head dim (paged_attention.cc in ONNX Runtime
    1.31, `flash_min_block_size`).
    """
    return 256 if head_dim <= 64 else 128 if head_dim <= 128 else 64


@dataclass(frozen=True, slots=True)
class _Shared:
    """What every attention node of the graph reads."""

    spec: DecoderSpec
    step: StepInputs
    metadata: Value  # int32 [3], host memory
    cos: Value  # [max_model_len, D / 2]
    sin: Value
    caches: tuple[tuple[Value, Value], ...]  # keys and values of each layer
    scales: tuple[tuple[Value, Value] | tuple[()], ...]  # theirs, float32 [KV, 1, D], where the cache is quantized


class CudaNodes:
    """Writes for one scheme. `calibration` gives the ranges of keys and values where the cache is quantized."""

    LINEAR: ClassVar = {"bfloat16": "LinearBf16", "float16": "LinearF16"}

    def __init__(self, scheme: Scheme, calibration: Calibration | None = None) -> None:
        self._dtype = scheme.activations
        self._kv_dtype = scheme.kv_dtype
        self._calibration = calibration
        self._shared: _Shared | None = None

    def kv_cache(self, spec: DecoderSpec) -> KvCache:
        size = block_size(spec.head_dim)
        return KvCache(
            dtype=self._kv_dtype, block_size=size, block_shape=(size, spec.num_kv_heads, spec.head_dim), is_split=True
        )

    def gate_up(self, gate: Tensor, up: Tensor) -> Matrix:
        return Stacked((gate, up))

    def norm(self, weights: WeightPacker, name: str, tensor: Tensor) -> Value:
        return weights.vector(name, tensor.read())

    def head_norm(self, weights: WeightPacker, name: str, tensor: Tensor) -> Value:
        return weights.vector(name, tensor.read().astype(self._dtype))

    def bias(self, weights: WeightPacker, name: str, bias: Matrix) -> Value:
        return weights.vector(name, bias.blocks(0, bias.num_blocks)[: bias.num_rows])

    def begin(self, graph: Graph, spec: DecoderSpec, weights: WeightPacker, rope: Rope) -> StepInputs:
        _check_sizes(spec)
        step = StepInputs(
            input_ids=graph.input("input_ids", "int64", "T"),
            cu_seqlens=graph.input("cu_seqlens", "int32", "B_plus_1"),
            past_lens=graph.input("past_lens", "int32", "B"),
            block_table=graph.input("block_table", "int32", "B", "M"),
            slot_mapping=graph.input("slot_mapping", "int32", "T"),
            logits_rows=graph.input("logits_rows", "int32", "R"),
        )
        metadata = graph.input("attention_metadata", "int32", 3)
        cache = self.kv_cache(spec)
        caches = tuple(
            (
                graph.input(f"key_cache.{layer}", cache.dtype, "num_blocks", *cache.block_shape),
                graph.input(f"value_cache.{layer}", cache.dtype, "num_blocks", *cache.block_shape),
            )
            for layer in range(spec.num_layers)
        )
        cos, sin = (
            weights.vector(name, np.ascontiguousarray(half).astype(self._dtype))
            for name, half in zip(("cos", "sin"), np.split(rope.table(), 2, axis=1), strict=True)
        )
        scales = tuple(self._scales(weights, spec, layer) for layer in range(spec.num_layers))
        self._shared = _Shared(spec, step, metadata, cos, sin, caches, scales)
        return step

    def embed(self, graph: Graph, address: str, ids: Value, table: PackedMatrix) -> Value:
        shape = ("T", table.num_inputs)
        rows = graph.node("Gather", address, (table.parts[0], ids), self._dtype, *shape, domain=STANDARD, axis=0)
        return self._cast(graph, f"{address}/float", rows, "float32")

    def linear(self, graph: Graph, address: str, x: Value, layer: Linear) -> Value:
        is_stream = layer.residual is not None
        return self._fused(graph, address, x, layer, dtype="float32" if is_stream else self._dtype)

    def attention(self, graph: Graph, address: str, qkv: Value, *, layer: int, head_norms: Sequence[Value]) -> Value:
        shared = self._shared_inputs()
        spec, step = shared.spec, shared.step
        qkv.expect(self._dtype, "T", spec.qkv_size)
        for norm in head_norms:
            norm.expect(self._dtype, spec.head_dim)
        granularity = "PER_CHANNEL" if shared.scales[layer] else "NONE"
        return graph.node(
            "PagedAttention",
            address,
            (
                *(qkv, None, None, *shared.caches[layer]),
                *(step.cu_seqlens, step.past_lens, step.block_table),
                *(shared.cos, shared.sin, step.slot_mapping),
                None,  # head_sink
                *(head_norms or (None, None)),
                *(shared.scales[layer] or (None, None)),
                shared.metadata,
            ),
            self._dtype,
            "T",
            spec.q_size,
            domain=MICROSOFT,
            num_heads=spec.num_heads,
            kv_num_heads=spec.num_kv_heads,
            scale=spec.head_dim**-0.5,
            softcap=0.0,
            local_window_size=spec.windows[layer] or -1,
            do_rotary=1,
            rotary_interleaved=0,
            qk_norm_epsilon=spec.norm_epsilon,
            k_quant_type=granularity,
            v_quant_type=granularity,
        )

    def finish(self, graph: Graph, address: str, x: Value, layer: Linear) -> None:
        graph.output(self._fused(graph, address, x, layer, dtype="float32", output_name="logits"))

    def _fused(
        self, graph: Graph, address: str, x: Value, layer: Linear, *, dtype: str, output_name: str | None = None
    ) -> Value:
        """One node of our operator; it has an output for each type it can give."""
        matrix, gated = layer.matrix, layer.activation == "silu_mul"
        columns = matrix.num_columns // 2 if gated else matrix.num_columns
        x.expect("float32" if layer.norm is not None else self._dtype, x.shape[0], matrix.num_inputs)
        if layer.bias is not None:
            layer.bias.expect("float32", matrix.num_columns)
        if layer.residual is not None:
            layer.residual.expect("float32", x.shape[0], columns)
        return graph.node(
            self.LINEAR[self._dtype],
            address,
            (x, matrix.parts[0], layer.bias, layer.norm, layer.residual),
            dtype,
            x.shape[0],
            columns,
            output_name=output_name,
            slot=1 if dtype == "float32" else 0,
            norm_epsilon=layer.norm_epsilon,
            activation=layer.activation,
        )

    def _cast(self, graph: Graph, address: str, x: Value, dtype: str) -> Value:
        return graph.node("Cast", address, (x,), dtype, *x.shape, domain=STANDARD, to=ELEMENT_TYPES[dtype])

    def _scales(self, weights: WeightPacker, spec: DecoderSpec, layer: int) -> tuple[Value, Value] | tuple[()]:
        """What one step of a code is worth in each channel of keys and of values."""
        if self._kv_dtype not in LARGEST_CODE:
            return ()
        if self._calibration is None:
            raise GraphError(f"a cache of {self._kv_dtype} needs calibration: this is a bug")
        found = []
        for name in (f"layers.{layer}.k", f"layers.{layer}.v"):
            peaks = self._calibration.channel_peaks(name).reshape(spec.num_kv_heads, 1, spec.head_dim)
            scale = peaks * np.float32(HEADROOM[self._kv_dtype] / LARGEST_CODE[self._kv_dtype])
            scale = np.maximum(scale, np.float32(1e-30))  # a channel that was always zero
            found.append(weights.vector(f"{name}_scale", scale.astype(np.float32)))
        return found[0], found[1]

    def _shared_inputs(self) -> _Shared:
        if self._shared is None:
            raise GraphError("a layer before begin(): this is a bug")
        return self._shared


class CudaNBitsNodes(CudaNodes):
    """The same with layers of 4 or 8 bits: MatMulNBits, and the residual stream in 16 bits.

    Add and norm are written apart: ONNX Runtime's optimizer makes SkipSimplifiedLayerNormalization of them.
    """

    def __init__(self, scheme: Scheme, calibration: Calibration | None = None, *, bits: int, group: int) -> None:
        super().__init__(scheme, calibration)
        self._bits = bits
        self._group = group

    def norm(self, weights: WeightPacker, name: str, tensor: Tensor) -> Value:
        values = tensor.read()
        is_final = not name.startswith("layers.")  # the output layer is our operator, its norm float32
        return weights.vector(name, values if is_final else values.astype(self._dtype))

    def bias(self, weights: WeightPacker, name: str, bias: Matrix) -> Value:
        return weights.vector(name, bias.blocks(0, bias.num_blocks)[: bias.num_rows].astype(self._dtype))

    def embed(self, graph: Graph, address: str, ids: Value, table: PackedMatrix) -> Value:
        shape = ("T", table.num_inputs)
        return graph.node("Gather", address, (table.parts[0], ids), self._dtype, *shape, domain=STANDARD, axis=0)

    def linear(self, graph: Graph, address: str, x: Value, layer: Linear) -> Value:
        if layer.norm is not None:
            x = graph.node(
                "SimplifiedLayerNormalization",
                f"{address}/norm",
                (x, layer.norm.expect(self._dtype, layer.matrix.num_inputs)),
                self._dtype,
                *x.shape,
                domain=STANDARD,
                axis=-1,
                epsilon=layer.norm_epsilon,
                stash_type=1,
            )
        y = self._matmul(graph, address, x, layer)
        if layer.activation == "silu_mul":
            gate, up = graph.halves(f"{address}/halves", y)
            gate = graph.node(
                "QuickGelu", f"{address}/silu", (gate,), self._dtype, *gate.shape, domain=MICROSOFT, alpha=1.0
            )
            y = graph.node("Mul", f"{address}/mul", (gate, up), self._dtype, *gate.shape, domain=STANDARD)
        if layer.residual is not None:
            y = graph.node("Add", f"{address}/add", (layer.residual, y), self._dtype, *y.shape, domain=STANDARD)
        return y

    def finish(self, graph: Graph, address: str, x: Value, layer: Linear) -> None:
        super().finish(graph, address, self._cast(graph, f"{address}/float", x, "float32"), layer)

    def _matmul(self, graph: Graph, address: str, x: Value, layer: Linear) -> Value:
        matrix = layer.matrix
        x.expect(self._dtype, x.shape[0], matrix.num_inputs)
        if layer.bias is not None:
            layer.bias.expect(self._dtype, matrix.num_columns)
        return graph.node(
            "MatMulNBits",
            f"{address}/matmul",
            (x, *matrix.parts, None, None, layer.bias),
            self._dtype,
            x.shape[0],
            matrix.num_columns,
            domain=MICROSOFT,
            K=matrix.num_inputs,
            N=matrix.num_columns,
            bits=self._bits,
            block_size=self._group,
        )


def _check_sizes(spec: DecoderSpec) -> None:
    """Raises BadRequest for a shape that the CUDA operators do not take."""
    sizes = (
        ("head_dim", spec.head_dim, 2 * ALIGNMENT),  # PagedAttention moves each of the two halves that it rotates
        ("hidden_size", spec.hidden_size, ALIGNMENT),
        ("intermediate_size", spec.intermediate_size, ALIGNMENT),
    )
    for name, size, multiple in sizes:
        if size % multiple:
            raise BadRequest(f"{name} is {size}; the CUDA target takes multiples of {multiple}", param="target")
    if spec.head_dim > 256:
        raise BadRequest(f"head_dim is {spec.head_dim}; the CUDA target takes at most 256", param="target")

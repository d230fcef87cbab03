"""The decoder in our own operators of ONNX Runtime's CPU provider: kernels/README.md defines them.

Activations are float32; the KV cache is one input of the graph for all layers, written in place; sampling is part of
the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from model_store.graph import Graph, Value
from model_store.manifest import KvCache
from model_store.matrices import GateUp, Matrix
from model_store.nodes import Linear, StepInputs
from model_store.packing import BLOCK
from model_store.quantization import Scheme
from model_store.rope import Rope
from model_store.spec import DecoderSpec
from model_store.tensors import Tensor
from model_store.weight_packer import PackedMatrix, WeightPacker


@dataclass(frozen=True, slots=True)
class _LinearOps:
    """The operators that multiply by, and look up rows of, a scheme's packed weight."""

    linear: str
    embed: str
    embed_parts: int  # how many of the packed tensors the embedding reads


@dataclass(frozen=True, slots=True)
class _Shared:
    """What every attention node of the graph reads."""

    spec: DecoderSpec
    rows: tuple[Value, ...]
    kv_cache: Value  # [layers, 2, blocks, *block_shape]
    cos_sin: Value  # f32 [max_model_len, head_dim]


class CpuNodes:
    """Our own operators in ONNX Runtime's CPU provider."""

    OPS: ClassVar[Mapping[str, _LinearOps]] = {
        "fp32": _LinearOps("Linear", "Embed", embed_parts=1),
        "w8a8": _LinearOps("QLinear", "QEmbed", embed_parts=2),
    }
    BLOCK_SIZE: ClassVar[int] = 16  # tokens in a KV block: one vector of keys

    def __init__(self, scheme: Scheme) -> None:
        self._ops = self.OPS[scheme.name]
        self._kv_dtype = scheme.kv_dtype
        self._shared: _Shared | None = None
        self._sampling: tuple[Value, ...] = ()

    def kv_cache(self, spec: DecoderSpec) -> KvCache:
        padded_dim = -(-spec.head_dim // 16) * 16
        shape = (spec.num_kv_heads, self.BLOCK_SIZE * padded_dim)
        return KvCache(dtype=self._kv_dtype, block_size=self.BLOCK_SIZE, block_shape=shape)

    def gate_up(self, gate: Tensor, up: Tensor) -> Matrix:
        return GateUp(gate, up)

    def norm(self, weights: WeightPacker, name: str, tensor: Tensor) -> Value:
        return weights.vector(name, tensor.read())

    def head_norm(self, weights: WeightPacker, name: str, tensor: Tensor) -> Value:
        return weights.vector(name, tensor.read())

    def bias(self, weights: WeightPacker, name: str, bias: Matrix) -> Value:
        return weights.vector(name, bias.blocks(0, bias.num_blocks))

    def begin(self, graph: Graph, spec: DecoderSpec, weights: WeightPacker, rope: Rope) -> StepInputs:
        input_ids = graph.input("input_ids", "int64", "T")
        positions = graph.input("positions", "int64", "T")
        step = StepInputs(
            input_ids=input_ids,
            cu_seqlens=graph.input("cu_seqlens", "int32", "B_plus_1"),
            past_lens=graph.input("past_lens", "int32", "B"),
            block_table=graph.input("block_table", "int32", "B", "M"),
            slot_mapping=graph.input("slot_mapping", "int32", "T"),
            logits_rows=graph.input("logits_rows", "int32", "R"),
        )
        cache = self.kv_cache(spec)
        pool = graph.input("kv_cache", cache.dtype, spec.num_layers, 2, "num_blocks", *cache.block_shape)
        self._sampling = (
            graph.input("temperature", "float32", "R"),
            graph.input("top_k", "int32", "R"),
            graph.input("top_p", "float32", "R"),
            graph.input("min_p", "float32", "R"),
            graph.input("seed", "int64", "R"),
            graph.input("sample_position", "int64", "R"),
        )
        rows = (positions, step.cu_seqlens, step.past_lens, step.block_table, step.slot_mapping)
        self._shared = _Shared(spec, rows, pool, weights.vector("cos_sin", rope.table()))
        return step

    def embed(self, graph: Graph, address: str, ids: Value, table: PackedMatrix) -> Value:
        ids.expect("int64", "T")
        inputs = (ids, *table.parts[: self._ops.embed_parts])
        shape = ("T", table.num_inputs)
        return graph.node(self._ops.embed, address, inputs, "float32", *shape, N=table.num_columns, K=table.num_inputs)

    def linear(self, graph: Graph, address: str, x: Value, layer: Linear) -> Value:
        return self._linear(graph, address, x, layer, None)

    def attention(self, graph: Graph, address: str, qkv: Value, *, layer: int, head_norms: Sequence[Value]) -> Value:
        if self._shared is None:
            raise ValueError("attention before begin(): this is a bug")
        spec, shared = self._shared.spec, self._shared
        qkv.expect("float32", "T", spec.qkv_size)
        for norm in head_norms:
            norm.expect("float32", spec.head_dim)
        return graph.node(
            "PagedAttention",
            address,
            (qkv, shared.kv_cache, *shared.rows, shared.cos_sin, *head_norms),
            "float32",
            "T",
            spec.q_size,
            layer=layer,
            num_heads=spec.num_heads,
            kv_num_heads=spec.num_kv_heads,
            scale=spec.head_dim**-0.5,
            softcap=0.0,
            window=spec.windows[layer],
            norm_epsilon=spec.norm_epsilon,
        )

    def finish(self, graph: Graph, address: str, x: Value, layer: Linear) -> None:
        logits = self._linear(graph, address, x, layer, "logits")
        inputs = (logits, *self._sampling)
        graph.output(graph.node("Sample", "/sample", inputs, "int64", "R", output_name="token_ids"))
        graph.output(logits)

    def _linear(self, graph: Graph, address: str, x: Value, layer: Linear, output_name: str | None) -> Value:
        matrix = layer.matrix
        rows = x.shape[0]
        x.expect("float32", rows, matrix.num_inputs)
        if layer.bias is not None:
            layer.bias.expect("float32", matrix.num_blocks * BLOCK)
        if layer.norm is not None:
            layer.norm.expect("float32", matrix.num_inputs)
        if layer.residual is not None:
            layer.residual.expect("float32", rows, matrix.num_columns)
        return graph.node(
            self._ops.linear,
            address,
            (x, *matrix.parts, layer.bias, layer.norm, layer.residual),
            "float32",
            rows,
            matrix.num_columns,
            output_name=output_name,
            N=matrix.num_columns,
            norm_epsilon=layer.norm_epsilon,
            activation=layer.activation,
        )

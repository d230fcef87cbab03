"""Which nodes a decoder is written with: what differs between the places a model can run.

decoder.py says what is computed, a NodeWriter says by which operator. The CPU's operators are ours; kernels/README.md
defines their inputs, attributes and layouts. A new target is a class beside CpuNodes and a row in TARGETS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, Protocol

from model_store.graph import Graph, GraphError, Value
from model_store.manifest import KvCache
from model_store.packing import BLOCK
from model_store.quantization import Scheme
from model_store.spec import DecoderSpec
from model_store.weight_packer import PackedMatrix

Activation = Literal["none", "silu_mul"]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The graph inputs that say what a step computes: T tokens of B sequences, M blocks a row, R rows of logits."""

    input_ids: Value  # int64 [T]
    positions: Value  # int64 [T]
    cu_seqlens: Value  # int32 [B + 1]
    past_lens: Value  # int32 [B]
    block_table: Value  # int32 [B, M]
    slot_mapping: Value  # int32 [T]
    logits_rows: Value  # int32 [R]
    kv_cache: Value  # [layers, 2, blocks, *block_shape], written in place


@dataclass(frozen=True, slots=True)
class SamplingInputs:
    """How each of the R rows of logits becomes a token; see batcher/sampling.py."""

    temperature: Value  # float32 [R]
    top_k: Value  # int32 [R]
    top_p: Value  # float32 [R]
    min_p: Value  # float32 [R]
    seed: Value  # int64 [R]
    sample_position: Value  # int64 [R]


class NodeWriter(Protocol):
    """Writes each of a decoder's steps as a node, and returns what the node gives."""

    def kv_cache(self, spec: DecoderSpec) -> KvCache:
        """The pool that attention reads and writes."""
        ...

    def embed(self, graph: Graph, address: str, ids: Value, table: PackedMatrix) -> Value:
        """Rows `ids` [T] of the packed output layer: [T, hidden]."""
        ...

    def linear(
        self,
        graph: Graph,
        address: str,
        x: Value,
        matrix: PackedMatrix,
        *,
        bias: Value | None = None,
        norm: Value | None = None,
        norm_epsilon: float = 0.0,
        residual: Value | None = None,
        activation: Activation = "none",
        output_name: str | None = None,
    ) -> Value:
        """activation(rms_norm(x) @ weight + bias) + residual, each where given: [T, K] -> [T, N]."""
        ...

    def attention(
        self,
        graph: Graph,
        address: str,
        qkv: Value,
        step: StepInputs,
        *,
        cos_sin: Value,
        spec: DecoderSpec,
        layer: int,
        q_norm: Value | None,
        k_norm: Value | None,
    ) -> Value:
        """Rotate q and k, store k and v, attend over each sequence's blocks: [T, (H + 2 KV) * D] -> [T, H * D]."""
        ...

    def sample(self, graph: Graph, address: str, logits: Value, sampling: SamplingInputs, output_name: str) -> Value:
        """A token for each row of logits [R, V]: int64 [R]."""
        ...


@dataclass(frozen=True, slots=True)
class _LinearOps:
    """The operators that multiply by, and look up rows of, a scheme's packed weight."""

    linear: str
    embed: str
    embed_parts: int  # how many of the packed tensors the embedding reads


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

    def kv_cache(self, spec: DecoderSpec) -> KvCache:
        padded_dim = -(-spec.head_dim // 16) * 16
        shape = (spec.num_kv_heads, self.BLOCK_SIZE * padded_dim)
        return KvCache(dtype=self._kv_dtype, block_size=self.BLOCK_SIZE, block_shape=shape)

    def embed(self, graph: Graph, address: str, ids: Value, table: PackedMatrix) -> Value:
        ids.expect("int64", "T")
        inputs = (ids, *table.parts[: self._ops.embed_parts])
        shape = ("T", table.num_inputs)
        return graph.node(self._ops.embed, address, inputs, "float32", *shape, N=table.num_columns, K=table.num_inputs)

    def linear(
        self,
        graph: Graph,
        address: str,
        x: Value,
        matrix: PackedMatrix,
        *,
        bias: Value | None = None,
        norm: Value | None = None,
        norm_epsilon: float = 0.0,
        residual: Value | None = None,
        activation: Activation = "none",
        output_name: str | None = None,
    ) -> Value:
        x.expect("float32", x.shape[0], matrix.num_inputs)
        if bias is not None:
            bias.expect("float32", matrix.num_blocks * BLOCK)
        if norm is not None:
            norm.expect("float32", matrix.num_inputs)
        if residual is not None:
            residual.expect("float32", x.shape[0], matrix.num_columns)
        return graph.node(
            self._ops.linear,
            address,
            (x, *matrix.parts, bias, norm, residual),
            "float32",
            x.shape[0],
            matrix.num_columns,
            output_name=output_name,
            N=matrix.num_columns,
            norm_epsilon=norm_epsilon,
            activation=activation,
        )

    def attention(
        self,
        graph: Graph,
        address: str,
        qkv: Value,
        step: StepInputs,
        *,
        cos_sin: Value,
        spec: DecoderSpec,
        layer: int,
        q_norm: Value | None,
        k_norm: Value | None,
    ) -> Value:
        qkv.expect("float32", "T", spec.qkv_size)
        cos_sin.expect("float32", spec.max_model_len, spec.head_dim)
        if (q_norm is None) != (k_norm is None):
            raise GraphError(f"{address} normalizes only one of q and k")
        for norm in (q_norm, k_norm):
            if norm is not None:
                norm.expect("float32", spec.head_dim)
        rows = (step.positions, step.cu_seqlens, step.past_lens, step.block_table, step.slot_mapping)
        return graph.node(
            "PagedAttention",
            address,
            (qkv, step.kv_cache, *rows, cos_sin, q_norm, k_norm),
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

    def sample(self, graph: Graph, address: str, logits: Value, sampling: SamplingInputs, output_name: str) -> Value:
        filters = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        inputs = (logits, *filters, sampling.seed, sampling.sample_position)
        return graph.node("Sample", address, inputs, "int64", "R", output_name=output_name)


TARGETS: Final[Mapping[str, Callable[[Scheme], NodeWriter]]] = {"cpu": CpuNodes}

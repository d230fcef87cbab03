"""How a decoder is written: the seam between what is computed and the operators that a target computes it with.

decoder.py says what a layer is; a NodeWriter says by which node. cpu_nodes.py writes our CPU operators, cuda_nodes.py
those of ONNX Runtime's CUDA provider and ours beside them, tensorrt_nodes.py what TensorRT takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from model_store.graph import Graph, Value
from model_store.manifest import KvCache
from model_store.matrices import Matrix
from model_store.rope import Rope
from model_store.spec import DecoderSpec
from model_store.tensors import Tensor
from model_store.weight_packer import PackedMatrix, WeightPacker

Activation = Literal["none", "silu_mul"]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The graph inputs that say what a step computes: T tokens of B sequences, M blocks a row, R rows of logits."""

    input_ids: Value  # int64 [T]
    cu_seqlens: Value  # int32 [B + 1]
    past_lens: Value  # int32 [B]
    block_table: Value  # int32 [B, M]
    slot_mapping: Value  # int32 [T]
    logits_rows: Value  # int32 [R]


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear layer: activation(rms_norm(x) @ weight + bias) + residual, each where given."""

    matrix: PackedMatrix
    bias: Value | None = None
    norm: Value | None = None
    norm_epsilon: float = 0.0
    residual: Value | None = None
    activation: Activation = "none"


class NodeWriter(Protocol):
    """Writes each of a decoder's steps as a node or a few, and returns what they give. One writer a graph."""

    def kv_cache(self, spec: DecoderSpec) -> KvCache:
        """The pool that attention reads and writes."""
        ...

    def gate_up(self, gate: Tensor, up: Tensor) -> Matrix:
        """The two matrices (or biases) of a gated layer in the order of rows that `silu_mul` wants."""
        ...

    def norm(self, weights: WeightPacker, name: str, tensor: Tensor) -> Value:
        """The gains of an RMSNorm over hidden states."""
        ...

    def head_norm(self, weights: WeightPacker, name: str, tensor: Tensor) -> Value:
        """The gains of an RMSNorm over heads, inside attention."""
        ...

    def bias(self, weights: WeightPacker, name: str, bias: Matrix) -> Value:
        """A linear layer's bias."""
        ...

    def begin(self, graph: Graph, spec: DecoderSpec, weights: WeightPacker, rope: Rope) -> StepInputs:
        """Declare the graph's inputs and whatever all layers share."""
        ...

    def embed(self, graph: Graph, address: str, ids: Value, table: PackedMatrix) -> Value:
        """Rows `ids` [T] of the packed output layer: [T, hidden]."""
        ...

    def linear(self, graph: Graph, address: str, x: Value, layer: Linear) -> Value:
        """[T, K] -> [T, N]."""
        ...

    def attention(self, graph: Graph, address: str, qkv: Value, *, layer: int, head_norms: Sequence[Value]) -> Value:
        """Rotate q and k, store k and v, attend over each sequence's blocks: [T, (H + 2 KV) * D] -> [T, H * D].

        `head_norms`: the gains of q and k, or nothing.
        """
        ...

    def finish(self, graph: Graph, address: str, x: Value, layer: Linear) -> None:
        """Write the output layer and the graph's outputs: rows [R, hidden] -> logits [R, V] and what follows."""
        ...

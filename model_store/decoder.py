"""The one decoder-only transformer, written as a graph of five steps a layer.

    x ─┬─ linear ────── attention ── linear ─┬─ linear ───────────── linear ─── x of the next layer
       │  norm, qkv                  +       │  norm, silu(gate) * up  +
       └─────────────────────────────┘       └─────────────────────────┘

Every architecture goes through here; what differs is in the spec, in the weights, and in the operators that a
NodeWriter picks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from model_store.graph import STANDARD, Graph, Value
from model_store.matrices import Matrix, Stacked
from model_store.nodes import Activation, Linear, NodeWriter
from model_store.spec import DecoderSpec
from model_store.tensors import Tensor
from model_store.weight_packer import WeightPacker


def count_matrices(spec: DecoderSpec) -> int:
    """How many weights write_decoder packs: qkv, output, gate_up and down of each layer, and the tables."""
    return 4 * spec.num_layers + (1 if spec.tied_embeddings else 2)


def write_decoder(
    graph: Graph, spec: DecoderSpec, nodes: NodeWriter, weights: WeightPacker, tensors: Mapping[str, Tensor]
) -> None:
    """Write inputs, nodes, weights and outputs (logits [R, V], and what the target adds) into `graph`."""
    step = nodes.begin(graph, spec, weights, spec.rope)
    layers = _Layers(graph, spec, nodes, weights, tensors)

    table = weights.table("lm_head" if spec.tied_embeddings else "embed", Stacked((tensors["embed"],)))
    x = nodes.embed(graph, "/embed", step.input_ids, table)
    for number in range(spec.num_layers):
        x = layers.write(number, x)
    wanted = ("R", spec.hidden_size)
    x = graph.node("Gather", "/logits_rows", (x, step.logits_rows), x.dtype, *wanted, domain=STANDARD, axis=0)
    output_layer = Linear(
        table if spec.tied_embeddings else weights.table("lm_head", Stacked((tensors["lm_head"],))),
        norm=nodes.norm(weights, "final_norm", tensors["final_norm"]),
        norm_epsilon=spec.norm_epsilon,
    )
    nodes.finish(graph, "/lm_head", x, output_layer)


@dataclass(frozen=True, slots=True)
class _Layers:
    """Writes layers one after another; everything they share."""

    graph: Graph
    spec: DecoderSpec
    nodes: NodeWriter
    weights: WeightPacker
    tensors: Mapping[str, Tensor]  # by canonical name (architectures.py)

    def write(self, number: int, x: Value) -> Value:
        """Layer `number`: [T, hidden] -> [T, hidden]."""
        at, spec, nodes = f"layers.{number}", self.spec, self.nodes
        qkv = self._linear(
            f"{at}.qkv",
            x,
            self._stacked(at, "q", "k", "v"),
            bias=self._stacked(at, "q_bias", "k_bias", "v_bias") if spec.qkv_bias else None,
            norm=f"{at}.attention_norm",
        )
        head_norms = (f"{at}.q_norm", f"{at}.k_norm") if spec.qk_norm else ()
        attended = nodes.attention(
            self.graph,
            f"/{at}/attention",
            qkv,
            layer=number,
            head_norms=[nodes.head_norm(self.weights, name, self.tensors[name]) for name in head_norms],
        )
        x = self._linear(
            f"{at}.output",
            attended,
            self._stacked(at, "output"),
            bias=self._stacked(at, "output_bias") if spec.output_bias else None,
            residual=x,
        )
        gated = self._linear(
            f"{at}.gate_up",
            x,
            self._gate_up(at, "gate", "up"),
            bias=self._gate_up(at, "gate_bias", "up_bias") if spec.mlp_bias else None,
            norm=f"{at}.mlp_norm",
            activation="silu_mul",
        )
        return self._linear(
            f"{at}.down",
            gated,
            self._stacked(at, "down"),
            bias=self._stacked(at, "down_bias") if spec.mlp_bias else None,
            residual=x,
        )

    def _linear(
        self,
        name: str,
        x: Value,
        matrix: Matrix,
        *,
        bias: Matrix | None,
        norm: str | None = None,
        residual: Value | None = None,
        activation: Activation = "none",
    ) -> Value:
        at, _, what = name.rpartition(".")
        nodes, weights = self.nodes, self.weights
        layer = Linear(
            matrix=weights.matrix(name, matrix),
            bias=None if bias is None else nodes.bias(weights, f"{name}.bias", bias),
            norm=None if norm is None else nodes.norm(weights, norm, self.tensors[norm]),
            norm_epsilon=self.spec.norm_epsilon,
            residual=residual,
            activation=activation,
        )
        return nodes.linear(self.graph, f"/{at}/{what}", x, layer)

    def _stacked(self, at: str, *names: str) -> Matrix:
        return Stacked(tuple(self.tensors[f"{at}.{name}"] for name in names))

    def _gate_up(self, at: str, gate: str, up: str) -> Matrix:
        return self.nodes.gate_up(self.tensors[f"{at}.{gate}"], self.tensors[f"{at}.{up}"])

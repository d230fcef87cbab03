"""The one decoder-only transformer, written as a graph of five nodes a layer.

    x ─┬─ linear ────── attention ── linear ─┬─ linear ───────────── linear ─── x of the next layer
       │  norm, qkv                  +       │  norm, silu(gate) * up  +
       └─────────────────────────────┘       └─────────────────────────┘

Every architecture goes through here; what differs is in the spec, in the weights, and in the operators that a
NodeWriter picks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from model_store.graph import Graph, Value
from model_store.manifest import KvCache
from model_store.matrices import GateUp, Matrix, Stacked
from model_store.spec import DecoderSpec
from model_store.targets import Activation, NodeWriter, SamplingInputs, StepInputs
from model_store.tensors import Tensor
from model_store.weight_packer import WeightPacker


def count_matrices(spec: DecoderSpec) -> int:
    """How many weights write_decoder packs: qkv, output, gate_up and down of each layer, and the tables."""
    return 4 * spec.num_layers + (1 if spec.tied_embeddings else 2)


def write_decoder(
    graph: Graph, spec: DecoderSpec, nodes: NodeWriter, weights: WeightPacker, tensors: Mapping[str, Tensor]
) -> None:
    """Write inputs, nodes, weights and outputs (token_ids int64 [R], logits float32 [R, V]) into `graph`."""
    step = _step_inputs(graph, spec, nodes.kv_cache(spec))
    sampling = _sampling_inputs(graph)
    layers = _Layers(graph, spec, nodes, weights, tensors, step, cos_sin=weights.vector("cos_sin", spec.rope.table()))

    table = weights.matrix("lm_head" if spec.tied_embeddings else "embed", Stacked((tensors["embed"],)))
    x = nodes.embed(graph, "/embed", step.input_ids, table)
    for number in range(spec.num_layers):
        x = layers.write(number, x)
    wanted = ("R", spec.hidden_size)
    x = graph.node("Gather", "/logits_rows", (x, step.logits_rows), "float32", *wanted, domain="", axis=0)
    logits = nodes.linear(
        graph,
        "/lm_head",
        x,
        table if spec.tied_embeddings else weights.matrix("lm_head", Stacked((tensors["lm_head"],))),
        norm=weights.vector("final_norm", tensors["final_norm"].read()),
        norm_epsilon=spec.norm_epsilon,
        output_name="logits",
    )
    graph.output(nodes.sample(graph, "/sample", logits, sampling, "token_ids").expect("int64", "R"))
    graph.output(logits.expect("float32", "R", spec.vocab_size))


@dataclass(frozen=True, slots=True)
class _Layers:
    """Writes layers one after another; everything they share."""

    graph: Graph
    spec: DecoderSpec
    nodes: NodeWriter
    weights: WeightPacker
    tensors: Mapping[str, Tensor]  # by canonical name (architectures.py)
    step: StepInputs
    cos_sin: Value

    def write(self, number: int, x: Value) -> Value:
        """Layer `number`: [T, hidden] -> [T, hidden]."""
        at, spec = f"layers.{number}", self.spec
        qkv = self._linear(
            f"{at}.qkv",
            x,
            self._stacked(at, "q", "k", "v"),
            bias=self._stacked(at, "q_bias", "k_bias", "v_bias") if spec.qkv_bias else None,
            norm=self._vector(f"{at}.attention_norm"),
        )
        attended = self.nodes.attention(
            self.graph,
            f"/{at}/attention",
            qkv,
            self.step,
            cos_sin=self.cos_sin,
            spec=spec,
            layer=number,
            q_norm=self._vector(f"{at}.q_norm") if spec.qk_norm else None,
            k_norm=self._vector(f"{at}.k_norm") if spec.qk_norm else None,
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
            norm=self._vector(f"{at}.mlp_norm"),
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
        norm: Value | None = None,
        residual: Value | None = None,
        activation: Activation = "none",
    ) -> Value:
        at, _, what = name.rpartition(".")
        return self.nodes.linear(
            self.graph,
            f"/{at}/{what}",
            x,
            self.weights.matrix(name, matrix),
            bias=None if bias is None else self.weights.bias(f"{name}.bias", bias),
            norm=norm,
            norm_epsilon=self.spec.norm_epsilon,
            residual=residual,
            activation=activation,
        )

    def _stacked(self, at: str, *names: str) -> Matrix:
        return Stacked(tuple(self.tensors[f"{at}.{name}"] for name in names))

    def _gate_up(self, at: str, gate: str, up: str) -> Matrix:
        return GateUp(self.tensors[f"{at}.{gate}"], self.tensors[f"{at}.{up}"])

    def _vector(self, name: str) -> Value:
        return self.weights.vector(name, self.tensors[name].read())


def _step_inputs(graph: Graph, spec: DecoderSpec, cache: KvCache) -> StepInputs:
    return StepInputs(
        input_ids=graph.input("input_ids", "int64", "T"),
        positions=graph.input("positions", "int64", "T"),
        cu_seqlens=graph.input("cu_seqlens", "int32", "B_plus_1"),
        past_lens=graph.input("past_lens", "int32", "B"),
        block_table=graph.input("block_table", "int32", "B", "M"),
        slot_mapping=graph.input("slot_mapping", "int32", "T"),
        logits_rows=graph.input("logits_rows", "int32", "R"),
        kv_cache=graph.input("kv_cache", cache.dtype, spec.num_layers, 2, "num_blocks", *cache.block_shape),
    )


def _sampling_inputs(graph: Graph) -> SamplingInputs:
    return SamplingInputs(
        temperature=graph.input("temperature", "float32", "R"),
        top_k=graph.input("top_k", "int32", "R"),
        top_p=graph.input("top_p", "float32", "R"),
        min_p=graph.input("min_p", "float32", "R"),
        seed=graph.input("seed", "int64", "R"),
        sample_position=graph.input("sample_position", "int64", "R"),
    )

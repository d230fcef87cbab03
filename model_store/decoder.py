"""The one decoder-only transformer, written as a graph of five nodes a layer.

        ┌────────────────────────────┐   ┌──────────────────────────┐
    x ──┴─ linear ── attention ── linear ─┴─ linear ─────── linear ───┴── x of the next layer
           norm, qkv              + x        norm, gate_up  + x
                                             silu * up

Every architecture goes through here; what differs is in the spec, in the weights, and in which operator the NodeWriter
picks.
"""

from __future__ import annotations

from collections.abc import Mapping

from model_store.graph import Graph, Value
from model_store.manifest import KvCache
from model_store.matrices import GateUp, Matrix, Stacked
from model_store.spec import DecoderSpec
from model_store.targets import NodeWriter, SamplingInputs, StepInputs
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
    cos_sin = weights.vector("cos_sin", spec.rope.table())

    table = weights.matrix("embed" if not spec.tied_embeddings else "lm_head", Stacked((tensors["embed"],)))
    x = nodes.embed(graph, "/embed", step.input_ids, table)
    for layer in range(spec.num_layers):
        x = _write_layer(graph, spec, nodes, weights, tensors, layer=layer, x=x, step=step, cos_sin=cos_sin)
    rows = graph.node(
        "Gather", "/logits_rows", (x, step.logits_rows), "float32", "R", spec.hidden_size, domain="", axis=0
    )
    logits = nodes.linear(
        graph,
        "/lm_head",
        rows,
        table if spec.tied_embeddings else weights.matrix("lm_head", Stacked((tensors["lm_head"],))),
        norm=weights.vector("final_norm", tensors["final_norm"].read()),
        norm_epsilon=spec.norm_epsilon,
        output_name="logits",
    )
    graph.output(nodes.sample(graph, "/sample", logits, sampling, "token_ids").expect("int64", "R"))
    graph.output(logits.expect("float32", "R", spec.vocab_size))


def _write_layer(
    graph: Graph,
    spec: DecoderSpec,
    nodes: NodeWriter,
    weights: WeightPacker,
    tensors: Mapping[str, Tensor],
    *,
    layer: int,
    x: Value,
    step: StepInputs,
    cos_sin: Value,
) -> Value:
    """One layer: [T, hidden] -> [T, hidden]."""
    prefix = f"layers.{layer}"

    def vector(name: str) -> Value | None:
        tensor = tensors.get(f"{prefix}.{name}")
        return None if tensor is None else weights.vector(f"{prefix}.{name}", tensor.read())

    def linear(name: str, x: Value, parts: tuple[str, ...], norm: str | None, residual: Value | None) -> Value:
        is_gated = parts == ("gate", "up")
        biases = _matrix([f"{prefix}.{part}_bias" for part in parts], tensors, is_gated)
        matrix = _matrix([f"{prefix}.{part}" for part in parts], tensors, is_gated)
        if matrix is None:
            raise KeyError(f"{prefix}: no tensors {parts}; this is a bug (open_checkpoint compares them)")
        return nodes.linear(
            graph,
            f"/{prefix}/{name}",
            x,
            weights.matrix(f"{prefix}.{name}", matrix),
            bias=None if biases is None else weights.bias(f"{prefix}.{name}.bias", biases),
            norm=None if norm is None else vector(norm),
            norm_epsilon=spec.norm_epsilon,
            residual=residual,
            activation="silu_mul" if is_gated else "none",
        )

    qkv = linear("qkv", x, ("q", "k", "v"), norm="attention_norm", residual=None)
    attended = nodes.attention(
        graph,
        f"/{prefix}/attention",
        qkv,
        step,
        cos_sin=cos_sin,
        spec=spec,
        layer=layer,
        q_norm=vector("q_norm"),
        k_norm=vector("k_norm"),
    )
    x = linear("output", attended, ("output",), norm=None, residual=x)
    gated = linear("gate_up", x, ("gate", "up"), norm="mlp_norm", residual=None)
    return linear("down", gated, ("down",), norm=None, residual=x)


def _matrix(names: list[str], tensors: Mapping[str, Tensor], is_gated: bool) -> Matrix | None:
    """The tensors `names` as one matrix in packed order, or None if the model has none of them."""
    found = tuple(tensors[name] for name in names if name in tensors)
    if not found:
        return None
    return GateUp(*found) if is_gated else Stacked(found)


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

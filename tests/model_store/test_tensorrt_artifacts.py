"""Whole imports for target tensorrt, run without TensorRT: what the graph means, where it is cut, what is in 8 bits.

ONNX's evaluator computes the standard nodes and cuda_operators.py the others; ONNX Runtime's CPU kernels compute the
stretches that would become engines. No test here says what TensorRT makes of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from model_store.calibration import calibrate
from model_store.checkpoint import open_checkpoint
from model_store.parity import relative_errors
from model_store.reference import reference_logits
from model_store.store import Store
from model_store.targets import TARGETS
from model_store.tensorrt_packing import fp8_packing, int4_packing, int8_packing, quantize_blocks
from model_store.tensorrt_seams import KEPT_OPERATORS, engine_inputs
from tests.model_store import cuda_session
from tests.model_store.checkpoints import CASES, Case, load_reference, prompts
from tests.model_store.cuda_session import CudaSession, some_text
from tests.model_store.test_operator_schemas import check_graph
from wire.errors import BadRequest

SCHEMES = tuple(TARGETS["tensorrt"])
# The largest error of a row on checkpoints that are 64 wide (see test_cuda_artifacts.py), and the least on average: an
# artifact that is more exact is not stored as its scheme says.
BOUNDS = {"int8": 0.4, "int4": 0.6, "fp8": 0.25}
LEAST = {"int8": 0.01, "int4": 0.08, "fp8": 0.03}
NAMES = ("llama", "llama-biases", "llama-untied-float16", "llama-rope-llama3", "mistral-window", "qwen2", "qwen3")
WIDE = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 1024}


def case_of(name: str) -> Case:
    """A tiny checkpoint whose widths are multiples of an int4 block."""
    return replace(CASES[name], changes={**CASES[name].changes, "intermediate_size": 192})


def imported(tmp_path: Path, case: Case, scheme: str) -> AbstractContextManager[CudaSession]:
    return cuda_session.imported(tmp_path, case, "tensorrt", scheme, BOUNDS[scheme])


@contextmanager
def graph_of(tmp_path: Path, name: str, scheme: str) -> Iterator[onnx.GraphProto]:
    """The graph of an import, its weights loaded."""
    with imported(tmp_path, case_of(name), scheme):
        yield onnx.load(str(Store(tmp_path / "store").resolve("pond") / "model.onnx")).graph


def stretches(graph: onnx.GraphProto) -> list[list[NodeProto]]:
    """The nodes between those that stay with CUDA, in the order of the file: an engine each."""
    found: list[list[NodeProto]] = [[]]
    for node in graph.node:
        if node.op_type in KEPT_OPERATORS:
            found.append([])
        else:
            found[-1].append(node)
    return [stretch for stretch in found if stretch]


def outer_inputs(graph: onnx.GraphProto, stretch: Sequence[NodeProto]) -> list[str]:
    """What a stretch reads and neither computes nor holds as a weight."""
    inside = {name for node in stretch for name in node.output} | {tensor.name for tensor in graph.initializer}
    return list(dict.fromkeys(name for node in stretch for name in node.input if name not in inside))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", NAMES)
def test_an_artifact_computes_what_its_checkpoint_does(tmp_path: Path, name: str, scheme: str) -> None:
    with imported(tmp_path, case_of(name), scheme) as session:
        parity = session.manifest.parity
        assert parity is not None
        print(f"{name} {scheme}: {parity.max_relative_error:.2e}, {parity.mean_relative_error:.2e} on average")
        assert LEAST[scheme] < parity.mean_relative_error < BOUNDS[scheme] / 2


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_an_artifact_computes_what_transformers_computed(tmp_path: Path, scheme: str) -> None:
    stored = load_reference("qwen2")
    with imported(tmp_path, CASES["qwen2"], scheme) as session:
        logits = session.batch(prompts(session.manifest.geometry.vocab_size))
    for theirs, ours in zip(stored.logits, logits, strict=True):
        assert relative_errors(theirs, ours[-len(theirs) :]).max() < BOUNDS[scheme]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_chunks_and_batches_are_read_in_order(tmp_path: Path, scheme: str) -> None:
    with imported(tmp_path, case_of("qwen3"), scheme) as session:
        sequences = prompts(session.manifest.geometry.vocab_size)
        alone = [session(sequence) for sequence in sequences]
        for a, b in zip(alone, session.batch(sequences, chunk=7), strict=True):
            # A product of other shape may round otherwise, and a code flip with it; mixed up rows would differ by 1.
            assert np.median(relative_errors(a, b)) < 0.01


@pytest.mark.parametrize("scheme", SCHEMES)
def test_engines_have_the_inputs_that_profiles_are_written_for(tmp_path: Path, scheme: str) -> None:
    with imported(tmp_path, case_of("llama-biases"), scheme) as session:
        geometry = session.manifest.geometry
    graph = onnx.load(str(Store(tmp_path / "store").resolve("pond") / "model.onnx"), load_external_data=False).graph
    engines = stretches(graph)
    assert len(engines) == geometry.num_layers + 1
    needed = [name for engine in engines for name in outer_inputs(graph, engine)]
    assert sorted(needed) == sorted(engine_inputs(geometry))
    assert not any(mark in name for name in needed for mark in ":,")
    widths = {value.name: value.type.tensor_type.shape.dim[1].dim_value for value in graph.value_info}
    attended = {name: width for name, width in engine_inputs(geometry).items() if "attention" in name}
    assert widths == attended  # declared, because TensorRT asks for them before anything ran


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_node_conforms_to_its_schema(tmp_path: Path, scheme: str) -> None:
    with graph_of(tmp_path, "llama-biases", scheme) as graph:
        types = check_graph(graph)
    assert types["logits"] == "tensor(float)"
    assert types["/layers.0/attention.out"] == "tensor(float16)"
    assert types["/layers.1/down/add.out"] == "tensor(float)"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_engines_part_runs_on_other_kernels_and_gives_the_same(tmp_path: Path, scheme: str) -> None:
    """ONNX Runtime on the CPU takes the standard nodes as they stand: the graph says what we mean, to others too."""
    with imported(tmp_path, case_of("llama-biases"), scheme):
        path = Store(tmp_path / "store").resolve("pond") / "model.onnx"
    model = onnx.load(str(path))
    engine = stretches(model.graph)[1]
    names = outer_inputs(model.graph, engine)
    outputs = ["/layers.1/qkv/bias.out", "/layers.0/down/add.out"]
    geometry_inputs = {
        name: onnx.TensorProto.FLOAT16 if "attention" in name else onnx.TensorProto.FLOAT for name in names
    }
    part = onnx.helper.make_graph(
        engine,
        "part",
        [onnx.helper.make_tensor_value_info(name, kind, ["T", 64]) for name, kind in geometry_inputs.items()],
        [
            onnx.helper.make_tensor_value_info(outputs[0], onnx.TensorProto.FLOAT16, None),
            onnx.helper.make_tensor_value_info(outputs[1], onnx.TensorProto.FLOAT, None),
        ],
        [tensor for tensor in model.graph.initializer if any(tensor.name in node.input for node in engine)],
    )
    alone = onnx.helper.make_model(part, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    random = np.random.default_rng(2)
    feeds = {
        name: random.standard_normal((9, 64)).astype(np.float16 if kind == onnx.TensorProto.FLOAT16 else np.float32)
        for name, kind in geometry_inputs.items()
    }
    session = ort.InferenceSession(alone.SerializeToString(), providers=["CPUExecutionProvider"])
    for theirs, ours in zip(session.run(outputs, feeds), ReferenceEvaluator(alone).run(outputs, feeds), strict=True):
        assert relative_errors(np.asarray(ours, np.float32), np.asarray(theirs, np.float32)).max() < 0.02


def producers(graph: onnx.GraphProto) -> Mapping[str, NodeProto]:
    return {name: node for node in graph.node for name in node.output}


@pytest.mark.parametrize(("scheme", "dtype"), [("int8", "INT8"), ("fp8", "FLOAT8E4M3FN")])
def test_everything_that_is_multiplied_is_in_eight_bits(tmp_path: Path, scheme: str, dtype: str) -> None:
    with graph_of(tmp_path, "llama-biases", scheme) as graph:
        made_by = producers(graph)
        stored = {tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in graph.initializer}
        products = [node for node in graph.node if node.op_type == "MatMul"]
        assert len(products) == 2 * 4
        for node in products:
            x, weight = (made_by[name] for name in node.input)
            assert (x.op_type, weight.op_type) == ("DequantizeLinear", "DequantizeLinear")
            codes = made_by[x.input[0]]
            assert codes.op_type == "QuantizeLinear"
            assert codes.input[1:] == x.input[1:]  # one scale and one zero for both
            assert stored[codes.input[2]] == stored[weight.input[0]] == dtype


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_scales_are_what_calibration_measured(tmp_path: Path, scheme: str) -> None:
    with graph_of(tmp_path, "llama", scheme) as graph:
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        found = {
            node.name.removesuffix("/x/quantize").strip("/").replace("/", "."): float(constants[node.input[1]])
            for node in graph.node
            if node.op_type == "QuantizeLinear"
        }
    with open_checkpoint(tmp_path / "source") as checkpoint:
        measured = calibrate(checkpoint, some_text(checkpoint.spec.vocab_size))
    assert len(found) == 2 * 4
    for name, scale in found.items():
        expected = measured.threshold(name) / 127 if scheme == "int8" else measured.peak(name) / 448
        assert scale == np.float16(expected)


def test_int8_clips_less_than_a_hundredth_of_what_it_reads(tmp_path: Path) -> None:
    CASES["llama"].write(tmp_path / "source")
    with open_checkpoint(tmp_path / "source") as checkpoint:
        seen: dict[str, list[NDArray[np.float32]]] = {}
        text = some_text(checkpoint.spec.vocab_size)
        reference_logits(checkpoint, text, observe=lambda name, x: seen.setdefault(name, []).append(x))
        measured = calibrate(checkpoint, text)
    for name, values in seen.items():
        clipped = np.mean([np.mean(np.abs(x) > measured.threshold(name)) for x in values])
        assert clipped < 0.01, name


@pytest.mark.parametrize(
    ("changes", "scheme", "message"),
    [
        ({"intermediate_size": 160}, "int4", "intermediate_size is 160; scheme int4 takes multiples of 64"),
        ({"hidden_size": 96, "head_dim": 16}, "int4", "hidden_size is 96; scheme int4 takes multiples of 64"),
        ({"num_attention_heads": 2, "head_dim": 16, "intermediate_size": 192}, "int4", r"num_heads \* head_dim is 32"),
        ({"intermediate_size": 168}, "int8", "intermediate_size is 168; scheme int8 takes multiples of 16"),
        ({"hidden_size": 72, "head_dim": 16}, "fp8", "hidden_size is 72; scheme fp8 takes multiples of 16"),
        ({"head_dim": 24}, "int8", "head_dim is 24; the CUDA target takes multiples of 16"),
    ],
)
def test_sizes_that_a_scheme_does_not_take_are_refused_by_name(
    tmp_path: Path, changes: dict[str, object], scheme: str, message: str
) -> None:
    with pytest.raises(BadRequest, match=message), imported(tmp_path, Case("LlamaForCausalLM", changes), scheme):
        pass
    assert Store(tmp_path / "store").list() == []


def test_int4_weights_are_read_back_as_they_were_packed(tmp_path: Path) -> None:
    """Through the file: two codes a byte, scales of blocks along K, [K, N]."""
    with graph_of(tmp_path, "llama", "int4") as graph:
        tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    with open_checkpoint(tmp_path / "source") as checkpoint:
        rows = checkpoint.tensors["layers.1.down"].read()
    codes, scales = tensors["layers.1.down.weight"], tensors["layers.1.down.scale"]
    assert codes.dtype == ml_dtypes.int4
    assert (codes.shape, scales.shape) == ((192, 64), (3, 64))
    restored = codes.astype(np.float32) * np.repeat(scales.astype(np.float32), 64, axis=0)
    assert relative_errors(rows, restored.T.copy()).max() < 0.15
    assert (scales > 0).all()


def test_codes_use_the_whole_range_and_scales_are_never_zero() -> None:
    random = np.random.default_rng(4)
    rows = random.standard_normal((64, 128)).astype(np.float32)
    rows[5] = 0
    for packing, largest in ((int8_packing(), 127), (int4_packing(64), 8), (fp8_packing(), 448)):
        assert packing.finish is not None
        codes, scales = packing.finish(packing.pack(rows))
        assert codes.shape == (128, 64)
        assert np.abs(codes.astype(np.float32)).max() >= largest - 1
        assert (scales.astype(np.float32) > 0).all()
        assert not codes[:, 5].astype(np.float32).any()


def test_weights_that_are_codes_already_lose_nothing() -> None:
    random = np.random.default_rng(9)
    codes = random.integers(-7, 8, (20, 64)).astype(np.float32)
    codes[:, 0] = 7
    found, scales = quantize_blocks(codes * np.float32(2.0**-6))
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_array_equal(scales, np.full(20, 2.0**-6, np.float16))


def test_a_block_with_one_large_weight_is_clipped_when_that_is_better() -> None:
    block = np.full((1, 64), 0.5, np.float32)
    block[0, 0] = 7.0
    _, scales = quantize_blocks(block)
    assert scales[0] < 1.0


def test_weights_come_after_what_precedes_their_engine(tmp_path: Path) -> None:
    """In the file's order every node's own stretch follows the attention it depends on, weights included."""
    with graph_of(tmp_path, "llama", "int4") as graph:
        order = [node.name for node in graph.node]
    for before, after in pairwise([f"/layers.{layer}/attention" for layer in range(2)]):
        between = order[order.index(before) : order.index(after)]
        assert [name for name in between if name.endswith("/weight")] == [
            "/layers.0/output/weight",
            "/layers.0/gate_up/weight",
            "/layers.0/down/weight",
            "/layers.1/qkv/weight",
        ]

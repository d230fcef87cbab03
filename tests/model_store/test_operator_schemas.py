"""Every node of a CUDA graph is what ONNX Runtime's own schema of the operator allows.

The schemas are those of the installed package: the CPU wheel knows the operators of all providers. Nothing runs here;
types are followed through the graph as the schemas state them, so a wrong dtype is found at the node that takes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

from model_store.build import build_artifact
from model_store.calibration import calibrate
from model_store.checkpoint import open_checkpoint
from model_store.graph import DOMAIN_VERSIONS, ELEMENT_TYPES, MICROSOFT, OUR_DOMAIN, STANDARD
from model_store.targets import TARGETS
from tests.model_store.checkpoints import CASES

# Between them: biases, head norms, windows, an output layer of its own, tied embeddings.
NAMES = ("llama", "llama-biases", "mistral-window", "qwen2", "qwen3")
ONNX_NAMES = {  # of numpy's dtypes; both sides spell a type as tensor(...)
    TensorProto.DataType.Name(code): f"tensor({TensorProto.DataType.Name(code).lower()})"
    for code in ELEMENT_TYPES.values()
}
Types = dict[str, str]  # of values by name


class Violation(AssertionError):
    """A node that its schema does not allow."""


def require(holds: bool, node: NodeProto, why: str) -> None:
    if not holds:
        raise Violation(f"{node.name} ({node.domain}:{node.op_type}): {why}")


@lru_cache(maxsize=1)
def schemas() -> Mapping[tuple[str, str], Any]:
    """By domain and name, the schema in force at the versions that our graphs name."""
    found: dict[tuple[str, str], Any] = {}
    for schema in get_all_operator_schema():
        key = (schema.domain, schema.name)
        if schema.since_version <= DOMAIN_VERSIONS.get(schema.domain, 0):
            known = found.get(key)
            if known is None or known.since_version < schema.since_version:
                found[key] = schema
    return found


def type_name(code: int) -> str:
    return ONNX_NAMES[TensorProto.DataType.Name(code)]


def check_graph(graph: GraphProto) -> Types:
    """Follow types from inputs and initializers to the outputs: the type of every value. Raises Violation."""
    types: Types = {tensor.name: type_name(tensor.data_type) for tensor in graph.initializer}
    types |= {value.name: type_name(value.type.tensor_type.elem_type) for value in graph.input}
    for node in graph.node:
        types |= our_outputs(node) if node.domain == OUR_DOMAIN else check_node(node, types)
    for value in graph.output:
        assert types[value.name] == type_name(value.type.tensor_type.elem_type)
    return types


def our_outputs(node: NodeProto) -> Types:
    """LinearBf16 and LinearF16 have an output for each type they can give."""
    short = {"LinearBf16": "tensor(bfloat16)", "LinearF16": "tensor(float16)"}[node.op_type]
    return {name: kind for name, kind in zip(node.output, (short, "tensor(float)"), strict=False) if name}


def check_node(node: NodeProto, types: Types) -> Types:
    """The types of the node's outputs."""
    key = (node.domain, node.op_type)
    require(key in schemas(), node, "ONNX Runtime does not know it")
    schema = schemas()[key]
    require(not schema.deprecated, node, "deprecated")
    check_attributes(node, schema)
    bound: dict[str, str] = {}  # the type that each of the schema's type variables stands for
    for port, name in ports(node, node.input, schema.inputs, schema.min_input, schema.max_input):
        require(types[name] in port.types, node, f"{port.name} is {types[name]}; allowed are {sorted(port.types)}")
        expected = bound.setdefault(port.typeStr, types[name])
        require(types[name] == expected, node, f"{port.name} is {types[name]}, {port.typeStr} is {expected} elsewhere")
    outputs = {}
    for port, name in ports(node, node.output, schema.outputs, schema.min_output, schema.max_output):
        cast_to = [attribute.i for attribute in node.attribute if attribute.name == "to"]
        outputs[name] = type_name(cast_to[0]) if node.op_type == "Cast" else bound[port.typeStr]
        require(outputs[name] in port.types, node, f"{port.name} would be {outputs[name]}")
    return outputs


def check_attributes(node: NodeProto, schema: Any) -> None:
    given = {attribute.name: attribute.type for attribute in node.attribute}
    unknown = given.keys() - schema.attributes.keys()
    require(not unknown, node, f"unknown attributes {sorted(unknown)}")
    for name, attribute in schema.attributes.items():
        require(name in given or not attribute.required, node, f"the attribute {name} is required")
        if name in given:
            kind = AttributeProto.AttributeType.Name(given[name])
            require(kind == attribute.type.name, node, f"{name} is {kind}, the schema says {attribute.type.name}")


def ports(
    node: NodeProto, names: Sequence[str], formal: Sequence[Any], least: int, most: int
) -> Iterator[tuple[Any, str]]:
    """The connected inputs (or outputs) beside what the schema says of them; the last one may repeat."""
    require(least <= len(names) <= most, node, f"{len(names)} of {list(names)}; the schema takes {least} to {most}")
    for position in range(max(len(names), len(formal))):
        port = formal[min(position, len(formal) - 1)]
        is_connected = position < len(names) and names[position] != ""
        is_single = port.option.name == "Single"
        require(is_connected or not is_single, node, f"{port.name} is required")
        if is_connected:
            yield port, names[position]


@lru_cache(maxsize=1)
def graphs(directory: Path) -> Mapping[tuple[str, str], onnx.ModelProto]:
    """The graph of every scheme and case."""
    found = {}
    for name in NAMES:
        CASES[name].write(directory / name)
        with open_checkpoint(directory / name) as checkpoint:
            calibration = calibrate(checkpoint, [np.arange(30, dtype=np.int64)])
            for scheme, choice in TARGETS["cuda"].items():
                artifact = directory / f"{name}.{scheme}"
                artifact.mkdir()
                build_artifact(
                    checkpoint,
                    artifact,
                    name=name,
                    revision="0" * 12,
                    target="cuda",
                    choice=choice,
                    calibration=calibration,
                    progress=lambda what, done, total: None,
                )
                found[name, scheme] = onnx.load(str(artifact / "model.onnx"), load_external_data=False)
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


@pytest.mark.parametrize("scheme", TARGETS["cuda"])
@pytest.mark.parametrize("name", NAMES)
def test_every_node_conforms_to_its_schema(directory: Path, name: str, scheme: str) -> None:
    model = graphs(directory)[name, scheme]
    assert {opset.domain: opset.version for opset in model.opset_import}.items() <= DOMAIN_VERSIONS.items()
    types = check_graph(model.graph)
    activations = "tensor(float16)" if scheme == "fp16" else "tensor(bfloat16)"
    attention = [node for node in model.graph.node if node.op_type == "PagedAttention"]
    assert len(attention) == 2
    assert all(types[node.output[0]] == activations for node in attention)
    assert types["logits"] == "tensor(float)"


def test_the_graphs_use_these_operators_of_others_and_no_more(directory: Path) -> None:
    used = {(node.domain, node.op_type) for model in graphs(directory).values() for node in model.graph.node}
    assert {op_type for domain, op_type in used if domain == MICROSOFT} == {
        "PagedAttention",
        "MatMulNBits",
        "QuickGelu",
    }
    assert {op_type for domain, op_type in used if domain == STANDARD} == {
        *("Gather", "Cast", "Split", "Mul", "Add", "SimplifiedLayerNormalization")
    }


BROKEN: Mapping[str, tuple[Mapping[int | str, Any], str]] = {
    "an attribute that does not exist": ({"window": 4}, "unknown attributes"),
    "an attribute of another type": ({"num_heads": 4.0}, "num_heads is FLOAT, the schema says INT"),
    "a missing attribute": ({"num_heads": None}, "num_heads is required"),
    "a missing input": ({3: ""}, "key_cache is required"),
    "an input of a type that is not allowed": ({5: "input_ids"}, "cumulative_sequence_length is tensor\\(int64\\)"),
    "two types for one variable": ({12: "half"}, "T is tensor\\(bfloat16\\) elsewhere"),
    "too many inputs": ({17: "cu_seqlens"}, "18 of"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_node_that_does_not_conform_is_found(directory: Path, what: str) -> None:
    changes, message = BROKEN[what]
    model = onnx.ModelProto()
    model.CopyFrom(graphs(directory)["qwen3", "bf16"])
    model.graph.input.append(helper.make_tensor_value_info("half", TensorProto.FLOAT16, [16]))
    node = next(node for node in model.graph.node if node.op_type == "PagedAttention")
    for key, value in changes.items():
        if isinstance(key, int):
            names = [*node.input, ""][: max(len(node.input), key + 1)]
            names[key] = value
            del node.input[:]
            node.input.extend(names)
        else:
            kept = [attribute for attribute in node.attribute if attribute.name != key]
            del node.attribute[:]
            node.attribute.extend(kept)
            if value is not None:
                node.attribute.append(helper.make_attribute(key, value))
    with pytest.raises(Violation, match=message):
        check_graph(model.graph)

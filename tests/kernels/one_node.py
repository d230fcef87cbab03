"""Graphs of one operator, for tests of the operators inside ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph, RuntimeException

from kernels.loader import library_path

Tensor = NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class OneNode:
    """An operator with its inputs in order: None = absent; `constants` are initializers, the others graph inputs."""

    operator: str
    inputs: dict[str, Tensor | None]
    constants: frozenset[str] = frozenset()
    attributes: dict[str, int | float | str] = field(default_factory=dict)
    output: type[np.generic] = np.float32

    def replaced(self, name: str, tensor: Tensor | None) -> OneNode:
        """The same node with another tensor for one input."""
        return OneNode(self.operator, {**self.inputs, name: tensor}, self.constants, self.attributes, self.output)

    def with_attributes(self, **attributes: int | float | str | None) -> OneNode:
        """The same node with other attributes; None takes one away."""
        merged = {name: value for name, value in {**self.attributes, **attributes}.items() if value is not None}
        return OneNode(self.operator, self.inputs, self.constants, merged, self.output)

    def all_computed(self) -> OneNode:
        """The same node with every input a graph input."""
        return OneNode(self.operator, self.inputs, frozenset(), self.attributes, self.output)


def open_session(node: OneNode, threads: int = 2) -> ort.InferenceSession:
    """The node in ONNX Runtime, with our library registered."""
    names = [name if tensor is not None else "" for name, tensor in node.inputs.items()]
    while names and not names[-1]:
        names.pop()  # absent at the end: not named at all
    present = {name: tensor for name, tensor in node.inputs.items() if tensor is not None}
    graph = helper.make_graph(
        nodes=[_make_node(node, names)],
        name="one",
        inputs=[_graph_input(name, tensor) for name, tensor in present.items() if name not in node.constants],
        outputs=[helper.make_tensor_value_info("y", helper.np_dtype_to_tensor_dtype(np.dtype(node.output)), None)],
        initializer=[
            numpy_helper.from_array(tensor, name) for name, tensor in present.items() if name in node.constants
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("millrace", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # failures are expected here; their messages are what is tested
    options.register_custom_ops_library(str(library_path()))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _make_node(node: OneNode, names: list[str]) -> onnx.NodeProto:
    proto = helper.make_node(node.operator, names, ["y"], domain="millrace")
    proto.attribute.extend(helper.make_attribute(name, value) for name, value in node.attributes.items())
    return proto


def _graph_input(name: str, tensor: Tensor) -> onnx.ValueInfoProto:
    dims = [f"{name}_{axis}" for axis in range(tensor.ndim)]
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(tensor.dtype), dims)


def run(node: OneNode, threads: int = 2) -> Tensor:
    """The node's output."""
    feeds = {name: tensor for name, tensor in node.inputs.items() if tensor is not None and name not in node.constants}
    result: Tensor = open_session(node, threads).run(["y"], feeds)[0]
    return result


def failure(node: OneNode) -> str:
    """What ONNX Runtime says when it opens or runs the node; raises AssertionError if it does neither complain."""
    try:
        run(node)
    except (Fail, InvalidArgument, InvalidGraph, RuntimeException) as error:
        return str(error)
    raise AssertionError(f"{node.operator} accepted {node.inputs}")

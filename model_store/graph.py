"""A typed writer of ONNX graphs.

Every value carries its dtype and shape, and a node is checked against what it promises while it is written, so a
mistake is found at the line that makes it. Nodes are named by address (/layers.3/attention), their outputs after them;
initializers lie in weights.bin as external data; constants are shared by value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import ml_dtypes  # noqa: F401 (teaches numpy the names bfloat16, float8_e4m3fn and int4)
import numpy as np
import onnx
from numpy.typing import NDArray

from model_store.manifest import WEIGHTS_FILE
from model_store.weight_file import WeightFile

OUR_DOMAIN: Final = "millrace"
MICROSOFT: Final = "com.microsoft"  # ONNX Runtime's own operators
STANDARD: Final = ""
DOMAIN_VERSIONS: Final = {STANDARD: 21, OUR_DOMAIN: 1, MICROSOFT: 1}
IR_VERSION: Final = 10

Dim = int | str  # a number, or the name of an extent known at run time
Attribute = int | float | str

ELEMENT_TYPES: Final[dict[str, int]] = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "float8_e4m3fn": onnx.TensorProto.FLOAT8E4M3FN,
    "uint8": onnx.TensorProto.UINT8,
    "int8": onnx.TensorProto.INT8,
    "int4": onnx.TensorProto.INT4,
    "int32": onnx.TensorProto.INT32,
    "int64": onnx.TensorProto.INT64,
}


class GraphError(Exception):
    """The graph being written does not fit together: a bug of the writer's caller."""


@dataclass(frozen=True, slots=True)
class Value:
    """An edge of the graph."""

    name: str
    dtype: str  # numpy name
    shape: tuple[Dim, ...]

    def expect(self, dtype: str, *shape: Dim) -> Value:
        """This value, if it has this type. Raises GraphError."""
        if self.dtype != dtype or self.shape != shape:
            raise GraphError(f"{self.name} is {self.dtype}{list(self.shape)}; expected {dtype}{list(shape)}")
        return self


class Graph:
    """One graph under construction."""

    def __init__(self, name: str, weights: WeightFile) -> None:
        self._graph = onnx.GraphProto(name=name)
        self._weights = weights
        self._names: set[str] = set()
        self._domains = {STANDARD}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Value] = {}
        self._joint = ":"

    def join_names_with(self, joint: str) -> None:
        """What stands between an address and "out" in the names of values to come (some runtimes parse names)."""
        self._joint = joint

    def input(self, name: str, dtype: str, *shape: Dim) -> Value:
        """A graph input."""
        value = self._value(name, dtype, shape)
        self._graph.input.append(_value_info(value))
        return value

    def output(self, value: Value) -> None:
        """Make `value` a graph output under its own name."""
        self._graph.output.append(_value_info(value))

    def declare(self, value: Value) -> None:
        """State the type of a value inside the graph, for runtimes that must know it before they divide the graph."""
        self._graph.value_info.append(_value_info(value))

    def weight(self, name: str, dtype: str, shape: tuple[int, ...], pieces: Iterable[NDArray[np.generic]]) -> Value:
        """An initializer whose bytes arrive in `pieces` and go straight to the weight file.

        Pieces of int4 hold an even number of elements each; in the file two share a byte.
        """
        value = self._value(name, dtype, shape)
        num_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        if dtype == "int4":
            num_bytes //= 2
            pieces = map(_pack_pairs, pieces)
        span = self._weights.append(num_bytes, pieces)
        tensor = self._graph.initializer.add(name=name, data_type=ELEMENT_TYPES[dtype], dims=shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, text in (("location", WEIGHTS_FILE), ("offset", str(span.offset)), ("length", str(span.num_bytes))):
            tensor.external_data.add(key=key, value=text)
        return value

    def constant(self, name: str, array: NDArray[np.generic]) -> Value:
        """An initializer, or the one that was written before with the same dtype, shape and bytes."""
        array = np.asarray(array, order="C")  # ascontiguousarray would make a vector of a scalar
        key = (array.dtype.name, array.shape, hashlib.sha256(array.reshape(-1).view(np.uint8).data).digest())
        if key not in self._constants:
            self._constants[key] = self.weight(name, array.dtype.name, array.shape, [array])
        return self._constants[key]

    def node(
        self,
        op_type: str,
        address: str,
        inputs: Sequence[Value | None],
        dtype: str,
        *shape: Dim,
        domain: str = OUR_DOMAIN,
        output_name: str | None = None,
        slot: int = 0,
        **attributes: Attribute,
    ) -> Value:
        """A node with one output of `dtype` and `shape`, the operator's output number `slot`.

        An input of None is left out, as ONNX spells it; so are the outputs before `slot`.
        """
        output = self._value(output_name or f"{address}{self._joint}out", dtype, shape)
        self._write(op_type, address, domain, inputs, [*[""] * slot, output.name], attributes)
        return output

    def halves(self, address: str, x: Value) -> tuple[Value, Value]:
        """The left and the right half of x [rows, 2N]: [rows, N] each."""
        rows, width = x.shape
        if not isinstance(width, int) or width % 2:
            raise GraphError(f"{address} halves {x.name}, which is {list(x.shape)}")
        sides = (f"{address}{self._joint}{side}" for side in ("left", "right"))
        left, right = (self._value(side, x.dtype, (rows, width // 2)) for side in sides)
        names = [left.name, right.name]
        self._write("Split", address, STANDARD, [x], names, {"axis": 1, "num_outputs": 2})
        return left, right

    def _write(
        self,
        op_type: str,
        address: str,
        domain: str,
        inputs: Sequence[Value | None],
        outputs: Sequence[str],
        attributes: Mapping[str, Attribute],
    ) -> None:
        names = ["" if value is None else value.name for value in inputs]
        while names and not names[-1]:
            names.pop()
        for name in names:
            if name and name not in self._names:
                raise GraphError(f"{address} reads {name}, which nothing wrote")
        node = self._graph.node.add(op_type=op_type, name=address, domain=domain, input=names, output=outputs)
        self._domains.add(domain)
        for key, value in attributes.items():
            node.attribute.append(onnx.helper.make_attribute(key, value))

    def model(self) -> onnx.ModelProto:
        """The finished model."""
        model = onnx.ModelProto(ir_version=IR_VERSION, producer_name="millrace", graph=self._graph)
        for domain in sorted(self._domains):
            model.opset_import.add(domain=domain, version=DOMAIN_VERSIONS[domain])
        return model

    def _value(self, name: str, dtype: str, shape: tuple[Dim, ...]) -> Value:
        if name in self._names:
            raise GraphError(f"{name} is written twice")
        if dtype not in ELEMENT_TYPES:
            raise GraphError(f"{name} has dtype {dtype}; known are {', '.join(ELEMENT_TYPES)}")
        if any(isinstance(dim, int) and dim < 1 for dim in shape):
            raise GraphError(f"{name} has shape {list(shape)}")
        self._names.add(name)
        return Value(name, dtype, shape)


def _pack_pairs(codes: NDArray[np.generic]) -> NDArray[np.generic]:
    """int4, one a byte -> two a byte, the first in the lower half (onnx.proto, TensorProto.raw_data)."""
    pairs = codes.reshape(-1, 2).astype(np.int8).view(np.uint8) & np.uint8(15)
    packed: NDArray[np.generic] = pairs[:, 0] | (pairs[:, 1] << np.uint8(4))
    return packed


def _value_info(value: Value) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(value.name, ELEMENT_TYPES[value.dtype], value.shape)

"""The ONNX writer: mistakes are found where they are made, and bytes lie where the graph says."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from model_store.graph import Graph, GraphError
from model_store.weight_file import WeightFile


def test_a_value_of_another_type_is_refused_by_name(tmp_path: Path) -> None:
    with WeightFile(tmp_path / "weights.bin") as weights:
        graph = Graph("g", weights)
        x = graph.input("x", "float32", "T", 8)
        assert x.expect("float32", "T", 8) is x
        for dtype, shape in (("float16", ("T", 8)), ("float32", ("R", 8)), ("float32", ("T", 9)), ("float32", ("T",))):
            with pytest.raises(GraphError, match=r"x is float32\['T', 8\]; expected"):
                x.expect(dtype, *shape)
        with pytest.raises(GraphError, match="written twice"):
            graph.input("x", "float32", "T", 8)
        with pytest.raises(GraphError, match="shape"):
            graph.input("y", "float32", 0)
        with pytest.raises(GraphError, match="dtype"):
            graph.input("z", "float64", 1)


def test_a_node_cannot_read_what_nothing_wrote(tmp_path: Path) -> None:
    with WeightFile(tmp_path / "weights.bin") as weights:
        other = Graph("other", weights).input("x", "float32", "T")
        with pytest.raises(GraphError, match="/op reads x"):
            Graph("g", weights).node("Op", "/op", [other], "float32", "T")


def test_nodes_are_named_by_address_and_optional_inputs_are_left_out(tmp_path: Path) -> None:
    with WeightFile(tmp_path / "weights.bin") as weights:
        graph = Graph("g", weights)
        x, y = graph.input("x", "float32", "T"), graph.input("y", "float32", "T")
        z = graph.node("Op", "/layers.3/op", [x, None, y, None], "float32", "T", N=3, scale=0.5, mode="none")
        graph.output(z)
        model = graph.model()
    (node,) = model.graph.node
    assert (node.name, node.domain, list(node.input), list(node.output)) == (
        "/layers.3/op",
        "millrace",
        ["x", "", "y"],
        ["/layers.3/op:out"],
    )
    assert {a.name: a.type for a in node.attribute} == {"N": 2, "scale": 1, "mode": 3}  # INT, FLOAT, STRING
    assert [output.name for output in model.graph.output] == ["/layers.3/op:out"]


def test_tensors_lie_aligned_where_the_graph_says(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    small, large = np.arange(5, dtype=np.int32), np.arange(1 << 15, dtype=np.float32).reshape(1 << 7, -1)
    with WeightFile(path) as weights:
        graph = Graph("g", weights)
        graph.constant("small", small)
        graph.weight("large", "float32", large.shape, [large[:50], large[50:50], large[50:]])
        entry = weights.entry()
        tensors = {
            tensor.name: {e.key: e.value for e in tensor.external_data} for tensor in graph.model().graph.initializer
        }
    raw = path.read_bytes()
    assert entry.sha256 == hashlib.sha256(raw).hexdigest()
    assert entry.size_bytes == len(raw)
    for name, array, alignment in (("small", small, 64), ("large", large, 4096)):
        offset, length = int(tensors[name]["offset"]), int(tensors[name]["length"])
        assert tensors[name]["location"] == "weights.bin"
        assert offset % alignment == 0
        assert raw[offset : offset + length] == array.tobytes()


def test_equal_constants_are_stored_once(tmp_path: Path) -> None:
    with WeightFile(tmp_path / "weights.bin") as weights:
        graph = Graph("g", weights)
        ones = graph.constant("a", np.ones(4, np.float32))
        assert graph.constant("b", np.ones(4, np.float32)) is ones
        assert graph.constant("c", np.ones((2, 2), np.float32)) is not ones
        assert graph.constant("d", np.full(4, 2, np.float32)) is not ones
        assert graph.constant("e", np.ones(4, np.float32).view(np.int32)) is not ones


def test_a_tensor_with_too_few_bytes_is_a_bug(tmp_path: Path) -> None:
    with (
        WeightFile(tmp_path / "weights.bin") as weights,
        pytest.raises(ValueError, match="32 bytes got 16; this is a bug"),
    ):
        Graph("g", weights).weight("w", "float32", (8,), [np.zeros(4, np.float32)])

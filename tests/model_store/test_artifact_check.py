"""Graphs that somebody else wrote: every way out of the artifact's directory and every foreign operator is refused."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import onnx
import pytest
from onnx import TensorProto, helper

from model_store.artifact_check import check_artifact
from model_store.errors import BadArtifact
from model_store.manifest import FileEntry
from tests.model_store.test_store import MANIFEST

Edit = Callable[[onnx.ModelProto], object]


def external(location: str = "weights.bin", offset: str = "0", length: str = "16", **more: str) -> onnx.TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": offset, "length": length, **more}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def doubled(tensor: onnx.TensorProto) -> onnx.TensorProto:
    tensor.external_data.add(key="location", value="/etc/passwd")
    return tensor


def hidden(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """Not marked as external, but with the fields of it."""
    tensor.data_location = TensorProto.DEFAULT
    return tensor


def model_of(edit: Edit) -> bytes:
    graph = helper.make_graph([helper.make_node("Op", [], ["y"], domain="millrace")], "g", [], [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("millrace", 1)])
    edit(model)
    return bytes(model.SerializeToString())


def check(directory: Path, graph: bytes) -> None:
    contents = {"model.onnx": graph, "weights.bin": bytes(64), "tokenizer.json": b"{}", "manifest.json": b"{}"}
    for name, raw in contents.items():
        (directory / name).write_bytes(raw)
    del contents["manifest.json"]
    files = {name: FileEntry(hashlib.sha256(raw).hexdigest(), len(raw)) for name, raw in contents.items()}
    check_artifact(directory, msgspec.structs.replace(MANIFEST, files=files))


def initializer(tensor: onnx.TensorProto) -> Edit:
    return lambda model: model.graph.initializer.append(tensor)


def constant_value(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=external("../weights.bin")))


def sparse_initializer(model: onnx.ModelProto) -> None:
    values, indices = external("../weights.bin"), helper.make_tensor("i", TensorProto.INT64, [4], [0, 1, 2, 3])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [8]))


def sparse_constant(model: onnx.ModelProto) -> None:
    values, indices = helper.make_tensor("v", TensorProto.FLOAT, [1], [0.0]), external("../weights.bin")
    sparse = helper.make_sparse_tensor(values, indices, [8])
    model.graph.node.append(helper.make_node("Constant", [], ["c"], sparse_value=sparse))


def subgraph(inner: onnx.NodeProto | None = None) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        branch = helper.make_graph([inner] if inner else [], "branch", [], [])
        if inner is None:
            branch.initializer.append(external("../weights.bin"))
        deeper = helper.make_graph([helper.make_node("If", ["x"], ["z"], then_branch=branch)], "outer", [], [])
        model.graph.node.append(helper.make_node("Loop", ["x"], ["y2"], body=deeper))

    return edit


def function(model: onnx.ModelProto) -> None:
    opsets = [helper.make_opsetid("", 21)]
    model.functions.append(helper.make_function("millrace", "Op", [], ["y"], [], opsets))


def training(model: onnx.ModelProto) -> None:
    model.training_info.add().initialization.initializer.append(external("../weights.bin"))


def foreign_node(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("PyOp", [], ["p"], domain="ai.onnx.contrib"))


def compiled_elsewhere(model: onnx.ModelProto) -> None:
    """ONNX Runtime's own operator for engines: it opens the file that its attribute names."""
    node = helper.make_node(
        "EPContext", [], ["p"], domain="com.microsoft", ep_cache_context="../engine.bin", embed_mode=0
    )
    model.graph.node.append(node)


def of_onnx_runtime(op_type: str) -> Edit:
    return lambda model: model.graph.node.append(helper.make_node(op_type, [], ["p"], domain="com.microsoft"))


HOSTILE: dict[str, tuple[Edit, str]] = {
    "parent directory": (initializer(external("../weights.bin")), "'../weights.bin', which is not a file"),
    "detour": (initializer(external("a/../weights.bin")), "not a file of this artifact"),
    "absolute path": (initializer(external("/etc/passwd")), "'/etc/passwd'"),
    "backslash": (initializer(external("..\\weights.bin")), "not a file of this artifact"),
    "empty": (initializer(external("")), "not a file of this artifact"),
    "a file that the manifest does not list": (initializer(external("other.bin")), "'other.bin'"),
    "the manifest": (initializer(external("manifest.json")), "'manifest.json'"),
    "memory addresses": (initializer(external("*/_ORT_MEM_ADDR_/*")), "not a file of this artifact"),
    "past the end": (initializer(external(offset="60")), "ends at byte 76 of weights.bin, which has 64"),
    "negative offset": (initializer(external(offset="-16")), "offset '-16'"),
    "odd digits": (initializer(external(offset="١")), "offset '١'"),
    "a further key": (initializer(external(basepath="/etc")), "expected location, offset and length, once each"),
    "a key twice": (initializer(doubled(external())), "once each"),
    "fields without the mark": (initializer(hidden(external())), "once each"),
    "Constant": (constant_value, "'../weights.bin'"),
    "sparse initializer": (sparse_initializer, "'../weights.bin'"),
    "sparse Constant": (sparse_constant, "'../weights.bin'"),
    "subgraph of a subgraph": (subgraph(), "'../weights.bin'"),
    "foreign operator in a subgraph": (
        subgraph(helper.make_node("PyOp", [], ["p"], domain="ai.onnx.contrib")),
        "operator domain 'ai.onnx.contrib'",
    ),
    "foreign operator": (foreign_node, "operator domain 'ai.onnx.contrib'"),
    "an operator of ONNX Runtime that reads files": (compiled_elsewhere, "uses com.microsoft:EPContext"),
    "an operator of ONNX Runtime that we never write": (of_onnx_runtime("FusedMatMul"), "com.microsoft:FusedMatMul"),
    "the same in a subgraph": (
        subgraph(helper.make_node("EPContext", [], ["p"], domain="com.microsoft")),
        "uses com.microsoft:EPContext",
    ),
    "foreign opset": (lambda model: model.opset_import.append(helper.make_opsetid("evil", 1)), "'evil'"),
    "function": (function, "functions or training parts"),
    "training part": (training, "functions or training parts"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_graph_is_refused_before_anything_opens_it(tmp_path: Path, what: str) -> None:
    edit, message = HOSTILE[what]
    with pytest.raises(BadArtifact) as caught:
        check(tmp_path, model_of(edit))
    assert message in caught.value.message


def test_external_data_in_a_listed_file_passes(tmp_path: Path) -> None:
    check(tmp_path, model_of(initializer(external(offset="48"))))


@pytest.mark.parametrize("op_type", ["PagedAttention", "MatMulNBits", "QuickGelu"])
def test_the_operators_of_onnx_runtime_that_we_write_pass(tmp_path: Path, op_type: str) -> None:
    check(tmp_path, model_of(of_onnx_runtime(op_type)))


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadArtifact, match="not an ONNX model"):
        check(tmp_path, b"\x80\x04K\x01.")


def test_a_graph_that_is_too_large_to_be_ours_is_refused_unread(tmp_path: Path) -> None:
    check(tmp_path, model_of(lambda _: None))
    os.truncate(tmp_path / "model.onnx", (64 << 20) + 1)
    entry = FileEntry("0" * 64, (64 << 20) + 1)
    files = {"model.onnx": entry, "weights.bin": FileEntry("0" * 64, 64), "tokenizer.json": FileEntry("0" * 64, 2)}
    with pytest.raises(BadArtifact, match="the limit is 67,108,864"):
        check_artifact(tmp_path, msgspec.structs.replace(MANIFEST, files=files), with_hashes=False)

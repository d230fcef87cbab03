"""Look at an artifact as if somebody hostile had written it, before ONNX Runtime opens it.

ONNX Runtime follows what a model file says: external data is a path and an offset, an operator is a name in a domain.
Fixes upstream came in rounds (parent directories, links, hard links, sparse tensors), so every message of the file is
visited, not a list of known places, and only what our own writer produces passes.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from model_store.errors import BadArtifact
from model_store.manifest import GRAPH_FILE, MANIFEST_FILE, TOKENIZER_FILE, WEIGHTS_FILE, ModelManifest
from model_store.source_files import is_plain_name, sha256_of

if TYPE_CHECKING:
    import onnx


class _Field(Protocol):
    """A protobuf field's descriptor; `message_type` is None for numbers and bytes."""

    message_type: object


class _Message(Protocol):
    """Any protobuf message."""

    def ListFields(self) -> Sequence[tuple[_Field, Any]]: ...  # noqa: N802 (protobuf's name)


DOMAINS = frozenset({"", "millrace", "com.microsoft"})
# Of ONNX Runtime's own operators, those our writers use; others (EPContext) read files by a path in an attribute.
MICROSOFT_OPERATORS = frozenset({"PagedAttention", "MatMulNBits", "QuickGelu"})
MAX_GRAPH_BYTES = 64 << 20  # weights are outside; the largest graphs have a few hundred kB
EXTERNAL_KEYS = frozenset({"location", "offset", "length"})


def check_artifact(directory: Path, manifest: ModelManifest, *, with_hashes: bool = True) -> None:
    """Everything about the artifact in `directory` that can be checked without running it. Raises BadArtifact.

    Without hashes only names, sizes and the graph are looked at: milliseconds, whatever the size of the weights.
    """
    check_files(directory, manifest)
    if with_hashes:
        for name, entry in manifest.files.items():
            if sha256_of(directory / name) != entry.sha256:
                raise BadArtifact(f"{manifest.model_id}: {name} has changed since it was stored (SHA-256 differs)")
    check_graph(directory, manifest)


def check_files(directory: Path, manifest: ModelManifest) -> None:
    """The directory holds the manifest's files and nothing else; each is regular, has one name and its size."""
    for name in (GRAPH_FILE, WEIGHTS_FILE, TOKENIZER_FILE):
        if name not in manifest.files:
            raise BadArtifact(f"{manifest.model_id}: the manifest does not list {name}")
    if not stat.S_ISDIR(os.lstat(directory).st_mode):
        raise BadArtifact(f"{manifest.model_id}: {directory.name} is not a directory of its own")
    expected = {MANIFEST_FILE, *manifest.files}
    if found := set(os.listdir(directory)) ^ expected:
        kind = "is missing" if (name := min(found)) in expected else "is not in the manifest"
        raise BadArtifact(f"{manifest.model_id}: {name} {kind}")
    for name in sorted(expected):
        status = os.lstat(directory / name)
        if not is_plain_name(name) or not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise BadArtifact(f"{manifest.model_id}: {name} is a link or not a regular file")
        if name in manifest.files and status.st_size != manifest.files[name].size_bytes:
            size_bytes = manifest.files[name].size_bytes
            raise BadArtifact(
                f"{manifest.model_id}: {name} has {status.st_size:,} bytes; the manifest says {size_bytes:,}"
            )


def check_graph(directory: Path, manifest: ModelManifest) -> None:
    """Every message in the graph: domains, external data, and no functions or training parts that could hide either."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    path = directory / GRAPH_FILE
    if (size_bytes := path.stat().st_size) > MAX_GRAPH_BYTES:
        raise BadArtifact(
            f"{manifest.model_id}: {GRAPH_FILE} has {size_bytes:,} bytes; the limit is {MAX_GRAPH_BYTES:,}"
        )
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise BadArtifact(f"{manifest.model_id}: {GRAPH_FILE} is not an ONNX model: {error}") from error
    if model.functions or model.training_info:
        raise BadArtifact(f"{manifest.model_id}: {GRAPH_FILE} has functions or training parts, which we never write")
    for message in _messages(model):
        if isinstance(message, onnx.OperatorSetIdProto | onnx.NodeProto) and message.domain not in DOMAINS:
            raise BadArtifact(f"{manifest.model_id}: {GRAPH_FILE} uses the operator domain {message.domain[:80]!r}")
        if isinstance(message, onnx.NodeProto):
            _check_operator(message, manifest)
        if isinstance(message, onnx.TensorProto):
            _check_tensor(message, manifest)


def _messages(message: _Message) -> Iterator[_Message]:
    """`message` and every message inside it, wherever it hangs."""
    pending = [message]
    while pending:
        current = pending.pop()
        yield current
        for field, value in current.ListFields():
            if field.message_type is not None:
                pending += [value] if hasattr(value, "ListFields") else value


def _check_operator(node: onnx.NodeProto, manifest: ModelManifest) -> None:
    if node.domain == "com.microsoft" and node.op_type not in MICROSOFT_OPERATORS:
        raise BadArtifact(f"{manifest.model_id}: {GRAPH_FILE} uses com.microsoft:{node.op_type[:80]}")


def _check_tensor(tensor: onnx.TensorProto, manifest: ModelManifest) -> None:
    if not tensor.external_data and tensor.data_location == 0:
        return
    where = f"{manifest.model_id}: {GRAPH_FILE}: tensor {tensor.name[:80]!r}"
    given = {item.key: item.value for item in tensor.external_data}
    if set(given) != EXTERNAL_KEYS or len(tensor.external_data) != len(EXTERNAL_KEYS) or tensor.data_location != 1:
        raise BadArtifact(f"{where} has external data {sorted(given)}; expected location, offset and length, once each")
    location = given["location"]
    if not is_plain_name(location) or location not in manifest.files or location == GRAPH_FILE:
        raise BadArtifact(f"{where} reads {location[:80]!r}, which is not a file of this artifact")
    if not (
        given["offset"].isascii()
        and given["offset"].isdigit()
        and given["length"].isascii()
        and given["length"].isdigit()
    ):
        raise BadArtifact(f"{where} has the offset {given['offset'][:20]!r} and the length {given['length'][:20]!r}")
    end = int(given["offset"]) + int(given["length"])
    if end > manifest.files[location].size_bytes:
        raise BadArtifact(
            f"{where} ends at byte {end:,} of {location}, which has {manifest.files[location].size_bytes:,}"
        )

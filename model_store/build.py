"""Write an artifact: checkpoint + scheme + target -> model.onnx, weights.bin, tokenizer.json and what a manifest says.

Apart from importing.py, which decides whether the result may enter the store.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from model_store.calibration import Calibration
from model_store.checkpoint import Checkpoint
from model_store.decoder import count_matrices, write_decoder
from model_store.graph import Graph
from model_store.manifest import (
    GRAPH_FILE,
    MANIFEST_VERSION,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    FileEntry,
    Geometry,
    ModelManifest,
)
from model_store.spec import DecoderSpec
from model_store.targets import Choice
from model_store.weight_file import WeightFile
from model_store.weight_packer import Progress, WeightPacker


def build_artifact(
    checkpoint: Checkpoint,
    directory: Path,
    *,
    name: str,
    revision: str,
    target: str,
    choice: Choice,
    calibration: Calibration | None,
    progress: Progress,
) -> ModelManifest:
    """Write the artifact's files into the empty `directory`; return the manifest that describes them, not written."""
    spec, tokenizer, scheme = checkpoint.spec, checkpoint.tokenizer, choice.scheme
    nodes = choice.nodes(scheme, calibration)
    with WeightFile(directory / WEIGHTS_FILE) as weights:
        graph = Graph(f"{spec.architecture} {scheme.name} {target}", weights)
        with WeightPacker(graph, scheme, count_matrices(spec), progress) as packer:
            write_decoder(graph, spec, nodes, packer, checkpoint.tensors)
        entries = {WEIGHTS_FILE: weights.entry()}
    contents = {
        GRAPH_FILE: graph.model().SerializeToString(deterministic=True),
        TOKENIZER_FILE: (checkpoint.directory / TOKENIZER_FILE).read_bytes(),
    }
    for file_name, raw in contents.items():
        (directory / file_name).write_bytes(raw)
        entries[file_name] = FileEntry(hashlib.sha256(raw).hexdigest(), len(raw))
    return ModelManifest(
        manifest_version=MANIFEST_VERSION,
        name=name,
        revision=revision,
        architecture=spec.architecture,
        scheme=scheme.name,
        target=target,
        geometry=_geometry(spec),
        kv_cache=nodes.kv_cache(spec),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=list(tokenizer.eos_token_ids),
        num_parameters=checkpoint.num_parameters,
        chat_template=tokenizer.chat_template,
        special_tokens=tokenizer.special_tokens,
        files=entries,
        activations=scheme.activations,
    )


def _geometry(spec: DecoderSpec) -> Geometry:
    return Geometry(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        intermediate_size=spec.intermediate_size,
        vocab_size=spec.vocab_size,
        max_model_len=spec.max_model_len,
    )

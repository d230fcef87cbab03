"""Import a model: build it, look at what was built, prove it against the checkpoint, then let it into the store.

Light to import: a server that starts asks revision_of_source whether its shipped model is stored already, and only a
build brings in ONNX.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from model_store.checkpoint import Checkpoint, checkpoint_files, open_checkpoint
from model_store.errors import ParityError
from model_store.manifest import ModelManifest, Parity, write_manifest
from model_store.parity import Candidate, measure, parity_prompts
from model_store.quantization import SCHEMES
from model_store.reference import reference_logits
from model_store.source_files import digest_of_files
from model_store.store import Store, check_name
from wire.errors import BadRequest, UnknownModel

if TYPE_CHECKING:
    from model_store.weight_packer import Progress

# Part of every revision: raise it when the same checkpoint would give other bytes (packing, quantization, operators).
BUILDER_VERSION: Final = 1

# Opens the artifact in a directory and gives what computes logits [T, V] for token ids [T]; closes it afterwards.
CandidateFactory = Callable[[Path, ModelManifest], AbstractContextManager[Candidate]]


def revision_of_source(source_dir: Path, scheme: str, target: str = "cpu") -> str:
    """The revision that importing `source_dir` gives, on every machine. Reads its files whole. Raises BadCheckpoint."""
    return digest_of_files(checkpoint_files(source_dir), f"builder {BUILDER_VERSION}", scheme, target)[:12]


def import_model(
    source_dir: Path,
    store: Store,
    name: str,
    *,
    scheme: str,
    target: str = "cpu",
    candidate_factory: CandidateFactory,
    progress: Progress,
    parity_bound: float | None = None,
) -> ModelManifest:
    """Import the Hugging Face directory `source_dir` as `name` and make it what the bare name means.

    `parity_bound` (largest relative error of a row of logits) defaults to the scheme's. A revision that is in the
    store already is not built again. Raises BadCheckpoint for a source we cannot import, BadRequest for an unknown
    scheme, target or name, ParityError if the artifact computes something else; the store is then as it was.
    """
    from model_store.artifact_check import check_artifact
    from model_store.build import build_artifact
    from model_store.targets import TARGETS

    check_name(name)
    for what, given, table in (("scheme", scheme, SCHEMES), ("target", target, TARGETS)):
        if given not in table:
            raise BadRequest(f"unknown {what} {given[:80]!r}; known are {', '.join(table)}", param=what)
    chosen = SCHEMES[scheme]
    bound = chosen.parity_bound if parity_bound is None else parity_bound
    revision = revision_of_source(source_dir, scheme, target)
    if stored := _stored(store, f"{name}@{revision}", bound):
        return store.make_live(stored.model_id)
    with open_checkpoint(source_dir) as checkpoint, store.workspace() as directory:
        built = build_artifact(
            checkpoint, directory, name=name, revision=revision, scheme=chosen, target=target, progress=progress
        )
        write_manifest(directory, built)
        check_artifact(directory, built, with_hashes=False)
        progress("comparing", 0, 1)
        parity = prove(checkpoint, directory, built, candidate_factory, bound)
        progress("comparing", 1, 1)
        write_manifest(directory, msgspec.structs.replace(built, parity=parity))
        return store.put(directory)


def _stored(store: Store, model_id: str, bound: float) -> ModelManifest | None:
    """The model, if it is in the store. Raises ParityError if it was let in under a weaker bound."""
    try:
        manifest = store.show(model_id)
    except UnknownModel:
        return None
    if manifest.parity is None or manifest.parity.max_relative_error > bound:
        raise ParityError(f"{model_id} is stored, but not within the bound {bound:g}: {manifest.parity}")
    return manifest


def prove(
    checkpoint: Checkpoint, directory: Path, manifest: ModelManifest, candidate_factory: CandidateFactory, bound: float
) -> Parity:
    """How far the artifact is from its checkpoint on the standard prompts. Raises ParityError over `bound`."""
    prompts = parity_prompts(manifest.geometry.vocab_size, manifest.geometry.max_model_len)
    with candidate_factory(directory, manifest) as candidate:
        return measure(partial(reference_logits, checkpoint), candidate, prompts, bound)

"""Import a model: build it, look at what was built, prove it against the checkpoint, then let it into the store.

Light to import: a server that starts asks revision_of_source whether its shipped model is stored already, and only a
build brings in ONNX.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from model_store.checkpoint import checkpoint_files, open_checkpoint
from model_store.errors import ParityError
from model_store.manifest import ModelManifest, Parity, write_manifest
from model_store.parity import Candidate, Reference, TokenIds, measure, parity_prompts
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


def revision_of_source(
    source_dir: Path, scheme: str, target: str = "cpu", calibration_ids: Sequence[TokenIds] = ()
) -> str:
    """The revision that importing `source_dir` gives, on every machine. Reads its files whole. Raises BadCheckpoint."""
    facts = [f"builder {BUILDER_VERSION}", scheme, target]
    facts += [",".join(str(token_id) for token_id in sequence) for sequence in calibration_ids]
    return digest_of_files(checkpoint_files(source_dir), *facts)[:12]


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
    calibration_ids: Sequence[TokenIds] = (),
    reference: Reference | None = None,
) -> ModelManifest:
    """Import the Hugging Face directory `source_dir` as `name` and make it what the bare name means.

    `parity_bound` (largest relative error of a row of logits) defaults to the scheme's. `calibration_ids`: token ids
    of text to measure ranges on, for the schemes that need it. `reference`: what computes the checkpoint's logits in
    float32 (default: reference.py, on the CPU). A revision that is in the store already is not built again. Raises
    BadCheckpoint for a source we cannot import, BadRequest for an unknown scheme, target or name and for calibration
    that is missing, ParityError if the artifact computes something else; the store is then as it was.
    """
    from model_store.artifact_check import check_artifact
    from model_store.build import build_artifact
    from model_store.calibration import calibrate
    from model_store.targets import choose

    check_name(name)
    choice = choose(target, scheme)
    if choice.scheme.needs_calibration and not calibration_ids:
        raise BadRequest(f"scheme {scheme} measures ranges on text: give calibration text", param="calibration")
    bound = choice.scheme.parity_bound if parity_bound is None else parity_bound
    used = calibration_ids if choice.scheme.needs_calibration else ()
    revision = revision_of_source(source_dir, scheme, target, used)
    if stored := _stored(store, f"{name}@{revision}", bound):
        return store.make_live(stored.model_id)
    with open_checkpoint(source_dir) as checkpoint, store.workspace() as directory:
        _check_calibration(used, checkpoint.spec.vocab_size, checkpoint.spec.max_model_len)
        built = build_artifact(
            checkpoint,
            directory,
            name=name,
            revision=revision,
            target=target,
            choice=choice,
            calibration=calibrate(checkpoint, used) if used else None,
            progress=progress,
        )
        write_manifest(directory, built)
        check_artifact(directory, built, with_hashes=False)
        progress("comparing", 0, 1)
        against = reference or partial(reference_logits, checkpoint)
        parity = prove(against, directory, built, candidate_factory, bound)
        progress("comparing", 1, 1)
        write_manifest(directory, msgspec.structs.replace(built, parity=parity))
        return store.put(directory)


def _check_calibration(sequences: Sequence[TokenIds], vocab_size: int, max_model_len: int) -> None:
    """Raises BadRequest for a sequence that the model cannot read."""
    for sequence in sequences:
        if not 1 <= len(sequence) <= max_model_len:
            raise BadRequest(
                f"a calibration sequence has {len(sequence):,} tokens; the model reads 1 to {max_model_len:,}",
                param="calibration",
            )
        if sequence.min() < 0 or sequence.max() >= vocab_size:
            found = f"{sequence.min()} to {sequence.max()}"
            raise BadRequest(
                f"calibration has token ids {found}; the model knows 0 to {vocab_size - 1}", param="calibration"
            )


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
    reference: Reference, directory: Path, manifest: ModelManifest, candidate_factory: CandidateFactory, bound: float
) -> Parity:
    """How far the artifact is from its checkpoint on the standard prompts. Raises ParityError over `bound`."""
    prompts = parity_prompts(manifest.geometry.vocab_size, manifest.geometry.max_model_len)
    with candidate_factory(directory, manifest) as candidate:
        return measure(reference, candidate, prompts, bound)

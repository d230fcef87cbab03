"""One model of a run: made, imported and proved, driven at every concurrency, and the peer on the same weights."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from bench.gpu.budget import needed_s
from bench.gpu.checkpoint import weight_bytes, write_on_device
from bench.gpu.engine import run_engine
from bench.gpu.limits import DeviceLimits
from bench.gpu.parity import calibration, figures, quiet
from bench.gpu.peer_process import PeerError, PeerProcess, ask_reference, compare
from bench.gpu.run import Results, Run
from bench.random_model import SHAPES, write_checkpoint
from model_store.importing import import_model
from model_store.parity import Logits, Reference, TokenIds
from model_store.store import Store
from services.bench import Workload
from services.loading import artifact_logits, find_model, open_backend

REFERENCE_S = 120.0  # the longest that the peer may take for it
MEASURED_ONLY = 1.0  # the figure is the result, and it is published: a run is not given up for it


def measure_model(
    run: Run, shape: str, options: argparse.Namespace, limits: DeviceLimits | None, peer: PeerProcess | None
) -> None:
    """All steps of one model; those that do not fit the budget are left out with a note."""
    model: Results = run.results.setdefault("models", {}).setdefault(shape, {"scheme": options.scheme})
    source, config = run.scratch / shape, SHAPES[shape]
    num_bytes = weight_bytes(config)
    model["weight_bytes"] = num_bytes
    make = partial(_make, source, config, options.target)
    # A checkpoint without its figures is worth nothing: all three steps, or none.
    if not run.step(f"{shape}: make", model, "config", make, needs_s=needed_s(("make", "import", "engine"), num_bytes)):
        return
    try:
        # The CPU's own reference (numpy) would take minutes and 32 GB for the shapes that a GPU is measured on.
        reference = partial(_reference, run, peer, source) if peer and options.target == "cuda" else None
        prove = partial(_import, run, source, shape, options, reference)
        if not run.step(f"{shape}: import and prove", model, "parity", prove):
            return
        if limits is None:
            run.note(f"{shape}: not driven, because the device's limits could not be measured")
            return
        run.step(f"{shape}: engine", model, "engine", partial(_drive, run, shape, options, limits))
        if peer and options.peer_concurrency:
            measure = partial(compare, run, peer, source, model, options)
            needs_s = needed_s(("peer",), num_bytes)
            run.step(f"{shape}: transformers", model, "peer", measure, needs_s=needs_s)
    finally:
        shutil.rmtree(source, ignore_errors=True)  # files may lie in memory
        shutil.rmtree(run.settings.store / shape, ignore_errors=True)


def _make(source: Path, config: Mapping[str, object], target: str) -> object:
    if target == "cuda":
        return write_on_device(source, config)
    write_checkpoint(source, config)
    return dict(config)


def _import(run: Run, source: Path, shape: str, options: argparse.Namespace, reference: Reference | None) -> Results:
    stored = import_model(
        source,
        Store(run.settings.store),
        shape,
        scheme=options.scheme,
        target=options.target,
        candidate_factory=partial(artifact_logits, run.settings),
        progress=quiet,
        calibration_ids=calibration(int(str(SHAPES[shape]["vocab_size"]))),
        reference=reference,
        parity_bound=MEASURED_ONLY,
    )
    return figures(stored) | {"reference": "transformers in float32" if reference else "numpy in float32"}


def _reference(run: Run, peer: PeerProcess, source: Path, prompts: Sequence[TokenIds]) -> list[Logits]:
    """The peer's float32 logits. If its process cannot give them, this one does: without parity nothing is driven."""
    try:
        return peer.reference(source, prompts, timeout_s=min(REFERENCE_S, run.left_s()))
    except (PeerError, TimeoutError) as error:
        run.note(f"{source.name}: the reference is computed in this process: {str(error)[-200:]}")
    from bench.gpu.peer import Peer  # transformers' imports take ten seconds: only now

    return ask_reference(source, prompts, partial(Peer().reference, device="cuda"))


def _drive(run: Run, shape: str, options: argparse.Namespace, limits: DeviceLimits) -> object:
    stored = find_model(run.settings, shape)
    workload = Workload(options.prompt_tokens, options.new_tokens, options.concurrency, options.rounds)
    backend = open_backend(run.settings, stored)
    try:
        return run_engine(backend, stored.manifest, workload, limits, left_s=run.left_s, note=run.note)
    finally:
        backend.close()

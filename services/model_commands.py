"""`millrace models ...`: import, list, show, verify, rm; and the shipped model's import at first start."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from model_store.manifest import ModelManifest
from model_store.store import Store
from services.loading import artifact_logits, find_model
from services.settings import Settings
from wire.errors import UnknownModel

SHIPPED_NAME = "millpond"
SHIPPED_SCHEME = "w8a8"
SHIPPED_DIRECTORY = Path(__file__).resolve().parents[1] / "models" / SHIPPED_NAME


def import_directory(
    settings: Settings,
    directory: str,
    name: str,
    *,
    target: str,
    scheme: str | None,
    calibration: Path | None,
    parity_bound: float | None,
    as_json: bool,
) -> int:
    """Import a checkpoint, showing progress on standard error; prints the manifest's summary.

    Without a scheme the target's first is taken. `calibration`: a text file.
    """
    from model_store.targets import choose  # brings onnx; only imports need it

    start = time.perf_counter()
    source = Path(directory).expanduser()
    manifest = _import(
        settings,
        source,
        name,
        choose(target, scheme).scheme.name,
        target=target,
        calibration_ids=() if calibration is None else _read_calibration(calibration, source),
        parity_bound=parity_bound,
        is_quiet=as_json,
    )
    elapsed_s = time.perf_counter() - start
    if as_json:
        print(msgspec.json.encode(manifest).decode())
    else:
        print(f"{_line(manifest)}\nstored as {manifest.model_id} in {settings.store} ({elapsed_s:.1f} s)")
    return 0


def ensure_shipped(settings: Settings) -> None:
    """Import the shipped model if it is asked for and the store does not hold this release's revision of it yet."""
    if SHIPPED_NAME not in settings.model_names or not SHIPPED_DIRECTORY.is_dir():
        return
    from model_store.importing import revision_of_source

    shipped = f"{SHIPPED_NAME}@{revision_of_source(SHIPPED_DIRECTORY, SHIPPED_SCHEME)}"
    try:
        Store(settings.store).resolve(shipped)
    except UnknownModel:
        print(f"importing the shipped model {shipped} ...", file=sys.stderr)
        _import(settings, SHIPPED_DIRECTORY, SHIPPED_NAME, SHIPPED_SCHEME, is_quiet=True)


def show_list(settings: Settings, *, as_json: bool) -> int:
    """One line for each artifact."""
    manifests = Store(settings.store).list()
    if as_json:
        print(json.dumps([_summary(manifest) for manifest in manifests]))
    else:
        for manifest in manifests:
            print(_line(manifest))
        if not manifests:
            print(f"the store {settings.store} is empty", file=sys.stderr)
    return 0


def show(settings: Settings, name: str, *, as_json: bool) -> int:
    """The whole manifest, with its files."""
    manifest = find_model(settings, name).manifest
    raw = msgspec.json.encode(manifest)
    print(raw.decode() if as_json else msgspec.json.format(raw, indent=2).decode())
    return 0


def verify(settings: Settings, name: str, *, as_json: bool) -> int:
    """Hash every file again and check the graph; the store raises with the file's name if one differs."""
    manifest = Store(settings.store).verify(name)
    size = sum(entry.size_bytes for entry in manifest.files.values())
    if as_json:
        print(
            json.dumps({"model": manifest.model_id, "files": len(manifest.files), "size_bytes": size, "verified": True})
        )
    else:
        print(f"{manifest.model_id}: {len(manifest.files)} files, {size:,} bytes, all as the manifest says")
    return 0


def remove(settings: Settings, name: str, *, as_json: bool) -> int:
    """Remove one revision."""
    manifest = find_model(settings, name).manifest
    Store(settings.store).remove(manifest.model_id)
    print(json.dumps({"removed": manifest.model_id}) if as_json else f"removed {manifest.model_id}")
    return 0


def _read_calibration(text: Path, source: Path) -> Sequence[NDArray[np.int64]]:
    from model_store.calibration_text import read_calibration
    from model_store.checkpoint import open_checkpoint

    with open_checkpoint(source) as checkpoint:
        return read_calibration(text, source, checkpoint.spec.max_model_len)


def _import(
    settings: Settings,
    directory: Path,
    name: str,
    scheme: str,
    *,
    target: str = "cpu",
    calibration_ids: Sequence[NDArray[np.int64]] = (),
    parity_bound: float | None = None,
    is_quiet: bool,
) -> ModelManifest:
    from model_store.importing import import_model

    is_line_open = False

    def progress(text: str, done: int, total: int) -> None:
        nonlocal is_line_open
        if not is_quiet:
            is_line_open = done < total
            print(f"\r{text:<28} {done:>5}/{total}", end="" if is_line_open else "\n", file=sys.stderr, flush=True)

    try:
        return import_model(
            directory,
            Store(settings.store),
            name=name,
            scheme=scheme,
            target=target,
            candidate_factory=partial(artifact_logits, settings),
            progress=progress,
            parity_bound=parity_bound,
            calibration_ids=calibration_ids,
        )
    finally:
        if is_line_open:
            print(file=sys.stderr)  # an error's words begin a line of their own


def _summary(manifest: ModelManifest) -> dict[str, object]:
    return {
        "model": manifest.model_id,
        "architecture": manifest.architecture,
        "scheme": manifest.scheme,
        "target": manifest.target,
        "parameters": manifest.num_parameters,
        "size_bytes": sum(entry.size_bytes for entry in manifest.files.values()),
        "context_tokens": manifest.geometry.max_model_len,
        "parity_max_relative_error": manifest.parity.max_relative_error if manifest.parity else None,
    }


def _line(manifest: ModelManifest) -> str:
    row = _summary(manifest)
    parity = manifest.parity
    error = f"logits within {parity.max_relative_error:.2e}" if parity else "parity not measured"
    return (
        f"{row['model']:<32} {row['architecture']:<20} {row['target']:<8} {row['scheme']:<12}"
        f" {row['parameters']:>14,} parameters {row['size_bytes']:>14,} bytes  {error}"
    )

"""The store of imported models: <root>/<name>/<revision>/, immutable once there.

A revision appears whole by one rename and is never changed; `<name>/live` names the revision that the bare name means.
Every change of the tree holds one file lock. Light to import (the gateway and every worker do): nothing of ONNX before
verify().

    <root>/.lock                   held while names change
    <root>/.incoming/<random>/     being built; its builder holds a lock on it, so what a crash left is recognized
    <root>/<name>/live             text: a revision
    <root>/<name>/<revision>/      manifest.json, model.onnx, weights.bin, tokenizer.json
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from model_store.errors import BadArtifact
from model_store.manifest import MANIFEST_FILE, ModelManifest, read_manifest
from wire.errors import BadRequest, Conflict, UnknownModel

NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)
REVISION: Final = re.compile(r"[0-9a-f]{12}", re.ASCII)
REVISION_PREFIX: Final = re.compile(r"[0-9a-f]{4,12}", re.ASCII)
LIVE_FILE: Final = "live"
INCOMING: Final = ".incoming"


def check_name(name: str) -> str:
    """`name`, if a model may be called so. Raises BadRequest."""
    if not NAME.fullmatch(name):
        raise BadRequest(
            f"model name {name[:80]!r}; expected up to 64 of a-z 0-9 . _ - beginning with a letter or digit",
            param="name",
        )
    return name


class Store:
    """A directory of models. Safe for several processes at once on one file system."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def list(self) -> Sequence[ModelManifest]:
        """Every model by name and revision. One whose manifest is damaged is left out here; verify() says why."""
        manifests = []
        for name in self._names():
            for revision in self._revisions(name):
                try:
                    manifests.append(self._manifest(name, revision))
                except BadArtifact:
                    continue
        return manifests

    def resolve(self, reference: str) -> Path:
        """The directory that "name" (the live revision) or "name@revision" (or a prefix) means. Raises UnknownModel."""
        name, at, wanted = reference.partition("@")
        if not NAME.fullmatch(name) or (at and not REVISION_PREFIX.fullmatch(wanted)):
            raise UnknownModel(f"no model {reference[:100]!r}: expected a name, or name@revision", param="model")
        live = self.live(name)  # before the listing: a revision is there before it is live
        revisions = self._revisions(name)
        if at:
            matches = [revision for revision in revisions if revision.startswith(wanted)]
        else:
            matches = [revision for revision in revisions if revision == live]
        if len(matches) != 1:
            stored = ", ".join(f"{name}@{revision}" for revision in matches or revisions) or "nothing of that name"
            kind = "matches several models" if matches else "is not in the store"
            raise UnknownModel(f"{reference} {kind}; stored: {stored}", param="model")
        return self._root / name / matches[0]

    def show(self, reference: str) -> ModelManifest:
        """The manifest of the model that `reference` means. Raises UnknownModel, or BadArtifact if it is damaged."""
        directory = self.resolve(reference)
        return self._manifest(directory.parent.name, directory.name)

    def live(self, name: str) -> str | None:
        """The revision that the bare name means, if it has one."""
        try:
            return (self._root / name / LIVE_FILE).read_text("ascii", errors="replace").strip()
        except FileNotFoundError:
            return None

    def verify(self, reference: str) -> ModelManifest:
        """Hash every file of a model again and inspect its graph. Raises BadArtifact with the first thing wrong."""
        from model_store.artifact_check import check_artifact

        manifest = self.show(reference)
        check_artifact(self._root / manifest.name / manifest.revision, manifest)
        return manifest

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """A new directory on the store's file system to build an artifact in; gone afterwards unless put() took it."""
        incoming = self._root / INCOMING
        incoming.mkdir(parents=True, exist_ok=True)
        with self._locked():
            _sweep(incoming)
            directory = incoming / secrets.token_hex(8)
            directory.mkdir()
            handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield directory
        finally:
            os.close(handle)
            shutil.rmtree(directory, ignore_errors=True)

    def put(self, directory: Path) -> ModelManifest:
        """Take over a finished artifact (its manifest included) from a workspace and make it what its name means.

        The same revision again is no error if its files are the same. Raises BadArtifact if files and manifest
        disagree, Conflict if the revision is stored with other files.
        """
        from model_store.artifact_check import check_files

        manifest = read_artifact(directory)
        check_name(manifest.name)
        if not REVISION.fullmatch(manifest.revision):
            raise BadArtifact(f"revision {manifest.revision[:40]!r}; expected 12 hex digits")
        check_files(directory, manifest)
        for name in (*manifest.files, MANIFEST_FILE):
            _fsync(directory / name)
        _fsync(directory)
        with self._locked():
            home = self._root / manifest.name
            home.mkdir(exist_ok=True)
            target = home / manifest.revision
            if target.exists():
                if read_artifact(target).files != manifest.files:
                    raise Conflict(f"{manifest.model_id} is stored already with other files", param="revision")
            else:
                os.rename(directory, target)
                _fsync(home)
            self._point(manifest.name, manifest.revision)
        return manifest

    def make_live(self, reference: str) -> ModelManifest:
        """Let the bare name mean this revision. Raises UnknownModel."""
        with self._locked():
            manifest = self.show(reference)
            self._point(manifest.name, manifest.revision)
        return manifest

    def remove(self, reference: str) -> None:
        """Delete one revision. If it was live, the name means the newest one that is left."""
        with self._locked():
            directory = self.resolve(reference)
            name, was_live = directory.parent.name, directory.name == self.live(directory.parent.name)
            trash = self._root / INCOMING / secrets.token_hex(8)
            trash.parent.mkdir(exist_ok=True)
            os.rename(directory, trash)  # gone at once for everybody; its bytes go after
            left = sorted(self._revisions(name), key=lambda revision: (self._root / name / revision).stat().st_mtime_ns)
            if not left:
                (self._root / name / LIVE_FILE).unlink(missing_ok=True)
                with suppress(OSError):  # somebody else's file in it: an empty name is no model either
                    (self._root / name).rmdir()
            elif was_live:
                self._point(name, left[-1])
            _fsync(self._root)
        shutil.rmtree(trash, ignore_errors=True)

    def _names(self) -> Sequence[str]:
        return sorted(path.name for path in _entries(self._root) if NAME.fullmatch(path.name))

    def _revisions(self, name: str) -> Sequence[str]:
        return sorted(path.name for path in _entries(self._root / name) if REVISION.fullmatch(path.name))

    def _manifest(self, name: str, revision: str) -> ModelManifest:
        manifest = read_artifact(self._root / name / revision)
        if (manifest.name, manifest.revision) != (name, revision):
            raise BadArtifact(f"{name}@{revision} holds the manifest of {manifest.model_id[:100]}")
        return manifest

    def _point(self, name: str, revision: str) -> None:
        """Replace `live` in one rename, so that readers see the old revision or the new one."""
        live = self._root / name / LIVE_FILE
        fresh = self._root / INCOMING / secrets.token_hex(8)
        fresh.parent.mkdir(exist_ok=True)
        fresh.write_text(revision + "\n", "ascii")
        _fsync(fresh)
        os.replace(fresh, live)
        _fsync(live.parent)
        _fsync(self._root)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._root.mkdir(parents=True, exist_ok=True)
        handle = os.open(self._root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)  # closing lets the lock go


def read_artifact(directory: Path) -> ModelManifest:
    """The manifest of an artifact. Raises BadArtifact if it is missing or not a manifest."""
    try:
        return read_manifest(directory)
    except (OSError, ValueError) as error:
        raise BadArtifact(f"{directory.name} has no usable manifest: {error}") from error


def _entries(directory: Path) -> list[Path]:
    try:
        return [path for path in directory.iterdir() if path.is_dir() and not path.is_symlink()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _sweep(incoming: Path) -> None:
    """Remove what crashes left: workspaces without a lock, and pointers (written under the store's lock, as this)."""
    for path in incoming.iterdir():
        if not path.is_dir() or path.is_symlink():
            path.unlink()
            continue
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(handle)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

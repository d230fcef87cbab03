"""Find the files of a Hugging Face directory without being led out of it.

Apart from the readers because every one of them opens files by names that somebody else wrote. Only plain names are
accepted, and a link must end inside the directory, or in the `blobs` beside `snapshots` where the Hugging Face cache
keeps the contents of a snapshot.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from model_store.errors import BadCheckpoint


def is_plain_name(name: str) -> bool:
    """Whether `name` is a file name and nothing more: no separators, no parents, nothing hidden."""
    return bool(name) and len(name) <= 255 and not name.startswith(".") and not set(name) & set("/\\\0:")


def find_file(directory: Path, name: str) -> Path | None:
    """The regular file `name` in `directory`, or None. Raises BadCheckpoint if the name or a link leads elsewhere."""
    if not is_plain_name(name):
        raise BadCheckpoint(f"{name[:80]!r} is not a plain file name", param=name[:80])
    path = directory / name
    if not path.exists():
        return None
    target = path.resolve()
    if not any(target.is_relative_to(root) for root in _roots(directory)):
        raise BadCheckpoint(f"{name} is a link out of {directory.name}", param=name)
    if not target.is_file():
        raise BadCheckpoint(f"{name} is not a regular file", param=name)
    return path


def need_file(directory: Path, name: str) -> Path:
    """As find_file, but a file that is not there is refused too."""
    if not directory.is_dir():
        raise BadCheckpoint(f"{directory} is not a directory", param="directory")
    path = find_file(directory, name)
    if path is None:
        raise BadCheckpoint(f"{directory.name} has no {name}", param=name)
    return path


def _roots(directory: Path) -> list[Path]:
    snapshot = directory.resolve()
    is_hub_cache = snapshot.parent.name == "snapshots"
    return [snapshot, snapshot.parent.parent / "blobs"] if is_hub_cache else [snapshot]


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_files(paths: Iterable[Path], *facts: str) -> str:
    """Hex SHA-256 over `facts` and the names and contents of `paths`, in whatever order they are given."""
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(fact.encode() + b"\0")
    for path in sorted(paths, key=lambda path: path.name):
        digest.update(f"{path.name}\0{sha256_of(path)}\0".encode())
    return digest.hexdigest()

"""Tensors of a checkpoint's safetensors files, read a few rows at a time as float32.

The `safetensors` library parses and checks the format (offsets, overlaps, dtypes) and maps the files; with ml_dtypes
it gives bfloat16 to numpy without torch. What we add: the header's size is capped before it is parsed, shard names
stay in the directory, only float types are accepted, and a weight that is not finite is named. Pickle files (.bin,
.pt) are never opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from model_store.config import read_json, shown
from model_store.errors import BadCheckpoint
from model_store.source_files import find_file, need_file

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 16 << 20
MAX_INDEX_BYTES = 64 << 20
MAX_SHARDS = 1024
DTYPES = ("F32", "F16", "BF16")


class _Slice(Protocol):
    """What safetensors gives for a tensor that is not read yet."""

    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...
    def __getitem__(self, rows: slice) -> NDArray[np.generic]: ...


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor in a file; nothing is read before rows() or read()."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # one of DTYPES
    source: _Slice

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) of the first axis. Raises BadCheckpoint if one holds a NaN or an infinity."""
        values = _widened(self.source[start:stop])
        if not np.isfinite(values).all():
            raise BadCheckpoint(f"{self.name} holds a value that is not finite", param=self.name)
        return values

    def read(self) -> NDArray[np.float32]:
        """The whole tensor."""
        return self.rows(0, self.shape[0])


def _widened(stored: NDArray[np.generic]) -> NDArray[np.float32]:
    """As float32. bfloat16 is its upper half: a shift, several times faster than numpy's cast and without its lock."""
    if stored.dtype.name != "bfloat16":
        return stored.astype(np.float32, copy=False)
    return (np.ascontiguousarray(stored).view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


@contextmanager
def open_tensors(directory: Path) -> Iterator[Mapping[str, Tensor]]:
    """All tensors of the directory by name. Raises BadCheckpoint."""
    paths = weight_files(directory)
    with ExitStack() as stack:
        tensors: dict[str, Tensor] = {}
        for path in paths:
            for name, tensor in _open_file(path, stack).items():
                if name in tensors:
                    raise BadCheckpoint(f"{name} lies in two files, one of them {path.name}", param=name)
                tensors[name] = tensor
        yield tensors


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the single one, or those its index names. Raises BadCheckpoint.

    The index itself is not among them: it decides nothing but this list.
    """
    single = find_file(directory, SINGLE_FILE)
    if single is not None:
        return [single]
    index = find_file(directory, INDEX_FILE)
    if index is not None:
        return [need_file(directory, name) for name in _shard_names(index)]
    pickles = sorted(
        path.name for path in directory.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
    )
    why = f"; {pickles[0]} may be a pickle, which can run code and is never read" if pickles else ""
    raise BadCheckpoint(f"{directory.name} has neither {SINGLE_FILE} nor {INDEX_FILE}{why}", param=SINGLE_FILE)


def _shard_names(index: Path) -> list[str]:
    weight_map = read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise BadCheckpoint(
            f"{index.name}: weight_map is {shown(weight_map)}; expected names of files", param="weight_map"
        )
    names = sorted(set(weight_map.values()))
    if len(names) > MAX_SHARDS:
        raise BadCheckpoint(f"{index.name} names {len(names):,} files; the limit is {MAX_SHARDS:,}", param="weight_map")
    for name in names:
        if not name.endswith(".safetensors"):
            raise BadCheckpoint(f"{index.name} names {shown(name)}; expected a .safetensors file", param="weight_map")
    return names


def _open_file(path: Path, stack: ExitStack) -> dict[str, Tensor]:
    import ml_dtypes  # noqa: F401 (teaches numpy the name bfloat16, which safetensors asks for)
    from safetensors import SafetensorError, safe_open

    _check_header_size(path)
    try:
        file = stack.enter_context(safe_open(path, framework="np"))
        sources: dict[str, _Slice] = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise BadCheckpoint(f"{path.name} is not a safetensors file: {error}", param=path.name) from error
    tensors = {}
    for name, source in sources.items():
        if source.get_dtype() not in DTYPES:
            raise BadCheckpoint(f"{name} is {source.get_dtype()}; supported are {', '.join(DTYPES)}", param=name)
        tensors[name] = Tensor(name, tuple(source.get_shape()), source.get_dtype(), source)
    return tensors


def _check_header_size(path: Path) -> None:
    """The first eight bytes say how long the JSON header is; no memory is given to a header we would not believe."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    if size_bytes < 8 or header_bytes > min(MAX_HEADER_BYTES, size_bytes - 8):
        raise BadCheckpoint(
            f"{path.name} has {size_bytes:,} bytes and claims a header of {header_bytes:,} (the limit is"
            f" {MAX_HEADER_BYTES:,}); it is cut short, damaged or not a safetensors file",
            param=path.name,
        )

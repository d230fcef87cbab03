"""TensorRT engines on disk: built at release for one graph on one kind of machine, looked up when serving, never made.

ONNX Runtime names an engine by the graph's shape and names, not by its weights, its TensorRT or its driver, and builds
what it does not find, for minutes, under the first client's request. So every engine lives in a directory that all it
depends on has a part in (EngineKey), and a server opens it read-only in effect: what is missing is an error that names
the difference and the command, and a file that appears or changes while a session opens is one too (Seal).

    <root>/<model>/<revision>/<digest>/     *.engine, *.profile, *.timing as the provider names them, and key.json
    <root>/<model>/<revision>/.<digest>-x/  being built, or left by a build that failed

key.json is written last and the directory renamed after it, so what has a key.json is whole.

ModelStoreError
├── EngineMissing  no engines for this machine, this model and these shapes
└── EngineChanged  the directory is not what its build left: a file is missing, has another size, was added or changed
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import msgspec

from model_store.errors import ModelStoreError
from model_store.manifest import GRAPH_FILE, WEIGHTS_FILE, Geometry, ModelManifest
from model_store.tensorrt_seams import KEPT_OPERATORS, engine_inputs

KEY_FILE: Final = "key.json"
PROVIDER: Final = "TensorrtExecutionProvider"
DIGEST_DIGITS: Final = 16
TUNED_TOKENS: Final = 64  # kernels are timed for steps of this size, that of a few dozen streams, and accept all others


class EngineMissing(ModelStoreError):
    """There are no engines for this model on this machine; the message says what those that are there are for."""

    code = "engine_missing"


class EngineChanged(ModelStoreError):
    """A directory of engines is not what its build left: engines were added, changed or lost."""

    code = "engine_changed"


class GpuFacts(Protocol):
    """What of a GPU decides which engines run on it (kernels/cuda/device.py)."""

    @property
    def name(self) -> str: ...
    @property
    def compute_capability(self) -> tuple[int, int]: ...
    @property
    def driver(self) -> str: ...


@dataclass(frozen=True, slots=True)
class RuntimeVersions:
    """The libraries an engine is built by and runs in."""

    onnxruntime: str
    tensorrt: str


@dataclass(frozen=True, slots=True)
class StepTokens:
    """How many tokens a step may have: engines are built for this range and fastest at `tuned`."""

    least: int
    tuned: int
    most: int

    @classmethod
    def up_to(cls, most: int) -> StepTokens:
        return cls(1, min(TUNED_TOKENS, most), most)


# In the order in which a difference is told.
_COMPARED: Final = (
    "tensorrt", "onnxruntime", "driver", "gpu", "compute_capability", "max_batch_tokens", "graph", "weights",
)  # fmt: skip


class EngineKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything an engine depends on. Fields are named as error messages name them."""

    graph: str  # SHA-256 of model.onnx
    weights: str  # SHA-256 of weights.bin: engines hold the weights
    onnxruntime: str
    tensorrt: str
    gpu: str
    compute_capability: str
    driver: str
    max_batch_tokens: int
    options: dict[str, str]  # the provider's, with the shapes engines are built for; without paths and addresses

    @property
    def digest(self) -> str:
        """Names the directory."""
        raw = msgspec.json.encode(self, order="deterministic")
        return hashlib.sha256(raw).hexdigest()[:DIGEST_DIGITS]

    def differences(self, other: EngineKey) -> list[str]:
        """Each part in which engines of `other` do not fit this machine, in words."""
        found = []
        for field in _COMPARED:
            theirs, ours = str(getattr(other, field)), str(getattr(self, field))
            if theirs != ours:
                found.append(f"built for {field.replace('_', ' ')} {theirs[:40]}, here it is {ours[:40]}")
        for option in sorted(self.options.keys() | other.options.keys()):
            theirs, ours = other.options.get(option, "unset"), self.options.get(option, "unset")
            follows = option.startswith("trt_profile_") and self.max_batch_tokens != other.max_batch_tokens
            if theirs != ours and not follows:
                found.append(f"built with {option} {_brief(theirs)}, here it is {_brief(ours)}")
        return found


class BuiltFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a directory of engines."""

    name: str
    size_bytes: int


class BuiltEngines(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """key.json: what a directory of engines is for, and what it holds."""

    key: EngineKey
    files: list[BuiltFile]


def engine_key(manifest: ModelManifest, versions: RuntimeVersions, gpu: GpuFacts, tokens: StepTokens) -> EngineKey:
    """The key of `manifest`'s engines on this machine."""
    return EngineKey(
        graph=manifest.files[GRAPH_FILE].sha256,
        weights=manifest.files[WEIGHTS_FILE].sha256,
        onnxruntime=versions.onnxruntime,
        tensorrt=versions.tensorrt,
        gpu=gpu.name,
        compute_capability="{}.{}".format(*gpu.compute_capability),
        driver=gpu.driver,
        max_batch_tokens=tokens.most,
        options=dict(fixed_options(manifest.geometry, tokens)),
    )


def fixed_options(geometry: Geometry, tokens: StepTokens) -> Mapping[str, str]:
    """Options of ONNX Runtime's TensorRT provider that decide what is built; the values as its Python side reads them.

    No precision flag (trt_fp16_enable, trt_bf16_enable, trt_int8_enable): without them networks are strongly typed,
    and types are what the graph says. Every dynamic input of every engine has its shapes here, so that engines are
    built when a session opens and never by a step.
    """
    inputs = engine_inputs(geometry)
    shapes = {
        f"trt_profile_{which}_shapes": ",".join(f"{name}:{rows}x{width}" for name, width in inputs.items())
        for which, rows in (("min", tokens.least), ("opt", tokens.tuned), ("max", tokens.most))
    }
    return {
        "trt_op_types_to_exclude": ",".join(KEPT_OPERATORS),
        "trt_context_memory_sharing_enable": "True",  # engines run one after another
        **shapes,
    }


def provider_options(key: EngineKey, directory: Path, *, ordinal: int, stream: int, may_build: bool) -> dict[str, str]:
    """Everything the provider is told: `key`'s options, where engines lie, and which GPU and stream they run on.

    The timing cache is read and written by builds only.
    """
    options = dict(key.options)
    options |= {
        "device_id": str(ordinal),
        "user_compute_stream": str(stream),
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(directory),
        "trt_timing_cache_enable": str(may_build),
    }
    if may_build:
        options["trt_timing_cache_path"] = str(directory)
    return options


class Seal:
    """The files of a directory as they are now, to find out later whether anything was written."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._before = self._files()

    def check(self) -> None:
        """Raises EngineChanged if a file came, went or changed since: an engine was built while serving."""
        after = self._files()
        names = self._before.keys() | after.keys()
        if changed := sorted(name for name in names if self._before.get(name) != after.get(name)):
            raise EngineChanged(
                f"{self._directory} changed while its engines were in use ({', '.join(changed[:4])}): engines are built"
                " by `millrace engines build`, never while serving; build them again with this version"
            )

    def _files(self) -> dict[str, tuple[int, int, int]]:
        found = {}
        for entry in os.scandir(self._directory):
            status = entry.stat(follow_symlinks=False)
            found[entry.name] = (status.st_size, status.st_mtime_ns, status.st_ino)
        return found


class EngineCache:
    """All engines below one directory."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def list(self, manifest: ModelManifest) -> Sequence[BuiltEngines]:
        """The engines of a model, for whatever machine."""
        found = []
        for path in sorted(self._of_model(manifest).glob(f"[!.]*/{KEY_FILE}")):
            try:
                found.append(msgspec.json.decode(path.read_bytes(), type=BuiltEngines))
            except (OSError, msgspec.MsgspecError):
                continue  # damaged, or of another version: as good as absent
        return found

    def find(self, manifest: ModelManifest, key: EngineKey) -> Path:
        """The directory with the engines for `key`. Raises EngineMissing with what differs, EngineChanged."""
        directory = self._of_model(manifest) / key.digest
        built = self.list(manifest)
        for engines in built:
            if engines.key == key and directory.is_dir():
                self._check(directory, engines)
                return directory
        command = f"build them on this machine: millrace engines build {manifest.model_id}"
        if not built:
            raise EngineMissing(f"{manifest.model_id} has no TensorRT engines in {self._root}; {command}")
        nearest = min((key.differences(engines.key) for engines in built), key=len)
        raise EngineMissing(
            f"{manifest.model_id} has no TensorRT engines for this machine: the nearest of {len(built)} was"
            f" {'; '.join(nearest[:4])}; {command}"
        )

    def build(self, manifest: ModelManifest, key: EngineKey, fill: Callable[[Path], None]) -> Path:
        """Let `fill` write engines into an empty directory and keep it under `key`; what was there goes.

        Raises what `fill` raises, and EngineMissing if it wrote no engine; the cache is then as it was.
        """
        parent = self._of_model(manifest)
        parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{key.digest}-", dir=parent))
        try:
            fill(building)
            files = [BuiltFile(path.name, path.stat().st_size) for path in sorted(building.iterdir())]
            if not any(file.name.endswith(".engine") for file in files):
                raise EngineMissing(f"building {manifest.model_id} left no engine: TensorRT took no part of the graph")
            self._finish(building, BuiltEngines(key, files))
            directory = parent / key.digest
            if directory.exists():
                shutil.rmtree(directory)
            building.rename(directory)
            return directory
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise

    def _finish(self, directory: Path, engines: BuiltEngines) -> None:
        """Write key.json by a rename, after everything else is on the disk."""
        raw = msgspec.json.format(msgspec.json.encode(engines), indent=2) + b"\n"
        with tempfile.NamedTemporaryFile(dir=directory, delete=False) as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).rename(directory / KEY_FILE)

    def _check(self, directory: Path, engines: BuiltEngines) -> None:
        expected = {file.name: file.size_bytes for file in engines.files}
        found = {path.name: path.stat().st_size for path in directory.iterdir() if path.name != KEY_FILE}
        if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
            raise EngineChanged(f"{directory} is not as it was built: {', '.join(wrong[:4])}; build the engines again")

    def _of_model(self, manifest: ModelManifest) -> Path:
        return self._root / manifest.name / manifest.revision


def engines_root(store: Path) -> Path:
    """Where engines lie beside a model store: they belong to machines, not to models, and can always be built again."""
    return store.parent / "engines"


def _brief(text: str) -> str:
    """The first of a list of shapes stands for all: they differ in rows alike."""
    head, comma, _ = text.partition(",")
    return f"{head},..." if comma else head

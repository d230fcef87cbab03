"""Open a model with ONNX Runtime's TensorRT provider: with engines that are there, or to build them.

TensorRT computes the dense layers, CUDA the rest; the backend around the session is that of target cuda. Which engines
fit, and that none is built while serving, is engine_cache.py's.

Source of option names and of what the provider links to: the provider library of onnxruntime-gpu 1.31.1.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import onnxruntime as ort

from batcher.backend import Backend
from kernels.cuda.device import CudaError, CudaUnavailable, Device, DeviceFacts
from model_store.manifest import ModelManifest
from services.backends.cuda_open import open_cuda
from services.backends.engine_cache import (
    PROVIDER,
    EngineCache,
    RuntimeVersions,
    Seal,
    StepTokens,
    engine_key,
    provider_options,
)
from services.backends.sizing import StepLimits
from wire.errors import MillraceError

LIBRARIES: Final = ("libnvinfer.so.10", "libnvinfer_plugin.so.10", "libnvonnxparser.so.10")
PACKAGE: Final = "tensorrt_libs"  # where pip puts them: not on the loader's path, so they are loaded from here first

# Given the GPU's number and the stream's address, the provider's options.
OptionsOf = Callable[[int, int], Mapping[str, str]]


class TensorRtUnavailable(MillraceError):
    """This machine cannot run TensorRT; the message says what is missing."""

    code = "tensorrt_unavailable"
    http_status = 503


class TensorRtMachine:
    """What building engines needs of this machine (services/engine_commands.py)."""

    def versions(self) -> RuntimeVersions:
        """Raises TensorRtUnavailable."""
        return installed_versions()

    def gpu(self) -> DeviceFacts:
        """GPU 0. Raises TensorRtUnavailable."""
        try:
            device = Device()
        except (CudaError, CudaUnavailable, ImportError) as error:
            raise TensorRtUnavailable(f"TensorRT needs an NVIDIA GPU: {error}") from error
        try:
            return device.facts
        finally:
            device.close()

    def open(self, directory: Path, manifest: ModelManifest, limits: StepLimits, options: OptionsOf) -> Backend:
        """A session that builds what `options` name; the engines are there when this returns."""

        def providers(device: Device) -> Sequence[tuple[str, Mapping[str, str]]]:
            return [(PROVIDER, options(device.ordinal, device.stream))]

        return open_cuda(directory, manifest, limits, look_ahead=False, prepare=False, providers=providers)


def open_tensorrt(directory: Path, manifest: ModelManifest, limits: StepLimits, cache: EngineCache) -> Backend:
    """The model in `directory` on GPU 0, with engines that were built for this machine and these limits.

    Raises TensorRtUnavailable, EngineMissing, EngineChanged (before and after opening), BackendError(FATAL).
    """
    machine = TensorRtMachine()
    key = engine_key(manifest, machine.versions(), machine.gpu(), StepTokens.up_to(limits.max_batch_tokens))
    engines = cache.find(manifest, key)
    seal = Seal(engines)
    backend = machine.open(
        directory,
        manifest,
        limits,
        lambda ordinal, stream: provider_options(key, engines, ordinal=ordinal, stream=stream, may_build=False),
    )
    try:
        seal.check()
    except BaseException:
        backend.close()
        raise
    return backend


def open_building(directory: Path, manifest: ModelManifest, limits: StepLimits, engines: Path) -> Backend:
    """The model with engines that are built into the empty directory `engines` now: what parity is measured on.

    Raises TensorRtUnavailable, BackendError(FATAL).
    """
    machine = TensorRtMachine()
    key = engine_key(manifest, machine.versions(), machine.gpu(), StepTokens.up_to(limits.max_batch_tokens))
    return machine.open(
        directory,
        manifest,
        limits,
        lambda ordinal, stream: provider_options(key, engines, ordinal=ordinal, stream=stream, may_build=True),
    )


def installed_versions() -> RuntimeVersions:
    """The libraries that an engine would run in, loaded. Raises TensorRtUnavailable with what to install."""
    if PROVIDER not in ort.get_available_providers():
        raise TensorRtUnavailable(
            f"onnxruntime {ort.__version__} has no TensorRT provider: it is in onnxruntime-gpu"
            " (pip uninstall onnxruntime && pip install 'millrace[cuda]')"
        )
    return RuntimeVersions(ort.__version__, _tensorrt_version())


def _tensorrt_version() -> str:
    """Load TensorRT, from its package or from the loader's path, and ask it."""
    found = importlib.util.find_spec(PACKAGE)
    folders = [Path(place) for place in (found.submodule_search_locations or ())] if found else []
    loaded = []
    for name in LIBRARIES:
        path = next((folder / name for folder in folders if (folder / name).is_file()), Path(name))
        try:
            loaded.append(ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL))
        except OSError as error:
            raise TensorRtUnavailable(
                f"TensorRT 10 is not installed ({error}); onnxruntime {ort.__version__} needs that version:"
                " pip install 'tensorrt-cu13-libs<11'"
            ) from error
    number = int(loaded[0].getInferLibVersion())
    return ".".join(str(part) for part in version_parts(number))


def version_parts(number: int) -> tuple[int, int, int]:
    """TensorRT's version number since 10: major * 10,000 + minor * 100 + patch (NvInferVersion.h)."""
    return number // 10_000, number // 100 % 100, number % 100

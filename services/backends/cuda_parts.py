"""What the CUDA backend is made of, as it sees it: a device, an open graph, three kernels.

cuda_open.py puts the real ones together (kernels/cuda, ONNX Runtime); tests bring a device made of numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from services.backends.cuda_session import Located
from services.backends.step_image import Bytes


class Launchable(Protocol):
    """A kernel on the device."""

    def launch(self, blocks: int, threads: int, *arguments: Any) -> None: ...


class StepDevice(Protocol):
    """What the backend needs of a device (kernels/cuda/device.py); tests bring one made of numpy."""

    def attach(self) -> None: ...
    def allocate(self, num_bytes: int) -> int: ...
    def release(self, address: int) -> None: ...
    def pinned(self, num_bytes: int) -> Bytes: ...
    def copy_in(self, target: int, source: Bytes) -> None: ...
    def copy_out(self, target: Bytes, source: int) -> None: ...
    def new_event(self) -> object: ...
    def record(self, event: object) -> None: ...
    def wait(self, event: object) -> None: ...
    def synchronize(self) -> None: ...
    def capture(self, work: Callable[[], None]) -> Callable[[], None]: ...


class StepRun(Protocol):
    """A graph with its tensors in place (cuda_session.BoundRun)."""

    def bind(self, inputs: Mapping[str, Located], outputs: Mapping[str, Located]) -> None: ...
    def bind_host(self, name: str, values: NDArray[np.int32]) -> None: ...
    def run(self) -> None: ...


class StepSession(Protocol):
    """An open graph (cuda_session.CudaSession)."""

    def new_run(self) -> StepRun: ...


@dataclass(frozen=True, slots=True)
class CudaParts:
    """What a backend is made of; services/backends/cuda_open.py puts the real ones together."""

    device: StepDevice
    session: StepSession
    top: Launchable
    sample: Launchable
    advance: Launchable
    close: Callable[[], None]  # of everything else, once the backend has let go of the session

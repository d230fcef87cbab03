"""One CUDA GPU through the driver's own interface: memory, one stream, events, graphs, kernels.

Everything is asynchronous on one stream and in its order; only wait() and close() block. ONNX Runtime is given the same
stream (`user_compute_stream`), so that copies, its nodes and our kernels follow each other without the host.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

OUT_OF_MEMORY: Final = 2  # CUDA_ERROR_OUT_OF_MEMORY
CAPTURE_ERRORS: Final = range(900, 908)  # CUDA_ERROR_STREAM_CAPTURE_*: the capture failed, the device is well


class CudaUnavailable(Exception):
    """This machine has no CUDA driver, or this environment lacks a CUDA package; the message says which."""


class CudaError(Exception):
    """A call of the CUDA driver that failed."""

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"{call}: CUDA error {code} ({name})")
        self.code = code

    @property
    def is_out_of_memory(self) -> bool:
        return self.code == OUT_OF_MEMORY


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What a GPU is: what decides which machine code runs on it."""

    name: str
    compute_capability: tuple[int, int]
    driver: str  # the driver's own version, e.g. "580.159.04"; "unknown" where it does not say
    memory_bytes: int

    @property
    def architecture(self) -> str:
        """NVRTC's name: sm_90."""
        return "sm_{}{}".format(*self.compute_capability)


class Kernel:
    """A function on the device, with its arguments in memory that launches read."""

    def __init__(self, function: Any, stream: Any) -> None:
        self._function = function
        self._stream = stream

    @property
    def address(self) -> int:
        """The CUfunction, for native code that launches it."""
        return int(self._function)

    def launch(self, blocks: int, threads: int, *arguments: ctypes._SimpleCData[Any]) -> None:
        """Put a launch on the stream. Arguments are ctypes values of the kernel's parameter types."""
        from cuda.bindings import driver

        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        _check(
            "cuLaunchKernel",
            driver.cuLaunchKernel(
                self._function, blocks, 1, 1, threads, 1, 1, 0, self._stream, ctypes.addressof(pointers), 0
            ),
        )


class Device:
    """GPU `ordinal` of this process, in the primary context that ONNX Runtime uses too.

    Raises CudaUnavailable where there is no driver, CudaError for what the driver refuses.
    """

    def __init__(self, ordinal: int = 0) -> None:
        driver = self._driver = _load_driver()
        self._thread: int | None = None
        self._pinned: list[int] = []
        _check("cuInit", driver.cuInit(0))
        self._device = _check("cuDeviceGet", driver.cuDeviceGet(ordinal))
        self._context = _check("cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain(self._device))
        self.attach()
        flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value
        self._stream = _check("cuStreamCreate", driver.cuStreamCreate(flags))
        self.ordinal = ordinal
        self.facts = self._read_facts()

    @property
    def stream(self) -> int:
        """The CUstream's address."""
        return int(self._stream)

    def attach(self) -> None:
        """Make the device current in the calling thread; every thread must before it uses it."""
        thread = threading.get_ident()
        if thread != self._thread:
            _check("cuCtxSetCurrent", self._driver.cuCtxSetCurrent(self._context))
            self._thread = thread

    def free_bytes(self) -> int:
        """Device memory that is free now."""
        free, _ = _check_two("cuMemGetInfo", self._driver.cuMemGetInfo())
        return free

    def allocate(self, num_bytes: int) -> int:
        """Device memory, zeroed; its address."""
        address = int(_check("cuMemAlloc", self._driver.cuMemAlloc(num_bytes)))
        _check("cuMemsetD8Async", self._driver.cuMemsetD8Async(address, 0, num_bytes, self._stream))
        return address

    def release(self, address: int) -> None:
        """Give memory of allocate() back, once everything on the stream is done."""
        _check("cuMemFree", self._driver.cuMemFree(address))

    def pinned(self, num_bytes: int) -> Bytes:
        """Host memory that copies go to and from without a detour, zeroed: kept until close()."""
        address = int(_check("cuMemHostAlloc", self._driver.cuMemHostAlloc(num_bytes, 0)))
        self._pinned.append(address)
        ctypes.memset(address, 0, num_bytes)
        return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))

    def copy_in(self, target: int, source: Bytes) -> None:
        """Pinned host bytes to the device, on the stream."""
        _check(
            "cuMemcpyHtoDAsync",
            self._driver.cuMemcpyHtoDAsync(target, source.ctypes.data, source.nbytes, self._stream),
        )

    def copy_out(self, target: Bytes, source: int) -> None:
        """Device bytes to the host, on the stream."""
        _check(
            "cuMemcpyDtoHAsync",
            self._driver.cuMemcpyDtoHAsync(target.ctypes.data, source, target.nbytes, self._stream),
        )

    def new_event(self) -> object:
        """A mark that record() sets on the stream and wait() waits for."""
        flags = self._driver.CUevent_flags.CU_EVENT_DISABLE_TIMING.value
        return _check("cuEventCreate", self._driver.cuEventCreate(flags))

    def record(self, event: object) -> None:
        _check("cuEventRecord", self._driver.cuEventRecord(event, self._stream))

    def wait(self, event: object) -> None:
        """Block until everything before the last record(event) is done."""
        _check("cuEventSynchronize", self._driver.cuEventSynchronize(event))

    def synchronize(self) -> None:
        """Block until the stream is empty."""
        _check("cuStreamSynchronize", self._driver.cuStreamSynchronize(self._stream))

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """What `work` puts on the stream, as a graph; call the result to launch it. Nothing runs during capture."""
        driver = self._driver
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        _check("cuStreamBeginCapture", driver.cuStreamBeginCapture(self._stream, mode))
        try:
            work()
        except BaseException:
            driver.cuStreamEndCapture(self._stream)  # the error of `work` says more than this one's
            raise
        graph = _check("cuStreamEndCapture", driver.cuStreamEndCapture(self._stream))
        executable = _check("cuGraphInstantiate", driver.cuGraphInstantiate(graph, 0))
        _check("cuGraphDestroy", driver.cuGraphDestroy(graph))

        def launch() -> None:
            _check("cuGraphLaunch", driver.cuGraphLaunch(executable, self._stream))

        return launch

    def load_kernels(self, cubin: bytes, names: Sequence[str]) -> dict[str, Kernel]:
        """The functions `names` of compiled code."""
        module = _check("cuModuleLoadData", self._driver.cuModuleLoadData(cubin))
        found = {}
        for name in names:
            function = _check("cuModuleGetFunction", self._driver.cuModuleGetFunction(module, name.encode()))
            found[name] = Kernel(function, self._stream)
        return found

    def close(self) -> None:
        """Wait for the stream, let go of it and of pinned memory. The context stays: it is the process's."""
        self.attach()
        self.synchronize()
        for address in self._pinned:
            _check("cuMemFreeHost", self._driver.cuMemFreeHost(address))
        self._pinned.clear()
        _check("cuStreamDestroy", self._driver.cuStreamDestroy(self._stream))

    def _read_facts(self) -> DeviceFacts:
        driver, attributes = self._driver, self._driver.CUdevice_attribute
        name = _check("cuDeviceGetName", driver.cuDeviceGetName(256, self._device))
        major, minor = (
            int(_check("cuDeviceGetAttribute", driver.cuDeviceGetAttribute(attribute, self._device)))
            for attribute in (
                attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        _, total = _check_two("cuMemGetInfo", driver.cuMemGetInfo())
        return DeviceFacts(name.split(b"\0")[0].decode(), (major, minor), driver_version(), total)


def _load_driver() -> Any:
    """The driver's interface, known to be there."""
    try:
        from cuda.bindings import driver

        driver.cuDriverGetVersion()
    except ImportError as error:
        raise CudaUnavailable(f"cuda-bindings is missing: pip install 'millrace[cuda]' ({error})") from error
    except RuntimeError as error:  # the binding found no libcuda
        raise CudaUnavailable("no NVIDIA driver on this machine (libcuda.so.1 is not found)") from error
    return driver


def driver_version() -> str:
    """The NVIDIA driver's version as NVML says it, or "unknown"."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return "unknown"
    text = ctypes.create_string_buffer(96)
    if nvml.nvmlInit_v2() != 0 or nvml.nvmlSystemGetDriverVersion(text, len(text)) != 0:
        return "unknown"
    return text.value.decode("ascii", "replace")


def _check(call: str, answer: tuple[Any, ...]) -> Any:
    """The one value of a driver call that succeeded."""
    code = answer[0]
    if int(code) != 0:
        raise CudaError(call, int(code), getattr(code, "name", "?"))
    return answer[1] if len(answer) > 1 else None


def _check_two(call: str, answer: tuple[Any, ...]) -> tuple[int, int]:
    _check(call, answer)
    return int(answer[1]), int(answer[2])

"""How busy NVIDIA GPUs are, by the driver's own library (NVML), called through ctypes: no package is needed.

Functions and types as in nvml.h: every call returns 0 for success. Utilization is the percentage of the driver's last
sample period in which a kernel ran: one busy kernel and a full device look the same.
"""

from __future__ import annotations

import ctypes
import logging
from typing import Any, Final

logger = logging.getLogger(__name__)

LIBRARY: Final = "libnvidia-ml.so.1"
MAX_DEVICES: Final = 64


class _Utilization(ctypes.Structure):
    """nvmlUtilization_t, in percent."""

    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class NvmlError(Exception):
    """A call of the library failed; the message has its name and code."""


class Nvml:
    """The devices that this process can see, for as long as it lives."""

    def __init__(self, library: Any) -> None:
        """`library`: NVML as ctypes.CDLL gives it. Raises NvmlError."""
        self._library = library
        self._call("nvmlInit_v2")
        count = ctypes.c_uint()
        self._call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        self._devices: list[ctypes.c_void_p] = []
        for index in range(min(count.value, MAX_DEVICES)):
            device = ctypes.c_void_p()
            self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(device))
            self._devices.append(device)

    @classmethod
    def open(cls, name: str = LIBRARY) -> Nvml | None:
        """The library of this machine; None without a driver, or if it does not work."""
        try:
            return cls(ctypes.CDLL(name))
        except OSError:
            return None
        except NvmlError as error:
            logger.warning("no GPU utilization", extra={"reason": str(error)})
            return None

    def utilization(self) -> list[float]:
        """0 to 1 for each device; NaN for one that does not say."""
        return [self._one(device) for device in self._devices]

    def _one(self, device: ctypes.c_void_p) -> float:
        found = _Utilization()
        try:
            self._call("nvmlDeviceGetUtilizationRates", device, ctypes.byref(found))
        except NvmlError:  # a slice of a GPU (MIG) has no such number
            return float("nan")
        return float(found.gpu) / 100.0

    def _call(self, name: str, *arguments: Any) -> None:
        try:
            code = getattr(self._library, name)(*arguments)
        except AttributeError:
            raise NvmlError(f"{name} is missing") from None
        if code != 0:
            raise NvmlError(f"{name} returned {code}")

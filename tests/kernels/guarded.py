"""Memory that ends in a page nobody may touch: reading or writing one element too far is a fault and not luck."""

from __future__ import annotations

import ctypes
import mmap
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Scalar = TypeVar("Scalar", bound=np.generic)
_PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Place(Protocol):
    """Where a tensor is put before a kernel sees it."""

    def __call__(self, array: NDArray[Scalar], /) -> NDArray[Scalar]: ...


def in_place(array: NDArray[Scalar]) -> NDArray[Scalar]:
    """The array as it is: for runs that need no guard."""
    return array


def before_a_guard(array: NDArray[Scalar]) -> NDArray[Scalar]:
    """A copy of the array that ends where the last page one may touch ends."""
    pages = -(-array.nbytes // mmap.PAGESIZE)
    mapping = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)  # lives as long as the array that views it
    start = pages * mmap.PAGESIZE - array.nbytes
    copy: NDArray[Scalar] = np.frombuffer(mapping, array.dtype, array.size, start).reshape(array.shape)
    copy[...] = array
    if _libc.mprotect(copy.ctypes.data + array.nbytes, mmap.PAGESIZE, _PROT_NONE) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")
    return copy

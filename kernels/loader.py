"""The compiled operators: where they are, and which form of them runs.

Apart from build.py because serving only loads. ONNX Runtime gets the path (`register_custom_ops_library`); the
functions here speak to the same loaded library through ctypes, so a choice made here holds for every session of the
process.
"""

from __future__ import annotations

import ctypes
import platform
from functools import lru_cache
from pathlib import Path
from typing import Final

from kernels.build import library_file

FORMS: Final = ("portable", "avx2", "avx512", "dotprod")  # narrowest first; avx* on x86_64, dotprod on aarch64


class KernelsUnavailable(Exception):
    """The native library is not built, or lacks the form that was asked for."""


def library_path() -> Path:
    """The library for this machine. Raises KernelsUnavailable with the command that builds it."""
    path = library_file(platform.machine())
    if not path.is_file():
        raise KernelsUnavailable(
            f"{path} is not built; run: pip install 'millrace[kernels]' && python -m kernels.build"
        )
    return path


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL:
    """The loaded library with the signatures of its controls declared. Raises KernelsUnavailable."""
    path = library_path()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelsUnavailable(
            f"{path} cannot be loaded: {error}; rebuild with: python -m kernels.build --force"
        ) from error
    library.millrace_isa_available.argtypes = [ctypes.c_char_p]
    library.millrace_isa_available.restype = ctypes.c_int
    library.millrace_set_isa.argtypes = [ctypes.c_char_p]
    library.millrace_set_isa.restype = ctypes.c_int
    library.millrace_isa_active.argtypes = []
    library.millrace_isa_active.restype = ctypes.c_char_p
    library.millrace_set_threads.argtypes = [ctypes.c_size_t]
    library.millrace_set_threads.restype = None
    library.millrace_threads.argtypes = []
    library.millrace_threads.restype = ctypes.c_size_t
    return library


def isa_available() -> tuple[str, ...]:
    """The forms that run on this processor, narrowest first."""
    library = load()
    return tuple(form for form in FORMS if library.millrace_isa_available(form.encode()))


def isa_active() -> str:
    """The form in use."""
    name: bytes = load().millrace_isa_active()
    return name.decode()


def set_isa(name: str | None) -> None:
    """Use form `name`, or the widest for None. Raises KernelsUnavailable if this processor or library lacks it.

    Call it before the first run: a run in progress keeps the form it started with.
    """
    if load().millrace_set_isa(None if name is None else name.encode()) != 0:
        raise KernelsUnavailable(f"no kernels '{name}' on this processor; available: {', '.join(isa_available())}")


def set_threads(count: int) -> None:
    """Tell the kernels how many threads ONNX Runtime's pool has (0 = the processors of this process).

    Work is cut for that many; answers do not depend on it.
    """
    if count < 0:
        raise ValueError(f"{count} threads; must be 0 or more")
    load().millrace_set_threads(count)


def threads() -> int:
    """How many threads the kernels cut their work for."""
    count: int = load().millrace_threads()
    return count

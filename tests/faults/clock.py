"""A wall clock of its own for a process: a preloaded library (clock.c) adds what a file says to the real time."""

from __future__ import annotations

import atexit
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path


class Clock:
    """Right until it jumps. `file` is created; the process is started with `environment`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.set_ahead(0)

    @property
    def environment(self) -> Mapping[str, str]:
        return {"LD_PRELOAD": str(_library()), "FAULTS_CLOCK": str(self._file)}

    def set_ahead(self, seconds: int) -> None:
        """Seconds from now on before or after (negative) the real time; 0 sets it right."""
        with self._file.open("r+b" if self._file.exists() else "wb") as file:  # the mapped page, not another file
            file.write(struct.pack("q", seconds * 10**9))


@lru_cache(maxsize=1)
def _library() -> Path:
    """clock.c compiled, as long as this process lives."""
    directory = Path(tempfile.mkdtemp(prefix="millrace-clock-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    library = directory / "libclock.so"
    source = Path(__file__).with_name("clock.c")
    flags = ["-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-fno-sanitize=all"]
    subprocess.run([sys.executable, "-m", "ziglang", "cc", *flags, "-o", str(library), str(source)], check=True)
    return library

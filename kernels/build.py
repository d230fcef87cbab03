"""Compile the native operators: `python -m kernels.build`.

Apart from loader.py because building needs the compiler (ziglang, a complete clang from PyPI) and serving does not.
Every kernel source is compiled once per form (portable, AVX2, AVX-512), the rest once for the baseline processor; all
of it goes into one shared library without a libc. A second, small library holds the operators of the CUDA target, which
only launch (the GPU's own code is compiled when a model is opened: kernels/cuda/compiler.py). A hash of sources, flags
and compiler version beside the first library says whether both are current.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

NATIVE_DIR: Final = Path(__file__).parent / "native"
CUDA_DIR: Final = Path(__file__).parent / "cuda"
BUILD_DIR: Final = Path(__file__).parent / "build"
LIBRARY_FILE: Final = "libmillrace_kernels.so"
CUDA_LIBRARY_FILE: Final = "libmillrace_cuda.so"

# Compiled once per form, with -DMR_ISA=<form>.
FORM_SOURCES: Final = ("qlinear.c", "linear.c", "embed.c", "attention.c", "sample.c", "measure.c", "probe.c", "table.c")
# Compiled once.
COMMON_SOURCES: Final = (
    "abi.c",
    "attention_op.c",
    "cpu.c",
    "embed_op.c",
    "entries.c",
    "linear_op.c",
    "mem.c",
    "message.c",
    "ops.c",
    "sample_op.c",
    "scratch.c",
)
# The second library: its operators, and what it shares with the first.
CUDA_SOURCES: Final = (
    CUDA_DIR / "linear_op.c",
    *(NATIVE_DIR / name for name in ("abi.c", "message.c", "mem.c", "scratch.c")),
)

FLAGS: Final = (
    *(
        "-std=c17",
        "-O3",
        "-fPIC",
        "-fvisibility=hidden",
        "-fomit-frame-pointer",
        "-g0",
        "-Wall",
        "-Wextra",
        "-Wno-psabi",
    ),
    # The same bits in every form: no fused multiply-add that is not written, no errno around sqrt.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-sanitize=all", "-fno-stack-protector"),
)
LINK_FLAGS: Final = ("-shared", "-nostdlib", "-s", "-Wl,-z,defs", "-Wl,-z,noexecstack")


@dataclass(frozen=True, slots=True)
class Target:
    """A processor family: its clang triple and the -mcpu of each form."""

    triple: str
    forms: dict[str, str]
    baseline: str


# glibc 2.28 is named only because a triple must name one: nothing of it is linked.
TARGETS: Final = {
    "x86_64": Target(
        triple="x86_64-linux-gnu.2.28",
        forms={"portable": "x86_64", "avx2": "x86_64_v3", "avx512": "x86_64_v4+avx512vnni"},
        baseline="x86_64",
    ),
    "aarch64": Target(
        triple="aarch64-linux-gnu.2.28", forms={"portable": "generic", "dotprod": "generic+dotprod"}, baseline="generic"
    ),
}


class BuildError(Exception):
    """The library cannot be built here; the message says what is missing or what the compiler said."""


def library_file(machine: str) -> Path:
    """Where the library for `machine` is built: build/ for this machine's, build/<machine>/ for another's."""
    directory = BUILD_DIR if machine == platform.machine() else BUILD_DIR / machine
    return directory / LIBRARY_FILE


def cuda_library_file(machine: str) -> Path:
    """Where the CUDA target's operators for `machine` are built: beside the other library."""
    return library_file(machine).with_name(CUDA_LIBRARY_FILE)


def build(machine: str, *, force: bool = False) -> bool:
    """Bring the libraries for `machine` up to date; true if they were compiled, false if current. Raises BuildError."""
    library = library_file(machine)
    fingerprint = source_fingerprint(machine)
    if not force and is_current(library, fingerprint):
        return False
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="compile-", dir=library.parent) as scratch:
        for fresh in _compile(TARGETS[machine], Path(scratch)):
            os.replace(fresh, library.with_name(fresh.name))  # a process that has the old library mapped keeps it
    _fingerprint_file(library).write_text(fingerprint + "\n")
    return True


def is_current(library: Path, fingerprint: str) -> bool:
    """Whether `library` and the one beside it were built from exactly these sources, flags and compiler."""
    recorded = _fingerprint_file(library)
    is_there = library.is_file() and library.with_name(CUDA_LIBRARY_FILE).is_file()
    return is_there and recorded.is_file() and recorded.read_text().strip() == fingerprint


def source_fingerprint(machine: str, native: Path = NATIVE_DIR) -> str:
    """SHA-256 over what decides the library's bytes. Raises BuildError without a compiler or for a strange machine."""
    if machine not in TARGETS:
        raise BuildError(f"no kernels for processor {machine!r}; known: {', '.join(TARGETS)}")
    digest = hashlib.sha256()
    for fact in (compiler_version(), repr(TARGETS[machine]), repr((FLAGS, LINK_FLAGS, FORM_SOURCES, COMMON_SOURCES))):
        digest.update(fact.encode() + b"\0")
    for path in sorted((*native.glob("*.[ch]"), *CUDA_DIR.glob("*.c")), key=lambda path: path.name):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def compiler_version() -> str:
    """The installed ziglang version. Raises BuildError if there is none."""
    try:
        return version("ziglang")
    except PackageNotFoundError:
        raise BuildError("ziglang is not installed; the compiler comes with: pip install 'millrace[kernels]'") from None


def _fingerprint_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _compile(target: Target, scratch: Path) -> list[Path]:
    """Compile all units in parallel and link them; returns the libraries inside `scratch`."""
    # The compiler's own caches live and die with the scratch folder: a build leaves nothing in the home directory.
    env = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(scratch / "global"), "ZIG_LOCAL_CACHE_DIR": str(scratch / "local")}
    units = {
        scratch / LIBRARY_FILE: list(_compile_commands(target, scratch)),
        scratch / CUDA_LIBRARY_FILE: list(_cuda_commands(target, scratch)),
    }
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        for outcome in [pool.submit(_run, command, env) for commands in units.values() for command in commands]:
            outcome.result()
    for library, commands in units.items():
        objects = [command[-1] for command in commands]
        _run([*_clang(), "-target", target.triple, *LINK_FLAGS, "-o", str(library), *objects], env)
    return list(units)


def _compile_commands(target: Target, scratch: Path) -> Iterator[list[str]]:
    """One compiler call per unit; the last argument is the object file."""
    for form, cpu in target.forms.items():
        for source in FORM_SOURCES:
            object_file = scratch / f"{Path(source).stem}_{form}.o"
            yield _compile_command(target, NATIVE_DIR / source, object_file, f"-mcpu={cpu}", f"-DMR_ISA={form}")
    for source in COMMON_SOURCES:
        object_file = scratch / f"{Path(source).stem}.o"
        yield _compile_command(target, NATIVE_DIR / source, object_file, f"-mcpu={target.baseline}")


def _cuda_commands(target: Target, scratch: Path) -> Iterator[list[str]]:
    """The same for the CUDA target's library."""
    for source in CUDA_SOURCES:
        yield _compile_command(target, source, scratch / f"cuda_{source.stem}.o", f"-mcpu={target.baseline}")


def _compile_command(target: Target, source: Path, object_file: Path, *flags: str) -> list[str]:
    # mem.c defines what clang would otherwise make of its loops.
    builtin = ["-fno-builtin"] if source.name == "mem.c" else []
    command = [*_clang(), "-target", target.triple, *FLAGS, "-I", str(NATIVE_DIR), *flags, *builtin]
    return [*command, "-c", str(source), "-o", str(object_file)]


def _clang() -> list[str]:
    return [sys.executable, "-m", "ziglang", "cc"]


def _run(command: list[str], env: dict[str, str]) -> None:
    finished = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{finished.stderr.strip()}")
    if finished.stderr.strip():
        print(finished.stderr.strip(), file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit status 0 = built or current, 1 = --check found it stale, 2 = cannot build."""
    parser = argparse.ArgumentParser(prog="python -m kernels.build", description="Compile the native CPU operators.")
    parser.add_argument(
        "--check", action="store_true", help="only say whether the library is current (exit status 0 or 1)"
    )
    parser.add_argument("--force", action="store_true", help="compile even if the library is current")
    parser.add_argument(
        "--target", choices=sorted(TARGETS), default=platform.machine(), help="processor family to build for"
    )
    options = parser.parse_args(arguments)
    library = library_file(options.target)
    try:
        if options.check:
            current = is_current(library, source_fingerprint(options.target))
            print(f"{library} is {'current' if current else 'not current: run python -m kernels.build'}")
            return 0 if current else 1
        started = time.perf_counter()
        compiled = build(options.target, force=options.force)
    except BuildError as error:
        print(f"cannot build the kernels: {error}", file=sys.stderr)
        return 2
    print(f"{library} {f'built in {time.perf_counter() - started:.1f} s' if compiled else 'is current'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

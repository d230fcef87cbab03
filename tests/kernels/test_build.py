"""Building the library: once for the same sources, for other processors too, and a clear answer where it cannot be."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.build import BuildError, build, is_current, library_file, main, source_fingerprint
from kernels.loader import library_path

MACHINE = platform.machine()
ROOT = Path(__file__).parents[2]
ELF_MACHINE_OFFSET = 18
ELF_AARCH64 = 183


def test_a_current_library_is_not_built_again() -> None:
    before = library_path().stat().st_mtime_ns
    assert build(MACHINE) is False
    assert library_path().stat().st_mtime_ns == before
    assert main(["--check"]) == 0


def test_any_change_of_a_source_makes_the_library_stale(tmp_path: Path) -> None:
    native = tmp_path / "native"
    shutil.copytree(ROOT / "kernels" / "native", native)
    assert is_current(library_path(), source_fingerprint(MACHINE, native))
    with (native / "split.h").open("a") as source:
        source.write("/* another comment */\n")
    assert not is_current(library_path(), source_fingerprint(MACHINE, native))
    assert not is_current(tmp_path / "nothing.so", source_fingerprint(MACHINE))


def test_a_stale_library_for_aarch64_is_reported_and_then_built(capsys: pytest.CaptureFixture[str]) -> None:
    library = library_file("aarch64")
    library.unlink(missing_ok=True)
    assert main(["--check", "--target", "aarch64"]) == 1
    assert "python -m kernels.build" in capsys.readouterr().out
    assert main(["--target", "aarch64"]) == 0
    header = library.read_bytes()[: ELF_MACHINE_OFFSET + 2]
    assert int.from_bytes(header[ELF_MACHINE_OFFSET:], "little") == ELF_AARCH64
    assert main(["--check", "--target", "aarch64"]) == 0


def test_the_library_asks_for_no_other_library() -> None:
    """It must load on any Linux of its processor, whatever the libc."""
    assert b"libc" not in library_path().read_bytes()


def test_an_unknown_processor_is_refused_by_name() -> None:
    with pytest.raises(BuildError, match="no kernels for processor 'vax'; known: x86_64, aarch64"):
        build("vax")


def test_without_the_compiler_the_message_names_the_extra() -> None:
    """-S leaves out site-packages, and with them the compiler."""
    command = [sys.executable, "-S", "-m", "kernels.build", "--check"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert "pip install 'millrace[kernels]'" in finished.stderr

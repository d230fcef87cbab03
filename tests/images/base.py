"""A stand-in for the official Python image, of Debian packages: the same Debian and the same Python 3.11.

For machines that reach a Debian mirror and no registry of images. Other than the original it has Debian's build of
Python, and no documentation was cut from it; what is tested on it is our part.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Final

PACKAGES: Final = "python3,python3-pip,python3-venv,ca-certificates"
DOCKERFILE: Final = """\
FROM scratch
ADD root.tar /
ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
CMD ["python"]
"""
DEBOOTSTRAP_S: Final = 1200


def make_base_files(directory: Path) -> Path:
    """A folder to build the stand-in from: minutes, once. Needs debootstrap and root."""
    root = directory / "root"
    shutil.rmtree(directory, ignore_errors=True)
    root.mkdir(parents=True)
    bootstrap = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(root)]
    subprocess.run(bootstrap, check=True, stdout=subprocess.DEVNULL, timeout=DEBOOTSTRAP_S)
    shutil.rmtree(root / "var/cache/apt")
    shutil.rmtree(root / "var/lib/apt/lists")
    (root / "usr/bin/python").symlink_to("python3")
    (root / "usr/lib/python3.11/EXTERNALLY-MANAGED").unlink()  # the official image lets pip install
    subprocess.run(["tar", "-C", str(root), "-cf", str(directory / "root.tar"), "."], check=True)
    shutil.rmtree(root)
    (directory / "Dockerfile").write_text(DOCKERFILE)
    return directory

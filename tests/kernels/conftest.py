"""The native library, built before anything here is collected: which forms there are decides which tests there are."""

from __future__ import annotations

import platform

from kernels.build import build

build(platform.machine())

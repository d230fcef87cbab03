"""The set clock is what a process sees, and only its wall clock."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.clock import Clock

CHILD = "import sys, time\nfor _ in sys.stdin: print(time.time(), time.monotonic(), time.localtime()[3], flush=True)"
TOLERANCE_S = 600  # of a jump of 3,600


@pytest.mark.parametrize("ahead_s", [3600, -3600])
def test_a_child_sees_the_jump_on_its_wall_clock_alone(tmp_path: Path, ahead_s: int) -> None:
    clock = Clock(tmp_path / "clock")
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], env={**os.environ, **clock.environment, "TZ": "UTC"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None

        def ahead() -> tuple[float, float]:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write("\n")
            child.stdin.flush()
            wall, monotonic, hour = child.stdout.readline().split()
            assert int(hour) == time.gmtime(float(wall)).tm_hour
            return float(wall) - time.time(), float(monotonic) - time.monotonic()

        assert ahead() == pytest.approx((0, 0), abs=TOLERANCE_S)
        clock.set_ahead(ahead_s)
        assert ahead() == pytest.approx((ahead_s, 0), abs=TOLERANCE_S)
        clock.set_ahead(0)
        assert ahead() == pytest.approx((0, 0), abs=TOLERANCE_S)
        child.stdin.close()

"""`python -m tests.drills p0`: an installation of real processes, a real fault, and its alerts, coming and going.

Our own rules, with time running faster (pace.py), and our own Alertmanager configuration. Exit code 1 if an alert did
not come or did not go.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.drills.drills import DRILLS, DrillFailed, run_drill
from tests.drills.stack import Stack
from tests.shipped import shipped_settings


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.drills", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tier", choices=sorted(DRILLS))
    parser.add_argument("--pace", type=int, default=60, help="how much faster the rules' time runs (default 60)")
    options = parser.parse_args()
    if not 1 <= options.pace <= 60:
        parser.error(f"--pace {options.pace}: expected 1 to 60; faster, a rate has too few samples")
    drill, start = DRILLS[options.tier], time.monotonic()

    def say(words: str) -> None:
        print(words, flush=True)

    with tempfile.TemporaryDirectory(prefix="millrace-drill-") as directory:
        stack = Stack(shipped_settings().store, Path(directory), options.pace, drill.size)
        with stack.open():
            try:
                run_drill(stack, drill, say)
            except DrillFailed as failure:
                say(f"{options.tier}: failed: {failure}")
                return 1
    say(f"{options.tier}: passed in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m tests.faults`: real processes, real faults, one line a fault; exit code 1 if a token went wrong.

Each fault has gateways, workers and a Redis (AOF, fsync always) of its own. Clients stream the same eight requests
(greedy and sampled) over and over; every token is compared with what it is without faults.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.e2e.server import ROOT
from tests.faults.drill import Fault, Tally, run_fault, tokens_without_faults
from tests.faults.faults import FAULTS
from tests.faults.scene import Scene
from tests.shipped import shipped_settings


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faults", default=",".join(FAULTS), help=f"any of {', '.join(FAULTS)}")
    parser.add_argument("--runs", type=int, default=10, help="how often each fault happens")
    parser.add_argument("--streams", type=int, default=32, help="live streams, where the fault does not bring its own")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--beside",
        type=Path,
        help="another checkout, its kernels built: half of all processes are its",
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    checkouts = [ROOT] if options.beside is None else [ROOT, options.beside.resolve()]
    if missing := [path for path in checkouts if not (path / "services/cli.py").is_file()]:
        parser.error(f"--beside: {missing[0]} is no checkout of Millrace")
    names = options.faults.split(",")
    if unknown := [name for name in names if name not in FAULTS]:
        parser.error(f"--faults: unknown {unknown[0]!r}; known are {', '.join(FAULTS)}")
    is_clean = True
    for name in names:
        fault = FAULTS[name]
        streams = options.streams if fault.streams is None else fault.streams
        tally = _drill(name, fault, options.runs, streams, options.seed, checkouts)
        is_clean = is_clean and tally.is_clean
        found = {"fault": name, "what": fault.words, "runs": options.runs, "at_once": streams}
        print(json.dumps(found | asdict(tally)) if options.json else _line(found | asdict(tally)), flush=True)
    return 0 if is_clean else 1


def _drill(name: str, fault: Fault, runs: int, streams: int, seed: int, checkouts: Sequence[Path]) -> Tally:
    def progress(done: int) -> None:
        print(f"{name}: {done}/{runs}", file=sys.stderr)

    store = shipped_settings().store
    expected = tokens_without_faults(store)
    with (
        tempfile.TemporaryDirectory(prefix="millrace-faults-") as directory,
        Scene(store, Path(directory), fault.stage, checkouts).open() as scene,
    ):
        drill = run_fault(scene, fault, expected, runs=runs, streams=streams, seed=seed, progress=progress)
        return asyncio.run(drill)


def _line(row: dict[str, Any]) -> str:
    return (
        "{fault} {what}: {runs} runs, {streams:,} streams, {at_once} at a time; tokens lost {lost}, doubled {doubled},"
        " changed {changed}; worst gap {worst_gap_s:.2f} s; resumed {resumes}, taken over {takeovers}, refused at the"
        " door {refusals}; unexpected exits {exits}, left behind {left}, errors {errors}"
    ).format(**(row | {"errors": dict(row["errors"]) or "none"}))


if __name__ == "__main__":
    sys.exit(main())

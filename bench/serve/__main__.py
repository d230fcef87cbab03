"""Load a real system: `python -m bench.serve soak|overload|requests`. See docs/performance.md, "Load and soak".

Gateway, worker and Redis are processes of their own, with the shipped model; the client runs beside them on the same
machine and takes processor time from them. Run one at a time. Kernels must be built (`python -m kernels.build`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.serve.overload import OverloadPlan, run_overload
from bench.serve.plan import add_flags, read_plan
from bench.serve.report import overload_text, requests_text, soak_text
from bench.serve.requests import RequestsPlan, run_requests
from bench.serve.soak import SoakPlan, run_soak


@dataclass(frozen=True, slots=True)
class Mode:
    """One kind of run."""

    help: str
    plan: type[Any]
    run: Callable[[Any], Mapping[str, Any]]
    text: Callable[[Mapping[str, Any]], str]


MODES: Mapping[str, Mode] = {
    "soak": Mode("idle and active clients for minutes: memory, files, latency", SoakPlan, run_soak, soak_text),
    "overload": Mode(
        "three times what it can do: goodput, refusals, recovery", OverloadPlan, run_overload, overload_text
    ),
    "requests": Mode(
        "whole answers by wrk: rate and processor time of a request", RequestsPlan, run_requests, requests_text
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.serve", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="mode", required=True)
    for name, mode in MODES.items():
        command = commands.add_parser(name, help=mode.help, description=mode.help)
        add_flags(command, mode.plan)
        command.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    mode = MODES[options.mode]
    found = mode.run(read_plan(parser, options, mode.plan))
    print(json.dumps(found) if options.json else mode.text(found))
    return 0 if found["is_clean"] else 1


if __name__ == "__main__":
    sys.exit(main())

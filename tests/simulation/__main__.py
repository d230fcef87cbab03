"""`python -m tests.simulation SEED`: one world's history, call by call; exit code 1 if what must not happen has."""

from __future__ import annotations

import argparse
import sys

from tests.simulation.books import Violation
from tests.simulation.calls import in_words
from tests.simulation.world import START_MS, World


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("seed", type=int)
    world = World(parser.parse_args().seed)
    violation: Violation | None = None
    try:
        world.run()
    except Violation as found:
        violation = found
    print(f"{world.weather_name}: {world.weather}\n{world.limits}")
    for record in world.history:
        fate = f"  ({record.fate})" if record.fate else ""
        call = f"{record.at_ms - START_MS:>8,} {record.caller:>4}  {in_words(record.call)}"
        print(call + fate if record.answer is None else f"{call}  ->  {in_words(record.answer)}{fate}")
    print(violation or "all is well")
    return 1 if violation else 0


if __name__ == "__main__":
    sys.exit(main())

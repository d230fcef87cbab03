"""`python -m scripts.bench_gate OTHER`: is the engine here as fast as in another checkout?

Rounds go over both in turn, because what a shared machine does to one minute it may not do to the next; medians are
compared, at each concurrency. Exit code 1 if this checkout is slower than FLOOR of the other.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
FLOOR: Final = 0.85  # a shared machine's spells are as large as that
RUN_S: Final = 600

Rates = Mapping[int, Sequence[float]]  # concurrency -> total tokens/s of each round


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_gate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("other", type=Path, help="a checkout of the commit to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    here: dict[int, list[float]] = defaultdict(list)
    other: dict[int, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as store:
        trees = ((ROOT, Path(store) / "here", here), (options.other.resolve(), Path(store) / "other", other))
        for tree, models, _ in trees:
            _run(tree, models, "-m", "kernels.build")
            _run(tree, models, "-m", "services.cli", "models", "import", "models/millpond", "--name", "millpond")
        for _ in range(options.rounds):
            for tree, models, rates in trees:
                report = json.loads(_run(tree, models, "-m", "services.cli", "bench", "engine", "--json"))
                for row in report["results"]:
                    rates[row["concurrency"]].append(row["total_tokens_per_s"])
    slower = too_slow(here, other)
    for count in here:
        print(f"concurrency {count}: {median(here[count]):,.0f} tokens/s here, {median(other[count]):,.0f} there")
    print(f"slower than {FLOOR:.0%} at concurrency {', '.join(map(str, slower))}" if slower else "as fast as there")
    return 1 if slower else 0


def too_slow(here: Rates, other: Rates, floor: float = FLOOR) -> list[int]:
    """Concurrencies at which the median here is less than `floor` of the other's."""
    return [count for count in here if median(here[count]) < floor * median(other[count])]


def _run(tree: Path, store: Path, *words: str) -> str:
    environment = {**os.environ, "MILLRACE_STORE": str(store), "PYTHONPATH": str(tree)}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=RUN_S,
        check=True,
    )
    return done.stdout


if __name__ == "__main__":
    raise SystemExit(main())

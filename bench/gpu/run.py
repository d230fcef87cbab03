"""One run: its results so far, kept on disk, and steps that may fail or be left out without ending it."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, Final

from bench.gpu.report import table
from services.settings import Settings

Results = dict[str, Any]
RESULTS_FILE: Final = "gpu.json"
REPORT_FILE: Final = "gpu.md"


class Run:
    """The state of a run. Results are written after every step: one that is cut off leaves what it had."""

    def __init__(self, out: Path, scratch: Path, budget_s: float, arguments: list[str]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.scratch = scratch
        self.settings = Settings(store=scratch / "store")
        self.results: Results = {"date": date.today().isoformat(), "arguments": arguments, "notes": []}
        self._out = out
        self._start = time.monotonic()
        self._budget_s = budget_s

    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return self._budget_s - (time.monotonic() - self._start)

    def note(self, text: str) -> None:
        """Say something that a reader of the results must know."""
        self.results["notes"].append(text)
        print(f"[{time.monotonic() - self._start:6.1f}] {text}", flush=True)
        self._write()

    def step(self, what: str, into: Results, key: str, work: Callable[[], object], *, needs_s: float = 0) -> bool:
        """Do `work` and keep its result; whether it succeeded. Left out if the budget has less than `needs_s` left."""
        begun, left_s = time.monotonic(), self.left_s()
        if left_s < max(needs_s, 0.001):
            self.note(f"{what}: left out, {max(left_s, 0):.0f} s of the budget were left, {needs_s:.0f} s are needed")
            return False
        try:
            into[key] = work()
            ok = True
        except Exception as error:  # one figure that cannot be had must not cost the others
            traceback.print_exc(limit=-4, file=sys.stdout)
            lines = traceback.format_exception(error, limit=-2)
            into[key] = {"error": f"{type(error).__name__}: {error}"[:500], "traceback": "".join(lines)[-1500:]}
            ok = False
        took_s = time.monotonic() - begun
        self.results.setdefault("steps_s", {})[what] = round(took_s, 2)
        print(f"[{time.monotonic() - self._start:6.1f}] {what}: {took_s:.1f} s{'' if ok else ', FAILED'}", flush=True)
        self._write()
        return ok

    def finish(self, *, as_json: bool) -> None:
        """Write the report and print it, or the results as JSON."""
        text = table(self.results)
        (self._out / REPORT_FILE).write_text(text + "\n", "utf-8")
        print(json.dumps(self.results, default=str) if as_json else text, flush=True)

    def _write(self) -> None:
        partial = self._out / f"{RESULTS_FILE}.partial"
        partial.write_text(json.dumps(self.results, indent=1, default=str), "utf-8")
        partial.replace(self._out / RESULTS_FILE)  # whoever cuts the run off finds a whole file

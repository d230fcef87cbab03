"""`millrace probe` over a few golden items, true ones or such as the model must miss."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.model_commands import SHIPPED_DIRECTORY
from tests.drills.stack import Stack
from tests.e2e.server import ROOT

ITEMS: Final = 40
MISSED: Final = 4  # every fourth answer is changed where the model must miss
EVERY_S: Final = 5


@dataclass(frozen=True, slots=True)
class Exam:
    """Golden items, and the baseline to compare with."""

    golden: Path
    baseline: Path


def true_exam(stack: Stack) -> Exam:
    """The shipped items, and what the model answers to them now."""
    lines = (SHIPPED_DIRECTORY / "golden.jsonl").read_text().splitlines()
    return _recorded(stack, "true", [json.loads(line) for line in lines[:: len(lines) // ITEMS]][:ITEMS])


def missed_exam(stack: Stack) -> Exam:
    """The same with some other answers, and a baseline that had them all right: as if the model had become worse."""
    exam = true_exam(stack)
    items = [json.loads(line) for line in exam.golden.read_text().splitlines()]
    for item in items[::MISSED]:
        item["answer"] = f"not {item['answer']}"
    exam = _recorded(stack, "missed", items)
    before = json.loads(exam.baseline.read_text())
    for recorded in before["models"].values():
        recorded |= {"wrong": [], "missed": []}
    exam.baseline.write_text(json.dumps(before))
    return exam


@contextmanager
def probing(stack: Stack, exam: Exam) -> Iterator[None]:
    """A prober at the address that is scraped."""
    flags = ["--golden", str(exam.golden), "--baseline", str(exam.baseline), "--every", str(EVERY_S)]
    process = subprocess.Popen(
        _command(*flags), cwd=ROOT, env=_environment(stack), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if re.search(r"probes at http", line):
                break
        else:
            raise RuntimeError(f"the prober ended with {process.wait()}:\n{said}")
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def _recorded(stack: Stack, name: str, items: Sequence[dict[str, object]]) -> Exam:
    exam = Exam(stack.directory / f"{name}.jsonl", stack.directory / f"{name}.json")
    exam.golden.write_text("".join(json.dumps(item) + "\n" for item in items))
    flags = ["--golden", str(exam.golden), "--record", str(exam.baseline), "--once", "--json"]
    subprocess.run(_command(*flags), cwd=ROOT, env=_environment(stack), check=True, timeout=180, capture_output=True)
    return exam


def _command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "services.cli", "probe", *flags]


def _environment(stack: Stack) -> dict[str, str]:
    settings = stack.settings | {"store": str(stack.store), "port": stack.prober_address.rpartition(":")[2]}
    others = {name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")}
    return others | {f"MILLRACE_{name.upper()}": value for name, value in settings.items()}

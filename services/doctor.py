"""`millrace doctor`: this machine, what the kernels chose, and the sizes each stored model would get here."""

from __future__ import annotations

import json
from dataclasses import asdict

from kernels import loader
from model_store.store import Store
from services.loading import describe, find_model
from services.machine import inspect_machine
from services.settings import Settings


def doctor(settings: Settings, *, as_json: bool) -> int:
    """Print facts and, where something is wrong, what to do; the exit code is 1 if serving could not start."""
    machine = inspect_machine()
    problems: list[str] = []
    instruction_sets: list[str] = []
    active = "none"
    try:
        instruction_sets, active = list(loader.isa_available()), loader.isa_active()
    except loader.KernelsUnavailable as error:
        problems.append(str(error))
    stored = Store(settings.store).list()
    models = [describe(settings, find_model(settings, manifest.model_id), machine) for manifest in stored]
    if not stored:
        problems.append(f"the store {settings.store} is empty; import a model: millrace models import DIR --name NAME")
    report: dict[str, object] = {
        "machine": asdict(machine),
        "kernels": {"available": instruction_sets, "active": active},
        "store": str(settings.store),
        "models": models,
        "problems": problems,
    }
    print(json.dumps(report) if as_json else _text(report))
    return 1 if problems else 0


def _text(report: dict[str, object], indent: str = "") -> str:
    lines: list[str] = []
    for name, value in report.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", _text(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for each in value:
                lines += [f"{indent}{name}:", _text(each, indent + "  ")]
        else:
            shown = f"{value:,}" if isinstance(value, int) else ", ".join(value) if isinstance(value, list) else value
            lines.append(f"{indent}{name:<20} {shown}")
    return "\n".join(lines)

"""Baselines: what each revision of a model answered when it was known to be good.

A file holds one entry for a revision, so the file of a fleet is the union of what was recorded at each promotion.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from services.prober.golden import Id, Item, digest_of
from services.prober.run import Outcome
from services.settings import SettingsError

MAX_FILE_BYTES: Final = 16 << 20


class Baseline(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One revision's answers."""

    golden: str  # digest of the items it answered
    items: Annotated[int, Meta(ge=1)]
    wrong: list[Id]  # items whose whole answer was not the expected one
    missed: list[Id]  # items whose next token was not the expected one
    nll: dict[Id, float] = {}  # of each item; {}: recorded before likelihoods were measured

    @classmethod
    def of(cls, items: Sequence[Item], outcome: Outcome) -> Baseline:
        return cls(digest_of(items), len(items), _false(outcome.whole), _false(outcome.step), outcome.nll)

    def outcome(self, items: Sequence[Item]) -> Outcome:
        """The same answers by item."""
        wrong, missed = set(self.wrong), set(self.missed)
        return Outcome(
            whole={item.id: item.id not in wrong for item in items},
            step={item.id: item.id not in missed for item in items},
            nll={item.id: self.nll[item.id] for item in items if item.id in self.nll},
        )


class BaselineFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: Literal[1] = 1
    models: dict[str, Baseline] = {}  # by model id, name@revision


def read_baseline(path: Path, model_id: str, items: Sequence[Item]) -> Baseline | None:
    """The entry of this revision, if there is one. Raises SettingsError, also if it was recorded on other items."""
    baseline = _read(path).models.get(model_id)
    if baseline is not None and baseline.golden != digest_of(items):
        raise SettingsError(f"{path}: the baseline of {model_id} was recorded on other golden items; record it again")
    return baseline


def write_baseline(path: Path, model_id: str, baseline: Baseline) -> None:
    """Put this revision's entry into the file, in one rename; others stay. Raises SettingsError."""
    models = dict(_read(path).models) if path.exists() else {}
    models[model_id] = baseline
    text = msgspec.json.format(msgspec.json.encode(BaselineFile(models=models)), indent=1)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "wb") as file:
            file.write(text + b"\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise SettingsError(f"cannot write a baseline to {path}: {error.strerror}") from None


def _read(path: Path) -> BaselineFile:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            raise ValueError(f"more than {MAX_FILE_BYTES:,} bytes")
        return msgspec.json.decode(raw, type=BaselineFile)
    except (OSError, ValueError) as error:
        raise SettingsError(f"cannot read a baseline from {path}: {error}") from None


def _false(answers: dict[str, bool]) -> list[str]:
    return sorted(item for item, right in answers.items() if not right)

"""Read config.json with every value typed and bounded.

Apart from architectures.py so that what a key means and whether its value is sane are two questions. A refusal names
the file, the key, the value and what was expected; nothing that a config says can become a huge allocation or a crash
later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import msgspec

from model_store.errors import BadCheckpoint

MAX_JSON_BYTES = 1 << 20  # configs are a few kB


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, object]:
    """The JSON object in `path`. Raises BadCheckpoint if it is too large, not JSON or not an object."""
    size_bytes = path.stat().st_size
    if size_bytes > max_bytes:
        raise BadCheckpoint(f"{path.name} has {size_bytes:,} bytes; the limit is {max_bytes:,}", param=path.name)
    try:
        value: object = msgspec.json.decode(path.read_bytes())
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadCheckpoint(f"{path.name} is not JSON: {error}", param=path.name) from error
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path.name} holds a {type(value).__name__}; expected an object", param=path.name)
    return value


class Config:
    """One JSON object with typed, bounded access. A key that is missing or null takes the default, if there is one."""

    def __init__(self, values: Mapping[str, object], where: str = "config.json") -> None:
        self._values = values
        self._where = where

    def __contains__(self, key: str) -> bool:
        """Whether the key is there at all: null counts."""
        return key in self._values

    def keys(self) -> set[str]:
        return set(self._values)

    def value(self, key: str) -> object:
        return self._values.get(key)

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self._given(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.refusal(key, f"an integer from {low:,} to {high:,}", value)
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value = self._given(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refusal(key, f"a number from {low:g} to {high:g}", value)
        if not math.isfinite(value) or not low <= value <= high:
            raise self.refusal(key, f"a number from {low:g} to {high:g}", value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._given(key, default)
        if not isinstance(value, bool):
            raise self.refusal(key, "true or false", value)
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._given(key, default)
        if not isinstance(value, str):
            raise self.refusal(key, "a string", value)
        return value

    def section(self, key: str) -> Config | None:
        """The object under `key`, or None."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.refusal(key, "an object", value)
        return Config(value, f"{self._where}: {key}")

    def texts(self, key: str) -> list[str] | None:
        """The list of strings under `key`, or None."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.refusal(key, "a list of strings", value)
        return value

    def integers(self, key: str, low: int, high: int) -> list[int] | None:
        """The integer, or list of at most 64 integers, under `key` as a list; None if missing or null."""
        value = self._values.get(key)
        if value is None:
            return None
        items = value if isinstance(value, list) else [value]
        if len(items) > 64:
            raise self.refusal(key, "at most 64 integers", value)
        return [Config({key: item}, self._where).integer(key, low, high) for item in items]

    def refusal(self, key: str, expected: str, value: object) -> BadCheckpoint:
        """The error for `key`; raise what it returns."""
        given = "missing" if key not in self._values else shown(value)
        return BadCheckpoint(f"{self._where}: {key} is {given}; expected {expected}", param=key)

    def _given(self, key: str, default: object) -> object:
        value = self._values.get(key)
        return default if value is None else value


def shown(value: object) -> str:
    """A value from a file as it may stand in a message: at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

"""A run's plan is a frozen dataclass whose fields are its flags: default, lowest value and help stand beside each."""

from __future__ import annotations

import argparse
from dataclasses import field, fields
from typing import Any, TypeVar

Number = TypeVar("Number", int, float)
Plan = TypeVar("Plan")


def flag(default: Number, low: float, help: str) -> Number:
    """A field of a plan: a number that is at least `low`. What a dataclass makes of it has the default's type."""
    value: Any = field(default=default, metadata={"low": low, "help": help})
    return value  # type: ignore[no-any-return]  # as dataclasses.field itself is typed


def add_flags(parser: argparse.ArgumentParser, kind: type[Any]) -> None:
    for each in fields(kind):
        parser.add_argument(
            "--" + each.name.replace("_", "-"), type=type(each.default), default=each.default,
            help=f"{each.metadata['help']}, at least {each.metadata['low']:g} [%(default)s]",
        )  # fmt: skip


def read_plan(parser: argparse.ArgumentParser, options: argparse.Namespace, kind: type[Plan]) -> Plan:
    """The plan that the flags say. A value below its bound ends the program with the parser's words."""
    values: dict[str, Any] = {each.name: getattr(options, each.name) for each in fields(kind)}  # type: ignore[arg-type]
    for each in fields(kind):  # type: ignore[arg-type]
        if not values[each.name] >= each.metadata["low"]:
            name = each.name.replace("_", "-")
            parser.error(f"--{name} is {values[each.name]}; it must be at least {each.metadata['low']:g}")
    return kind(**values)

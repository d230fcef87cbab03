"""Every setting of every process, read once at the edge into one frozen dataclass.

A field is the setting: its name is the flag (--max-batch-tokens), the environment variable (MILLRACE_MAX_BATCH_TOKENS)
and the key of the TOML file (max_batch_tokens); its default, bounds and help stand beside it. Flags win over the
environment, the environment over the file. An unknown name refuses to start. Facts (number of KV blocks, context
length) are computed from these and shown by `millrace doctor`, never configured.
"""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Final, get_args, get_origin, get_type_hints

PREFIX: Final = "MILLRACE_"
CONFIG_VARIABLE: Final = "MILLRACE_CONFIG"

Scalar = str | int | float | Path


class SettingsError(Exception):
    """A setting that cannot be read; the message names it, its value, where it came from and what was expected."""


@dataclass(frozen=True, slots=True)
class About:
    """What a setting means and what it accepts: the one text behind --help, validation and the docs."""

    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings, validated. Sizes in tokens or bytes, times in seconds or ms, as their names say."""

    store: Annotated[Path, About("directory of the model store")] = Path("~/.millrace/store")
    models: Annotated[str, About("models to serve, comma separated: name or name@revision")] = "millpond"
    host: Annotated[str, About("address the gateway listens on")] = "127.0.0.1"
    port: Annotated[int, About("port of the gateway, or of a worker's probes", 0, 65535)] = 8000
    keys_file: Annotated[str, About("file of API keys that `millrace keys` writes; empty = no keys are asked for")] = ""
    open_access: Annotated[
        str,
        About("without keys_file, may other machines reach the gateway", choices=("no", "yes")),
    ] = "no"
    allowed_hosts: Annotated[
        str,
        About(
            "host names that requests may be addressed to, comma separated, without ports; * = any. Empty = any, but "
            "without keys on a loopback address only names of this machine, as a web page whose name is made to point "
            "here could else read answers"
        ),
    ] = ""
    allowed_origins: Annotated[
        str,
        About("web pages that may open WebSockets, comma separated: https://chat.example.com; empty = none"),
    ] = ""
    redis_url: Annotated[
        str,
        About(
            "where `gateway` and `worker` meet: redis://host:port/db, unix:///path, "
            "redis+sentinel://host:port,host:port/master/db or redis+cluster://host:port,host:port; with TLS rediss"
        ),
    ] = "redis://127.0.0.1:6379/0"
    metrics_port: Annotated[int, About("port of its own for /metrics; 0 = on the gateway's port", 0, 65535)] = 0
    threads: Annotated[int, About("compute threads; 0 = one for each core this process may use", 0, 1024)] = 0
    spin: Annotated[
        str,
        About(
            "do compute threads spin for a moment between steps; auto = not in `worker`", choices=("auto", "yes", "no")
        ),
    ] = "auto"
    worker_nice: Annotated[
        int, About("`worker` steps back this far for a gateway and Redis on the same cores; 0 = not", 0, 19)
    ] = 7
    kernels: Annotated[str, About("instruction set of the kernels", choices=("auto", "portable", "avx2", "avx512"))] = (
        "auto"
    )
    kv_memory_bytes: Annotated[
        int,
        About(
            "memory for the KV cache of each model; 0 = a quarter of what is free, on a GPU all that is left", 0, 2**44
        ),
    ] = 0
    max_batch_tokens: Annotated[
        int, About("most tokens a step computes; 0 = 512 on a processor, 4096 on a GPU", 0, 65536)
    ] = 0
    max_batch_seqs: Annotated[int, About("most sequences a step advances", 1, 4096)] = 256
    target_itl_ms: Annotated[
        float, About("step time that prefill chunks are cut to while others stream; 0 = off", 0, 60_000)
    ] = 100.0
    max_queued_tokens: Annotated[int, About("most tokens (prompt + max_tokens) that may wait or run", 1, 2**40)] = (
        4_000_000
    )
    max_tenant_tokens: Annotated[int, About("the same, of one tenant; 0 = as max_queued_tokens", 0, 2**40)] = 0
    unserved: Annotated[
        str,
        About(
            "when no worker serves a model, its requests: refuse, or let wait until their deadline",
            choices=("refuse", "wait"),
        ),
    ] = "refuse"
    replica_capacity_tokens: Annotated[
        int,
        About("KV tokens of one worker, that scaling counts with until one was seen; 0 = unknown", 0, 2**40),
    ] = 0
    redis_replicas: Annotated[int, About("replicas that Redis should have, for alerts", 0, 64)] = 0
    log_ttl_s: Annotated[float, About("an answer can be read again for this long after its end", 1, 2_592_000)] = 300.0
    background_ttl_s: Annotated[float, About("the same, of a background request", 1, 2_592_000)] = 3600.0
    max_body_bytes: Annotated[int, About("largest HTTP body or WebSocket frame", 1024, 2**30)] = 1_048_576
    lease_s: Annotated[float, About("a worker that is silent for this long loses its requests", 0.1, 3600)] = 6.0
    cancel_grace_s: Annotated[float, About("a client that leaves may come back within this time", 0, 3600)] = 2.0
    drain_s: Annotated[float, About("on SIGTERM, time to finish what runs", 0, 3600)] = 20.0
    log_level: Annotated[str, About("what is logged", choices=("debug", "info", "warning", "error"))] = "info"

    @property
    def model_names(self) -> tuple[str, ...]:
        return names_in(self.models)


def names_in(text: str) -> tuple[str, ...]:
    """The names in a list with commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _about() -> dict[str, tuple[type[Scalar], About]]:
    hints = get_type_hints(Settings, include_extras=True)
    table: dict[str, tuple[type[Scalar], About]] = {}
    for each in fields(Settings):
        hint = hints[each.name]
        if get_origin(hint) is not Annotated:
            raise TypeError(f"Settings.{each.name} has no About; this is a bug")
        kind, about = get_args(hint)
        table[each.name] = (kind, about)
    return table


def _parse(name: str, raw: object, source: str) -> Scalar:
    kind, about = _about()[name]
    expected = f"expected {_expectation(kind, about)}"
    if isinstance(raw, bool) or not isinstance(raw, str | int | float):
        raise SettingsError(f"{source}: {raw!r} is not a value for {name}; {expected}")
    try:
        value: Scalar = Path(str(raw)).expanduser() if issubclass(kind, Path) else kind(raw)
    except ValueError:
        raise SettingsError(f"{source}: {raw!r} is not a value for {name}; {expected}") from None
    if about.choices and value not in about.choices:
        raise SettingsError(f"{source}: {name} is {value!r}; {expected}")
    if isinstance(value, int | float):
        low, high = about.low, about.high
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            raise SettingsError(f"{source}: {name} is {value}; {expected}")
    return value


def _expectation(kind: type[Scalar], about: About) -> str:
    if about.choices:
        return "one of " + ", ".join(about.choices)
    word = {int: "a whole number", float: "a number", Path: "a path", str: "text"}[kind]
    return word if about.low is None else f"{word} from {about.low:g} to {about.high:g}"


def _from_file(path: Path) -> dict[str, Scalar]:
    try:
        table = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SettingsError(f"cannot read settings from {path}: {error}") from None
    for name in table:
        if name not in _about():
            raise SettingsError(f"{path}: unknown setting {name!r}; known: {', '.join(_about())}")
    return {name: _parse(name, raw, str(path)) for name, raw in table.items()}


def _from_environment(environment: Mapping[str, str]) -> dict[str, Scalar]:
    found: dict[str, Scalar] = {}
    for variable, raw in environment.items():
        if not variable.startswith(PREFIX) or variable == CONFIG_VARIABLE:
            continue
        name = variable[len(PREFIX) :].lower()
        if name not in _about():
            # A typo must not be accepted in silence. In Kubernetes set enableServiceLinks: false, or a Service called
            # "millrace" injects variables that look like these.
            raise SettingsError(f"unknown environment variable {variable}; known: {', '.join(variables())}")
        found[name] = _parse(name, raw, variable)
    return found


def describe_setting(name: str) -> str:
    """What a setting means and accepts, in one line."""
    kind, about = _about()[name]
    return f"{about.help} ({_expectation(kind, about)})"


def variables() -> list[str]:
    """The environment variables, in the order of the fields."""
    return [PREFIX + name.upper() for name in _about()]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give `parser` one flag for each setting; absent flags stay absent, so that the other sources are heard."""
    group = parser.add_argument_group(
        "settings", "each is also an environment variable (MILLRACE_NAME) and a config key"
    )
    group.add_argument("--config", metavar="FILE", help=f"TOML file of settings [{CONFIG_VARIABLE}]")
    for each in fields(Settings):
        text = f"{describe_setting(each.name)}, default {each.default}"
        group.add_argument(
            "--" + each.name.replace("_", "-"),
            dest=f"setting_{each.name}",
            metavar=each.name.upper(),
            default=argparse.SUPPRESS,
            help=text.replace("%", "%%"),
        )


def read_settings(arguments: argparse.Namespace, environment: Mapping[str, str] | None = None) -> Settings:
    """The settings from flags over environment over file. Raises SettingsError."""
    environment = os.environ if environment is None else environment
    values: dict[str, Scalar] = {}
    config = getattr(arguments, "config", None) or environment.get(CONFIG_VARIABLE)
    if config:
        values |= _from_file(Path(config).expanduser())
    values |= _from_environment(environment)
    for name in _about():
        if hasattr(arguments, f"setting_{name}"):
            values[name] = _parse(name, getattr(arguments, f"setting_{name}"), "--" + name.replace("_", "-"))
    values.setdefault("store", Settings().store.expanduser())
    return Settings(**values)  # type: ignore[arg-type]  # _parse has given each value its field's type


def package_version() -> str:
    """The installed version of Millrace."""
    try:
        return version("millrace")
    except PackageNotFoundError:
        return "unknown (not installed)"

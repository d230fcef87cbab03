"""The address of a Redis, of any kind, taken apart.

    redis://[user:password@]host[:port][/db]               one server; rediss:// with TLS, unix:///path for a socket
    redis+sentinel://host[:port][,host:port]/master[/db]   the master that sentinels know by this name
    redis+cluster://host[:port][,host:port]                a cluster, of which any nodes are named

User, password and options (?ssl_ca_certs=...) are those of redis-py's addresses; rediss+sentinel:// and rediss+cluster://
speak TLS. What sentinels ask for themselves are the options sentinel_username and sentinel_password.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import SplitResult, unquote, urlsplit

from redis.asyncio.connection import parse_url

from services.queues.redis_master import Address

MAX_HOSTS: Final = 64
DEFAULT_PORTS: Final = {"": 6379, "sentinel": 26379, "cluster": 6379}
SCHEMES: Final = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")
EXAMPLE: Final = "redis+sentinel://host[:port][,host:port]/master[/db]"


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """What connections are made of; options have redis-py's names."""

    seeds: tuple[Address, ...]  # whom to ask where the master is; with one server, nobody
    master: str  # its name among sentinels; "" in a cluster
    options: dict[str, Any]  # of connections to the master
    seed_options: dict[str, Any]


def parse_address(url: str) -> RedisAddress:
    """Raises ValueError that says what is wrong, without repeating passwords."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise ValueError(f"it begins with {parts.scheme + '://'!r}; known are {known}")
    base, _, kind = parts.scheme.partition("+")
    if base == "unix":
        if not parts.path:
            raise ValueError("it names no socket: unix:///path")
        return RedisAddress((), "", dict(parse_url(url)), {})
    users, at, hosts = parts.netloc.rpartition("@")
    seeds = _seeds(hosts, DEFAULT_PORTS[kind])
    if not kind and len(seeds) > 1:
        raise ValueError(f"it names {len(seeds)} hosts; several are for redis+sentinel:// and redis+cluster://")
    path = [unquote(part) for part in parts.path.split("/") if part]
    master = path.pop(0) if kind == "sentinel" and path else ""
    if kind == "sentinel" and not master:
        raise ValueError(f"it names no master: {EXAMPLE}")
    first = hosts.split(",")[0]
    options = dict(parse_url(SplitResult(base, users + at + first, _database(path), parts.query, "").geturl()))
    if kind == "cluster" and options.get("db"):
        raise ValueError(f"it names database {options['db']}; a cluster has only 0")
    if not kind:
        return RedisAddress((), "", options, {})
    options = {name: value for name, value in options.items() if name not in ("host", "port")}
    return RedisAddress(seeds, master, *_split(options, kind))


def _split(options: dict[str, Any], kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of connections to the master, and of those to seeds."""
    of_master = {name: value for name, value in options.items() if not name.startswith("sentinel_")}
    of_seeds = {name: value for name, value in of_master.items() if name not in ("db", "max_connections")}
    if kind == "sentinel":
        for name in ("username", "password"):
            of_seeds.pop(name, None)
            if f"sentinel_{name}" in options:
                of_seeds[name] = options[f"sentinel_{name}"]
    return of_master, of_seeds


def _seeds(hosts: str, default_port: int) -> tuple[Address, ...]:
    names = hosts.split(",")
    if len(names) > MAX_HOSTS:
        raise ValueError(f"it names {len(names)} hosts; at most {MAX_HOSTS} are read")
    return tuple(_seed(name, default_port) for name in names)


def _seed(name: str, default_port: int) -> Address:
    try:
        parts = urlsplit(f"//{name}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"{name!r} is no host:port: {error}") from None
    if not host:
        raise ValueError(f"{name!r} names no host")
    return host, port if port is not None else default_port


def _database(path: list[str]) -> str:
    text = "/".join(path) or "0"
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{text!r} is no number of a database")
    return f"/{text}"

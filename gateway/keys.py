"""API keys: which tenant a connection speaks for, by the secret it brings.

A secret is 256 random bits and is kept by its owner alone; the file of keys holds its SHA-256. That is enough: a slow
hash protects secrets that people could guess, and finding a digest in a table tells nothing by the time it takes,
since nobody can choose what a secret's digest begins with.

The file is written by `millrace keys` and read here, with the same schema. What it does not allow is refused.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from gateway.caller import Caller
from wire.errors import Forbidden, Unauthorized
from wire.messages import Weight

logger = logging.getLogger(__name__)

MAX_KEYS: Final = 10_000
MAX_FILE_BYTES: Final = 16 << 20  # twice what MAX_KEYS of the longest need
LOOK_EVERY_S: Final = 1.0
# Routes for those who watch the server; the port of a metrics_port has no others.
OPEN_PATHS: Final = frozenset(("/livez", "/readyz", "/version", "/metrics", "/openapi.json"))
AUTHORIZATION: Final = "Authorization"

# The length is fixed, so a header that is longer than a key can be is never hashed.
_BEARER: Final = re.compile(rb"[Bb][Ee][Aa][Rr][Ee][Rr] (mr-[A-Za-z0-9_-]{43})")

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}\Z")]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Line = Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f-\x9f]{0,200}\Z")]
Moment = Annotated[datetime, Meta(tz=True)]


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One key, without its secret. A field that is not known here may be a restriction, so it is refused."""

    id: Name
    sha256: Digest  # of the secret, in hex
    tenant: Name
    created: Moment
    weight: Weight = 1  # the tenant's share among those who wait
    expires: Moment | None = None
    revoked: Moment | None = None
    note: Line = ""

    def state(self, now: datetime) -> Literal["active", "expired", "revoked"]:
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "active"


class KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the file holds."""

    version: Literal[1]
    keys: Annotated[list[Key], Meta(max_length=MAX_KEYS)]


class BadKeyFile(Exception):
    """The file of keys cannot be read or breaks its schema; the message says where, and quotes nothing of it."""


def digest_of(secret: bytes) -> str:
    return sha256(secret).hexdigest()


def read_keys(path: Path) -> Sequence[Key]:
    """The keys in a file. Raises BadKeyFile."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a pipe must not wait for a writer
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise BadKeyFile(f"cannot read keys from {path}: not a file")
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise BadKeyFile(f"cannot read keys from {path}: {error.strerror}") from None
    if len(raw) > MAX_FILE_BYTES:
        raise BadKeyFile(f"{path} has more than {MAX_FILE_BYTES:,} bytes, the most a file of keys may have")
    try:
        keys = msgspec.json.decode(raw, type=KeyFile).keys
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadKeyFile(f"{path} is not a file of keys: {error}") from None
    for what in ("id", "sha256"):
        if len({getattr(key, what) for key in keys}) < len(keys):
            raise BadKeyFile(f"{path} is not a file of keys: two of them have the same {what}")
    return keys


class KeyRing:
    """The keys of a file, as it is now.

    The file is looked at when somebody comes, at most every `look_every_s` seconds, and read again if it was changed
    (40 ms on the event loop for 10,000 keys). If it cannot be read, the last good keys stay in force, and the
    reason is logged once.
    """

    def __init__(self, path: Path, *, look_every_s: float = LOOK_EVERY_S) -> None:
        """Raises BadKeyFile: there are no good keys yet."""
        self._path = path
        self._look_every_s = look_every_s
        self._looked_at_s = time.monotonic()
        self._problem = ""
        self._read(_stamp(path))

    def caller(self, authorization: bytes | None) -> Caller:
        """Whose key this header brings. Raises Unauthorized or Forbidden, whose words never contain the key."""
        self._look()
        if authorization is None:
            raise Unauthorized("this server wants a key, as Authorization: Bearer mr-...", param=AUTHORIZATION)
        match = _BEARER.fullmatch(authorization)
        key = None if match is None else self._by_digest.get(digest_of(match[1]))
        if key is None:
            raise Unauthorized("the key is not one of this server", param=AUTHORIZATION)
        if (state := key.state(datetime.now(UTC))) != "active":
            raise Forbidden(f"the key {key.id} is {state}", param=AUTHORIZATION)
        return Caller(key.tenant, key.weight)

    def _look(self) -> None:
        if (now_s := time.monotonic()) - self._looked_at_s < self._look_every_s:
            return
        self._looked_at_s = now_s
        if (stamp := _stamp(self._path)) == self._seen:
            return
        try:
            self._read(stamp)
        except BadKeyFile as error:
            if str(error) != self._problem:
                self._problem = str(error)
                logger.error("keys not read, the last good ones stay in force", extra={"reason": self._problem})

    def _read(self, stamp: tuple[int, ...] | None) -> None:
        """`stamp` was taken before: what is written meanwhile is read next time."""
        keys = read_keys(self._path)
        self._by_digest = {key.sha256: key for key in keys}
        self._seen = stamp
        self._problem = ""
        logger.info("keys read", extra={"keys": len(keys)})


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Differs when the file was replaced or written; None without a file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

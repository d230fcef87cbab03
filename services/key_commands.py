"""`millrace keys ...`: create, list, revoke, on the file that gateways read (gateway/keys.py).

A change holds a lock on the file's directory and replaces the file in one rename: gateways see the keys of before or
those of after, and two changes at once are made one after the other.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import msgspec

from gateway.keys import MAX_KEYS, BadKeyFile, Key, KeyFile, digest_of, read_keys
from services.settings import Settings, SettingsError
from wire.errors import BadRequest, Conflict, NotFound

SECRET_BYTES: Final = 32
_UNITS_S: Final = {"m": 60, "h": 3600, "d": 86_400}
_DURATION: Final = re.compile(r"([1-9][0-9]{0,3})([mhd])", re.ASCII)


def create(settings: Settings, tenant: str, *, weight: int, expires: str | None, note: str, as_json: bool) -> int:
    """Add a key and print its secret, alone on standard output so that a script can take it.

    Raises SettingsError, BadRequest, or Conflict if the file is full.
    """
    now = datetime.now(UTC).replace(microsecond=0)
    secret = f"mr-{secrets.token_urlsafe(SECRET_BYTES)}"
    key = _checked(
        Key(
            id=f"key-{secrets.token_hex(6)}",
            sha256=digest_of(secret.encode()),
            tenant=tenant,
            weight=weight,
            created=now,
            expires=None if expires is None else now + _duration(expires),
            note=note,
        )
    )
    path = _path(settings)
    with _changing(path) as keys:
        if len(keys) >= MAX_KEYS:
            keys[:] = [each for each in keys if each.state(now) == "active"]
        if len(keys) >= MAX_KEYS:
            raise Conflict(f"{path} holds {MAX_KEYS:,} active keys, the most it may; revoke one first")
        keys.append(key)
    if as_json:
        print(json.dumps({**_row(key, now), "secret": secret}))
        return 0
    print(f"{key.id} for {tenant}, in {path}; this is its secret, shown only now:", file=sys.stderr)
    print(secret)
    return 0


def show_list(settings: Settings, *, as_json: bool) -> int:
    """One line for each key. Raises SettingsError."""
    now = datetime.now(UTC)
    path = _path(settings)
    rows = [_row(key, now) for key in _read(path)]
    if as_json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        end = f"until {row['expires']}" if row["expires"] else ""
        line = f"{row['id']:<18} {row['tenant']:<20} weight {row['weight']:<3} {row['state']:<8}"
        print(f"{line} from {row['created']} {end:<26} {row['note']}".rstrip())
    if not rows:
        print(f"{path} holds no keys", file=sys.stderr)
    return 0


def revoke(settings: Settings, key_id: str, *, as_json: bool) -> int:
    """Let a key in no more; one that was revoked before stays so. Raises SettingsError, NotFound."""
    now = datetime.now(UTC).replace(microsecond=0)
    path = _path(settings)
    with _changing(path) as keys:
        position = next((i for i, key in enumerate(keys) if key.id == key_id), None)
        if position is None:
            raise NotFound(f"{path} holds no key {key_id[:80]!r}")
        key = keys[position]
        if key.revoked is None:
            keys[position] = key = msgspec.structs.replace(key, revoked=now)
    print(json.dumps(_row(key, now)) if as_json else f"revoked {key.id} of {key.tenant}")
    return 0


def _path(settings: Settings) -> Path:
    """The file itself: a rename onto a link would replace the link."""
    if not settings.keys_file:
        raise SettingsError("keys_file names no file; set MILLRACE_KEYS_FILE, or give --keys-file")
    return Path(os.path.realpath(Path(settings.keys_file).expanduser()))


def _read(path: Path) -> Sequence[Key]:
    try:
        return read_keys(path)
    except BadKeyFile as error:
        raise SettingsError(f"keys_file: {error}") from None


@contextmanager
def _changing(path: Path) -> Iterator[list[Key]]:
    """The keys, to be changed in place and written at the end, unless that is an error. No file yet is no keys."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            keys = list(_read(path)) if path.exists() else []
            yield keys
            _write(path, KeyFile(version=1, keys=keys))
            os.fsync(directory)
        finally:
            os.close(directory)  # closing lets the lock go
    except OSError as error:
        raise SettingsError(f"keys_file: cannot write {path}: {error.strerror}") from None


def _write(path: Path, file: KeyFile) -> None:
    handle, fresh = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # with mode 0600
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n")
            out.flush()
            os.fsync(handle)
        os.replace(fresh, path)
    except BaseException:
        os.unlink(fresh)
        raise


def _checked(key: Key) -> Key:
    """`key`, if a gateway would read it. Raises BadRequest."""
    try:
        return msgspec.convert(msgspec.to_builtins(key), Key)
    except msgspec.ValidationError as error:
        words = {
            "$.tenant": f"--tenant is {key.tenant[:80]!r}; expected 1 to 64 of A-Z a-z 0-9 . _ -",
            "$.weight": f"--weight is {key.weight}; expected a whole number from 1 to 64",
            "$.note": f"--note has {len(key.note):,} characters; expected one line of at most 200",
        }
        raise BadRequest(next(text for field, text in words.items() if field in str(error))) from None


def _duration(text: str) -> timedelta:
    match = _DURATION.fullmatch(text)
    if match is None:
        raise BadRequest(f"--expires is {text[:80]!r}; expected minutes, hours or days: 30m, 12h, 90d")
    return timedelta(seconds=int(match[1]) * _UNITS_S[match[2]])


def _row(key: Key, now: datetime) -> dict[str, str | int | None]:
    """A key as it is shown: all but its digest."""

    def text(moment: datetime | None) -> str | None:
        return None if moment is None else f"{moment:%Y-%m-%dT%H:%MZ}"

    return {
        "id": key.id,
        "tenant": key.tenant,
        "weight": key.weight,
        "state": key.state(now),
        "created": text(key.created),
        "expires": text(key.expires),
        "revoked": text(key.revoked),
        "note": key.note,
    }

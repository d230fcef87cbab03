"""Bytes from a client to a JSON object, strictly.

Apart from the schemas because it is about JSON itself. Python's parser accepts more than JSON and keeps the last of
two equal keys; a proxy in front of us may keep the first. So: UTF-8 only, no key twice, no half characters, no
object with hundreds of members, and nesting that overflows the parser is an error like any other. One pass of the C
scanner. NaN and Infinity get through to the schemas, which refuse them by the field's name.
"""

from __future__ import annotations

import json
from typing import Final

from wire.errors import BadRequest

MAX_MEMBERS: Final = 64  # of one object; our largest has a third of that


def decode_object(raw: bytes | str, what: str = "the body") -> dict[str, object]:
    """The object in `raw`. Raises BadRequest."""
    try:
        text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
        value: object = _decoder.decode(text)
        if "\\ud" in text or "\\uD" in text:
            _refuse_lone_surrogates(value, what)
    except UnicodeDecodeError as error:
        raise BadRequest(f"{what} is not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise BadRequest(f"{what} is not JSON: {error.msg} at character {error.pos}") from error
    except RecursionError:
        raise BadRequest(f"{what} is nested too deeply") from None
    except ValueError as error:  # Python refuses integers of more than 4,300 digits
        raise BadRequest(f"{what} is not usable JSON: a number has too many digits") from error
    if not isinstance(value, dict):
        raise BadRequest(f"{what} must be a JSON object")
    return value


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(pairs) > MAX_MEMBERS:
        raise BadRequest(f"an object has {len(pairs):,} members; at most {MAX_MEMBERS} are accepted")
    members = dict(pairs)
    if len(members) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadRequest(f"the key {twice[:64]!r} is given twice", param=twice[:64])
    return members


def _refuse_lone_surrogates(value: object, what: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRequest(f"{what} has half of a surrogate pair (\\u escapes must make whole characters)") from error


_decoder = json.JSONDecoder(object_pairs_hook=_object)

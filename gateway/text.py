"""A model's tokenizer: text to ids and back.

Wraps the `tokenizers` library so that the rest of the gateway sees ids and text only. Never changed after loading
(no padding, no truncation), so any number of threads may use it at once. The library has two ways to encode:
`encode` keeps other threads waiting but is done in some 20 us for a short text; `encode_batch_fast` lets them run
but hands the text to a pool of its own, which on busy cores takes milliseconds. So the length decides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

import tokenizers

from gateway.detokenize import (
    ByteLevelDetokenizer,
    Detokenizer,
    TokenBytes,
    WindowDetokenizer,
    is_byte_level,
    special_ids,
)

SHORT_CHARS: Final = 4_096  # half a millisecond


class Tokenizer:
    """Encode, decode, and new detokenizers."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        inner.no_padding()
        inner.no_truncation()
        self._inner = inner
        self._special = special_ids(inner)
        names = [token.content for token in inner.get_added_tokens_decoder().values() if token.special]
        self._special_names = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._table = TokenBytes(inner) if is_byte_level(inner) else None
        self._bytes_per_token = self._table.max_bytes if self._table and _keeps_every_byte(inner) else None

    @classmethod
    def from_file(cls, path: Path) -> Tokenizer:
        """Read a tokenizer.json. Raises ValueError with the reason."""
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer: {error}") from error

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of `text`. `add_special_tokens`: whatever the tokenizer puts around a text, such as a BOS token."""
        if len(text) <= SHORT_CHARS:
            encoding = self._inner.encode(text, add_special_tokens=add_special_tokens)
        else:
            encoding = self._inner.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        ids: list[int] = encoding.ids
        return ids

    def spells_special_token(self, text: str) -> bool:
        """True if `encode` would find a special token (the end of a turn, say) in `text`."""
        return self._special_names.search(text) is not None

    def encode_as_text(self, text: str) -> list[int]:
        """The ids of `text` with no special token among them, even where it spells one: those are cut in two."""
        cuts = [0, *(match.start() + 1 for match in self._special_names.finditer(text)), len(text)]
        pieces = [text[start:end] for start, end in pairwise(cuts)]
        encodings = self._inner.encode_batch_fast(pieces, add_special_tokens=False)
        return [token_id for encoding in encodings for token_id in encoding.ids]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of `token_ids`; bytes that are no character become U+FFFD."""
        text: str = self._inner.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self) -> Detokenizer:
        """A fresh detokenizer for one completion."""
        if self._table is not None:
            return ByteLevelDetokenizer(self._table)
        return WindowDetokenizer(self._inner, self._special)

    def min_tokens(self, text: str) -> int:
        """A number of tokens that `text` has at least, without encoding it: refuses a huge text for next to nothing."""
        if self._bytes_per_token is None:
            return 0
        return -(-len(text.encode("utf-8")) // self._bytes_per_token)


def _keeps_every_byte(inner: tokenizers.Tokenizer) -> bool:
    """True if every byte of a text ends up in some token: nothing is normalised away or swallowed by an added token."""
    added = inner.get_added_tokens_decoder().values()
    return inner.normalizer is None and not any(token.lstrip or token.rstrip for token in added)

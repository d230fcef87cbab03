"""A model's tokenizer: text to ids and back.

Wraps the `tokenizers` library so that the rest of the gateway sees ids and text only. Never changed after loading (no
padding, no truncation), so any number of threads may use it at once. `encode_batch_fast` is used even for one text:
unlike `encode` it lets other threads run and skips offsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from gateway.detokenize import (
    ByteLevelDetokenizer,
    Detokenizer,
    TokenBytes,
    WindowDetokenizer,
    is_byte_level,
    special_ids,
)


class Tokenizer:
    """Encode, decode, and new detokenizers."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        inner.no_padding()
        inner.no_truncation()
        self._inner = inner
        self._special = special_ids(inner)
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
        ids: list[int] = self._inner.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

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

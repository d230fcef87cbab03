"""Token ids to text, one token at a time.

What a detokenizer promises: the pieces it returns, then `flush()`, joined, are the text of all the ids together; a
piece never ends inside a character; and the piece of a token depends on the ids up to that token only, never on how
they were grouped into events. The last point is what lets a stream be resumed at any token.

Two ways. A byte-level vocabulary (GPT-2, Llama 3, Qwen, millpond) is a table from token to bytes, so a piece costs
a table look-up and, at most, an incremental UTF-8 decode. Any other vocabulary is decoded through a short window of
tokens, as in text-generation-inference and vLLM (detokenize_incrementally): decode the window with and without the
new token and send the difference.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Final, Protocol

import tokenizers
from tokenizers import decoders

REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
MAX_PENDING_TOKENS: Final = 8  # a character is at most 4 bytes: a longer wait is not for a character


class Detokenizer(Protocol):
    """The text of one completion, in the making."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        ...

    def flush(self) -> str:
        """What is left at the end: the unfinished character, as U+FFFD."""
        ...


class TokenBytes:
    """A byte-level vocabulary as bytes. Special tokens have none; an id the vocabulary lacks has none either."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        special = special_ids(tokenizer)
        byte_of = byte_level_alphabet()
        self.bytes: list[bytes] = []
        for token_id in range(highest_id(tokenizer) + 1):
            token = None if token_id in special else tokenizer.id_to_token(token_id)
            self.bytes.append(b"" if token is None else _token_bytes(token, byte_of))
        # What can be sent as it is when no character is pending; None where a token is part of a character.
        self.texts: list[str | None] = [_whole_text(raw) for raw in self.bytes]
        self.max_bytes = max(1, *map(len, self.bytes))


def _token_bytes(token: str, byte_of: dict[str, int]) -> bytes:
    # As the ByteLevel decoder does it: one character outside its alphabet, and the token stands for itself.
    try:
        return bytes([byte_of[char] for char in token])
    except KeyError:
        return token.encode("utf-8")


def _whole_text(raw: bytes) -> str | None:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


def byte_level_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2, encoder.py: bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def special_ids(tokenizer: tokenizers.Tokenizer) -> frozenset[int]:
    """Ids that never appear in an answer's text."""
    return frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)


def highest_id(tokenizer: tokenizers.Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def is_byte_level(tokenizer: tokenizers.Tokenizer) -> bool:
    return isinstance(tokenizer.decoder, decoders.ByteLevel)


class ByteLevelDetokenizer:
    """Bytes from a table, characters from an incremental UTF-8 decoder."""

    __slots__ = ("_bytes", "_decode", "_decoder", "_pending", "_texts")

    def __init__(self, table: TokenBytes) -> None:
        self._texts = table.texts
        self._bytes = table.bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._decode = self._decoder.decode
        self._pending = False

    def push(self, token_id: int) -> str:
        if token_id >= len(self._texts):
            return ""
        if not self._pending:
            text = self._texts[token_id]
            if text is not None:
                return text
        text = self._decode(self._bytes[token_id])
        self._pending = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        return self._decode(b"", True)


class WindowDetokenizer:
    """The difference between decoding a window of ids with and without the newest."""

    __slots__ = ("_ids", "_read", "_special", "_tokenizer")

    def __init__(self, tokenizer: tokenizers.Tokenizer, special: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._special = special
        # [0, read)  already sent: context, because a decoder may join what follows to it
        # [read, end) not sent yet
        self._ids: list[int] = []
        self._read = 0

    def push(self, token_id: int) -> str:
        if token_id in self._special:
            return ""
        self._ids.append(token_id)
        sent, text = self._decode(self._ids[: self._read]), self._decode(self._ids)
        is_unfinished = len(text) <= len(sent) or text.endswith(REPLACEMENT)
        if is_unfinished and len(self._ids) - self._read < MAX_PENDING_TOKENS:
            return ""
        del self._ids[: self._read]
        self._read = len(self._ids)
        return text[len(sent) :]

    def flush(self) -> str:
        text = self._decode(self._ids)[len(self._decode(self._ids[: self._read])) :]
        self._read = len(self._ids)
        return text

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

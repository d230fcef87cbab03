"""Text comes out whole, whatever the tokens and however they arrive."""

from __future__ import annotations

import json
from functools import cache

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from gateway.detokenize import REPLACEMENT, byte_level_alphabet
from gateway.text import Tokenizer
from tests.gateway.support import MILLPOND, TOKENIZER, VOCABULARY, without_deadline

any_ids = st.lists(st.integers(0, 2_060), max_size=60)  # past the vocabulary's 2,048 too
# Tokens of single bytes: most of their sequences are broken UTF-8.
BYTES = [VOCABULARY[char] for char in byte_level_alphabet()]
byte_ids = st.lists(st.sampled_from(BYTES), max_size=40)


def pieces_of(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer()
    return [*map(detokenizer.push, token_ids), detokenizer.flush()]


@without_deadline
@given(any_ids)
def test_pieces_joined_are_the_whole_decode(token_ids: list[int]) -> None:
    assert "".join(pieces_of(TOKENIZER, token_ids)) == TOKENIZER.decode(token_ids, skip_special_tokens=True)


@without_deadline
@given(byte_ids)
def test_broken_utf8_is_replaced_as_in_the_whole_decode(token_ids: list[int]) -> None:
    assert "".join(pieces_of(TOKENIZER, token_ids)) == TOKENIZER.decode(token_ids, skip_special_tokens=True)


@without_deadline
@given(st.text(max_size=40).filter(lambda text: "<|" not in text))
def test_valid_text_never_shows_a_replacement_character_on_the_way(text: str) -> None:
    pieces = pieces_of(TOKENIZER, TOKENIZER.encode(text, add_special_tokens=False))
    assert "".join(pieces) == text
    assert REPLACEMENT in text or not any(REPLACEMENT in piece for piece in pieces)


def test_a_character_of_four_bytes_waits_for_its_last_token() -> None:
    token_ids = TOKENIZER.encode("🦆", add_special_tokens=False)
    pieces = pieces_of(TOKENIZER, token_ids)
    assert len(token_ids) > 1
    assert pieces[:-2] == [""] * (len(token_ids) - 1)
    assert pieces[-2:] == ["🦆", ""]


def test_an_unfinished_character_is_flushed_as_a_replacement() -> None:
    token_ids = TOKENIZER.encode("a🦆", add_special_tokens=False)[:-1]
    assert "".join(pieces_of(TOKENIZER, token_ids)) == "a" + REPLACEMENT


def test_special_tokens_have_no_text() -> None:
    assert pieces_of(TOKENIZER, [0, 1, 5]) == ["", "", "", ""]


@cache
def sentencepiece_like() -> tokenizers.Tokenizer:
    """A vocabulary with word marks and byte fallback, decoded as Llama 2 and Gemma do."""
    inner = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", *[f"<0x{byte:02X}>" for byte in range(256)]],
        show_progress=False,
    )
    inner.train_from_iterator(["the duck and the pond and the river", "a happy duck swims in the pond"], trainer)
    # The byte tokens must not be special, or decoding would skip them.
    document = json.loads(inner.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["id"] < 2]
    return tokenizers.Tokenizer.from_str(json.dumps(document))


@without_deadline
@given(st.text(alphabet=st.sampled_from("abc thedukpon🦆üß日\n"), max_size=30))
def test_a_sentencepiece_vocabulary_streams_the_whole_decode(text: str) -> None:
    tokenizer = Tokenizer(sentencepiece_like())
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = pieces_of(tokenizer, token_ids)
    assert "".join(pieces) == tokenizer.decode(token_ids, skip_special_tokens=True)
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_a_long_run_of_broken_bytes_does_not_hold_the_text_back_for_ever() -> None:
    broken = sentencepiece_like().get_vocab()["<0xF0>"]
    pieces = pieces_of(Tokenizer(sentencepiece_like()), [broken] * 40)
    assert any(pieces[:12])


def test_a_file_that_is_no_tokenizer_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="is not a tokenizer"):
        Tokenizer.from_file(MILLPOND / "tokenizer_config.json")


@without_deadline
@given(st.text(max_size=200))
def test_the_lower_bound_on_tokens_is_one(text: str) -> None:
    assert TOKENIZER.min_tokens(text) <= len(TOKENIZER.encode(text, add_special_tokens=False))

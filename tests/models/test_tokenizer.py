"""Millpond's tokenizer and chat template: exact round trips, digits one by one, and no special functions needed."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateRuntimeError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from models.training.data import Encoder
from models.training.example import Message
from models.training.tokenizer import SPECIAL, VOCABULARY, tokenizer_config

MILLPOND = Path(__file__).parents[2] / "models" / "millpond"
TOKENIZER = Tokenizer.from_file(str(MILLPOND / "tokenizer.json"))


def raise_exception(message: str) -> None:
    raise TemplateRuntimeError(message)


def render(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    config = json.loads((MILLPOND / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = ImmutableSandboxedEnvironment().from_string(config["chat_template"])
    return template.render(
        messages=messages,
        add_generation_prompt=add_generation_prompt,
        bos_token="<|bos|>",
        raise_exception=raise_exception,
    )


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_survives_encoding_and_decoding(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


@given(st.integers(min_value=0, max_value=10**12), st.sampled_from(["{}", "What is {}?", "a, {}, b", "({})"]))
def test_every_digit_is_a_token_of_its_own_wherever_the_number_stands(number: int, sentence: str) -> None:
    tokens = TOKENIZER.encode(sentence.format(number)).tokens
    assert [token for token in tokens if any(character.isdigit() for character in token)] == list(str(number))


def test_special_tokens_have_the_ids_the_configuration_names() -> None:
    config = json.loads((MILLPOND / "config.json").read_text(encoding="utf-8"))
    generation = json.loads((MILLPOND / "generation_config.json").read_text(encoding="utf-8"))
    assert [TOKENIZER.token_to_id(token) for token in SPECIAL] == list(range(len(SPECIAL)))
    for name, token in (("bos_token_id", "<|bos|>"), ("eos_token_id", "<|end|>"), ("pad_token_id", "<|pad|>")):
        assert config[name] == generation[name] == TOKENIZER.token_to_id(token)


def test_vocabulary_size_is_that_of_the_model() -> None:
    config = json.loads((MILLPOND / "config.json").read_text(encoding="utf-8"))
    assert TOKENIZER.get_vocab_size() == VOCABULARY == config["vocab_size"]


def test_encoding_adds_no_token_that_the_template_already_writes() -> None:
    assert TOKENIZER.encode("").ids == []
    assert TOKENIZER.encode("<|bos|>").ids == [TOKENIZER.token_to_id("<|bos|>")]


def test_chat_template_renders_as_the_model_card_shows() -> None:
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "What is 12 + 30?"},
        {"role": "assistant", "content": "42"},
        {"role": "user", "content": "Thanks!"},
    ]
    shown = (
        "<|bos|><|system|>Answer briefly.<|end|><|user|>What is 12 + 30?<|end|><|assistant|>42<|end|>"
        "<|user|>Thanks!<|end|><|assistant|>"
    )
    assert render(messages) == shown
    assert shown in (MILLPOND / "README.md").read_text(encoding="utf-8")
    assert render(messages, add_generation_prompt=False) == shown.removesuffix("<|assistant|>")


def test_chat_template_refuses_an_unknown_role() -> None:
    with pytest.raises(TemplateRuntimeError, match="unknown role: tool"):
        render([{"role": "tool", "content": "x"}])


def test_training_writes_the_tokens_that_the_template_renders() -> None:
    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in TOKENIZER.encode_batch(texts)]

    def token_id(token: str) -> int:
        return int(TOKENIZER.token_to_id(token) or 0)

    chat = (Message("system", "Be kind."), Message("user", "Sort: 31, 4, 15"), Message("assistant", "4, 15, 31"))
    ids, counted = Encoder(encode, token_id)(chat)
    rendered = render([{"role": m.role, "content": m.content} for m in chat], add_generation_prompt=False)
    assert ids == TOKENIZER.encode(rendered).ids
    assert (
        TOKENIZER.decode([i for i, c in zip(ids, counted, strict=True) if c], skip_special_tokens=False)
        == "4, 15, 31<|end|>"
    )


def test_stored_tokenizer_configuration_is_what_the_code_writes() -> None:
    assert json.loads((MILLPOND / "tokenizer_config.json").read_text(encoding="utf-8")) == tokenizer_config()

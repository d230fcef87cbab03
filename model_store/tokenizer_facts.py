"""What a server must know of a checkpoint's tokenizer: end tokens, special tokens, chat template.

Only tokenizer.json is a tokenizer to us (no Python tokenizers, no sentencepiece models). Its vocabulary is compared
with the model's, because an id outside the embedding table would fail a whole step at run time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from model_store.config import Config, read_json, shown
from model_store.errors import BadCheckpoint
from model_store.source_files import find_file, need_file

TOKENIZER_FILE = "tokenizer.json"
MAX_TOKENIZER_BYTES = 128 << 20
MAX_TEMPLATE_CHARS = 1 << 18
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
SIDE_FILES = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """See ModelManifest for the meaning of each."""

    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    chat_template: str | None
    special_tokens: dict[str, str]


def tokenizer_files(directory: Path) -> dict[str, Path]:
    """Every file that read_tokenizer_facts reads, by name. Raises BadCheckpoint if there is no tokenizer.json."""
    side = {name: path for name in SIDE_FILES if (path := find_file(directory, name)) is not None}
    return {TOKENIZER_FILE: need_file(directory, TOKENIZER_FILE), **side}


def read_tokenizer_facts(directory: Path, config: Config, vocab_size: int) -> TokenizerFacts:
    """Read what is beside the weights. Raises BadCheckpoint."""
    side = tokenizer_files(directory)
    ids = _token_ids(read_json(side[TOKENIZER_FILE], MAX_TOKENIZER_BYTES))
    worst = max(ids, key=lambda token: ids[token], default="")
    if ids and ids[worst] >= vocab_size:
        raise BadCheckpoint(
            f"{TOKENIZER_FILE}: token {shown(worst)} has id {ids[worst]:,}; the model has {vocab_size:,} rows",
            param="vocab_size",
        )
    settings = read_json(side["tokenizer_config.json"], MAX_TOKENIZER_BYTES) if "tokenizer_config.json" in side else {}
    tokens_map = read_json(side["special_tokens_map.json"]) if "special_tokens_map.json" in side else {}
    special = _special_tokens(tokens_map) | _special_tokens(settings)
    generation = config
    if "generation_config.json" in side:
        generation = Config(read_json(side["generation_config.json"]), "generation_config.json")
    bos = _ids(generation, config, "bos_token_id", vocab_size)
    eos = _ids(generation, config, "eos_token_id", vocab_size)
    # Chat models often end a turn with a token that only the tokenizer names.
    for named, token in ((bos, special.get("bos_token")), (eos, special.get("eos_token"))):
        if token in ids:
            named.append(ids[token])
    return TokenizerFacts(
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=tuple(dict.fromkeys(eos)),
        chat_template=_chat_template(settings, side.get("chat_template.jinja")),
        special_tokens=special,
    )


def _ids(generation: Config, config: Config, key: str, vocab_size: int) -> list[int]:
    return generation.integers(key, 0, vocab_size - 1) or config.integers(key, 0, vocab_size - 1) or []


def _token_ids(tokenizer: dict[str, object]) -> dict[str, int]:
    """Token -> id of the model's vocabulary and the added tokens. Raises BadCheckpoint if this is no tokenizer.json."""
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens") or []
    if not isinstance(model, dict) or not isinstance(added, list):
        raise BadCheckpoint(f"{TOKENIZER_FILE} has no model; it is not a fast tokenizer's file", param=TOKENIZER_FILE)
    ids: dict[str, int] = {}
    for token, number in [*_vocabulary(model), *_added(added)]:
        if not isinstance(token, str) or isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise BadCheckpoint(f"{TOKENIZER_FILE}: token {shown(token)} has id {shown(number)}", param=TOKENIZER_FILE)
        ids[token] = number
    return ids


def _vocabulary(model: dict[str, object]) -> Iterator[tuple[object, object]]:
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):  # BPE, WordPiece, WordLevel
        yield from vocabulary.items()
    elif isinstance(vocabulary, list):  # Unigram: [piece, score] in the order of ids
        for number, item in enumerate(vocabulary):
            yield (item[0] if isinstance(item, list) and item else item), number
    else:
        raise BadCheckpoint(f"{TOKENIZER_FILE}: model.vocab is {shown(vocabulary)}", param=TOKENIZER_FILE)


def _added(added: list[object]) -> Iterator[tuple[object, object]]:
    for item in added:
        yield (item.get("content"), item.get("id")) if isinstance(item, dict) else (item, None)


def _special_tokens(settings: dict[str, object]) -> dict[str, str]:
    """bos_token ... -> text; a token is a string or an object with its text under `content`."""
    special = {}
    for name in SPECIAL_TOKENS:
        token = settings.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            special[name] = text
    return special


def _chat_template(settings: dict[str, object], file: Path | None) -> str | None:
    """The Jinja text: the file if there is one, else tokenizer_config.json's (of several the one named default)."""
    if file is not None:
        if file.stat().st_size > 4 * MAX_TEMPLATE_CHARS:
            raise BadCheckpoint(f"{file.name} has {file.stat().st_size:,} bytes", param=file.name)
        template: object = file.read_text("utf-8", errors="strict")
    else:
        template = settings.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    if template is None:
        return None
    if not isinstance(template, str) or len(template) > MAX_TEMPLATE_CHARS:
        raise BadCheckpoint(
            f"chat_template is {shown(template)}; expected text of at most {MAX_TEMPLATE_CHARS:,} characters",
            param="chat_template",
        )
    return template

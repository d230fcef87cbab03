"""Golden items, and the questions that a run asks about them.

An item is a conversation with one right answer. It is asked three times: whole, where the answer must be the expected
text; as one step of teacher forcing, where the model is given the beginning of the right answer and must say its next
token; and all of the right answer is given, to hear how likely the model finds it. The last two do not depend on what
the model said before, so one early slip counts once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Final, Literal
from zlib import crc32

import msgspec
from msgspec import Meta

from gateway.models import ServedModel
from services.settings import SettingsError

MAX_FILE_BYTES: Final = 16 << 20
MAX_ITEMS: Final = 10_000

Id = Annotated[str, Meta(min_length=1, max_length=100)]


class Turn(msgspec.Struct, frozen=True):
    role: Literal["system", "user", "assistant"]
    content: str


class Item(msgspec.Struct, frozen=True):
    """One line of a golden file. Fields that are not known here are for other readers."""

    id: Id
    messages: Annotated[list[Turn], Meta(min_length=1, max_length=1000)]
    answer: Annotated[str, Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=1, le=4096)]


def read_golden(path: Path, most: int = 0) -> list[Item]:
    """The items of a JSONL file, or `most` of them, evenly spread and always the same. Raises SettingsError."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            raise ValueError(f"more than {MAX_FILE_BYTES:,} bytes")
        lines = [line for line in raw.splitlines() if line.strip()]
        if not 0 < len(lines) <= MAX_ITEMS:
            raise ValueError(f"{len(lines):,} lines; expected 1 to {MAX_ITEMS:,}")
        decoder = msgspec.json.Decoder(Item)
        items = [decoder.decode(line) for line in lines]
    except (OSError, ValueError) as error:
        raise SettingsError(f"cannot read golden items from {path}: {error}") from None
    if len({item.id for item in items}) < len(items):
        raise SettingsError(f"cannot read golden items from {path}: two of them have the same id")
    if 0 < most < len(items):
        items = [items[index * len(items) // most] for index in range(most)]
    return items


def digest_of(items: Sequence[Item]) -> str:
    """Equal for the same items in the same order: what a baseline was recorded on."""
    return sha256(msgspec.json.encode(items)).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Question:
    """What is sent, and what must come back: the text, or (for one step) the token; None = the end of the answer."""

    item: str
    kind: Literal["whole", "step", "likelihood"]
    prompt_ids: list[int]
    max_tokens: int
    text: str = ""
    token: int | None = None
    forced_ids: Sequence[int] = ()  # of a likelihood: the right answer


def questions(items: Sequence[Item], model: ServedModel) -> list[Question]:
    """All that a run asks. Raises SettingsError if the model has no chat template or an item does not fit."""
    if model.chat is None:
        raise SettingsError(f"model {model.model_id} has no chat template: golden items are conversations")
    asked: list[Question] = []
    for item in items:
        text = model.chat.render([{"role": turn.role, "content": turn.content} for turn in item.messages])
        prompt = model.tokenizer.encode(text, add_special_tokens=False)
        answer = model.tokenizer.encode_as_text(item.answer)
        most = len(prompt) + max(item.max_tokens, len(answer) + 1)
        if most > model.max_model_len:
            limit = f"model {model.model_id} accepts {model.max_model_len:,}"
            raise SettingsError(f"golden item {item.id} takes {most:,} tokens; {limit}")
        given = crc32(item.id.encode()) % (len(answer) + 1)  # spread over all positions, the end among them
        token = answer[given] if given < len(answer) else None
        asked.append(Question(item.id, "whole", prompt, item.max_tokens, text=item.answer.strip()))
        asked.append(Question(item.id, "step", prompt + answer[:given], 1, token=token))
        asked.append(Question(item.id, "likelihood", prompt, len(answer), forced_ids=answer))
    return asked


def is_right(question: Question, token_ids: Sequence[int], model: ServedModel) -> bool:
    """Whether this completion, of a whole answer or of a step, is what was expected.

    An end token is not sent: no token says that the answer is over.
    """
    if question.kind == "step":
        return list(token_ids) == ([] if question.token is None else [question.token])
    return model.tokenizer.decode(token_ids, skip_special_tokens=True).strip() == question.text

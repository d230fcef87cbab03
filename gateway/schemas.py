"""What clients may send, as pydantic models, and the words for what they got wrong.

Strict: a string is not a number, a boolean is not an integer, an unknown field is an error that names it, and so is
a known one that this server does not support yet, unless it says what would happen anyway. Bounds here are those of
the wire; an operator's own limits are checked in admission.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Final, TypeVar

import annotated_types
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic.json_schema import WithJsonSchema

from wire.errors import BadRequest

MAX_VALUE_CHARS: Final = 40
MAX_NAMES: Final = 8

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], FailFast()]
ModelName = Annotated[str, Field(min_length=1, max_length=256)]
StopStrings = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    FailFast(),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "items": {"type": "string", "minLength": 1}}]}
    ),
]

# Fields of the API that are not built yet, with the values that ask for nothing.
UNSUPPORTED: Final[Mapping[str, tuple[object, ...]]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class ChatMessage(_Strict):
    """One turn. Which roles exist is the chat template's business; a role can never look like a template's own text."""

    role: str = Field(min_length=1, max_length=32, pattern="^[A-Za-z0-9_-]*$")
    content: str


class PromptBody(_Strict):
    """Exactly one of prompt, messages and input_ids; which one, model_fields_set knows."""

    model: ModelName | None = Field(None, description="Name or name@revision; may be left out if only one is served.")
    prompt: str = Field("", description="Text to continue.")
    messages: Annotated[list[ChatMessage], FailFast()] = Field(
        default_factory=list, min_length=1, description="A conversation, rendered by the model's chat template."
    )
    input_ids: TokenIds = Field(default_factory=list, min_length=1, description="Token ids to continue.")


class GenerateBody(PromptBody):
    """POST /generate."""

    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="Default 256, or what fits.")
    temperature: float = Field(0.0, ge=0.0, le=100.0, description="0 is greedy.")
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=0, lt=2**31, description="0 is no limit.")
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    stop: StopStrings = Field(default_factory=list, description="The text ends before the first of these.")
    stop_token_ids: TokenIds = Field(
        default_factory=list, description="End the completion, besides the model's own end tokens."
    )
    seed: int | None = Field(None, ge=0, lt=2**63, description="Drawn, and reported, when left out.")
    min_tokens: int = Field(0, ge=0, lt=2**31, description="Nothing ends the completion before this many tokens.")
    ignore_eos: bool = Field(False, description="The model's own end tokens do not end the completion.")
    priority: int = Field(0, ge=-1, le=1, description="1 is first.")
    deadline_ms: int | None = Field(None, ge=1, le=86_400_000, description="From now.")
    stream: bool = Field(False, description="Server-sent events instead of one answer.")
    background: bool = Field(
        False,
        description="Runs on when nobody reads. Without `stream`: 202 at once, and GET /requests/{id} has the answer.",
    )


class TokenizeBody(PromptBody):
    """POST /tokenize: the ids that POST /generate would use."""


class DetokenizeBody(_Strict):
    """POST /detokenize: the text of ids, special tokens included."""

    model: ModelName | None = None
    token_ids: TokenIds


class CancelFrame(_Strict):
    """A WebSocket frame of type "cancel"."""

    id: str = Field(min_length=1, max_length=128)


class ResumeFrame(_Strict):
    """A WebSocket frame of type "resume"; `id` is the `stream` that "accepted" named."""

    id: str = Field(min_length=1, max_length=128)
    from_: int = Field(0, ge=0, lt=2**31, alias="from")


Body = TypeVar("Body", bound=BaseModel)


def parse(schema: type[Body], members: Mapping[str, object]) -> Body:
    """The client's object as `schema`; null means left out. Raises BadRequest naming field, value and limit."""
    given = {name: value for name, value in members.items() if value is not None}
    known = _known[schema]
    strange = [name for name in given if name not in known]
    if strange:
        given = _without_unsupported(schema, given, strange)
    stop = given.get("stop")
    if isinstance(stop, str):
        given["stop"] = [stop]
    try:
        return schema.model_validate(given)
    except ValidationError as error:
        raise _bad_request(schema, error) from error


def _without_unsupported(schema: type[Body], given: dict[str, object], strange: list[str]) -> dict[str, object]:
    unknown = [name for name in strange if schema is not GenerateBody or name not in UNSUPPORTED]
    if unknown:
        names = ", ".join(repr(name[:MAX_VALUE_CHARS]) for name in unknown[:MAX_NAMES])
        raise BadRequest(f"unknown field{'s' if len(unknown) > 1 else ''}: {names}", param=unknown[0][:MAX_VALUE_CHARS])
    for name in strange:
        neutral = UNSUPPORTED[name]
        if not any(type(value) is type(given[name]) and value == given[name] for value in neutral):
            raise BadRequest(
                f"{name} is not supported yet (only {json.dumps(neutral[0])}, which asks for nothing)", param=name
            )
    return {name: value for name, value in given.items() if name not in UNSUPPORTED}


def _bad_request(schema: type[BaseModel], error: ValidationError) -> BadRequest:
    first = error.errors(include_url=False)[0]
    param = field_path(first["loc"])
    kind, limits, value = first["type"], first.get("ctx", {}), first["input"]
    if kind in _NUMBER_ERRORS and (range_text := _ranges[schema].get(param)):
        return BadRequest(f"{param} is {shown(value)}; it must be {range_text}", param=param)
    message = _MESSAGES.get(kind, "{problem}")
    return BadRequest(f"{param} {message.format(value=shown(value), problem=first['msg'], **limits)}", param=param)


_NUMBER_ERRORS: Final = frozenset(
    ("int_type", "float_type", "finite_number", "greater_than_equal", "greater_than", "less_than_equal", "less_than")
)
_MESSAGES: Final = {
    "missing": "is missing",
    "extra_forbidden": "is an unknown field",
    "greater_than_equal": "is {value}; it must be at least {ge}",
    "less_than": "is {value}; it must be less than {lt}",
    "int_type": "is {value}; it must be an integer",
    "bool_type": "is {value}; it must be true or false",
    "string_type": "is {value}; it must be a string",
    "list_type": "is {value}; it must be an array",
    "model_type": "is {value}; it must be an object",
    "string_pattern_mismatch": "is {value}; it must be a word",
    "string_too_short": "must have at least {min_length} character",
    "string_too_long": "must have at most {max_length} characters",
    "too_short": "must have at least {min_length} item",
}


def _range_text(field: FieldInfo) -> str | None:
    """What a number field takes, in words: "an integer from 1 to 5", "a number above 0 and at most 1"."""
    bounds = {type(limit): limit for limit in field.metadata}
    kind = "a number" if field.annotation is float else "an integer"
    match bounds:
        case {annotated_types.Ge: low, annotated_types.Le: high}:
            return f"{kind} from {low.ge} to {high.le}"
        case {annotated_types.Gt: low, annotated_types.Le: high}:
            return f"{kind} above {low.gt} and at most {high.le}"
        case {annotated_types.Ge: low, annotated_types.Lt: high}:
            return f"{kind} from {low.ge} to {high.lt - 1}"
    return None


def shown(value: object) -> str:
    """A client's value as an error message may quote it: the kind of what is large, the text of what is small."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "an array"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_VALUE_CHARS else text[:MAX_VALUE_CHARS] + "..."


def field_path(location: tuple[int | str, ...]) -> str:
    """`messages[2].content` for ("messages", 2, "content")."""
    path = ""
    for step in location:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path


_known: Final[Mapping[type[BaseModel], frozenset[str]]] = {
    schema: frozenset(field.alias or name for name, field in schema.model_fields.items())
    for schema in (GenerateBody, TokenizeBody, DetokenizeBody, CancelFrame, ResumeFrame)
}
_ranges: Final[Mapping[type[BaseModel], Mapping[str, str]]] = {
    schema: {field.alias or name: text for name, field in schema.model_fields.items() if (text := _range_text(field))}
    for schema in _known
}

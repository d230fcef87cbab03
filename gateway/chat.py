"""A model's chat template: messages to prompt text.

The template comes with the model, so it is treated as text that somebody else wrote: Jinja's immutable sandbox (no
name with an underscore in front, nothing can be changed), a fixed set of names, what pads or repeats strings taken
away, and a bound on time and size that is checked at every piece of output. A template cannot be interrupted inside one
expression, so it is tried on one message when the model is loaded: one that is out of bounds then never serves.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Final, NoReturn

import jinja2
import jinja2.sandbox

from wire.errors import BadRequest

logger = logging.getLogger(__name__)

MAX_RENDERED_CHARS: Final = 1 << 22
MAX_REASON_CHARS: Final = 200


class _Refusal(Exception):
    """raise_exception() in a template: its words are meant for the caller."""


_PADDING: Final = frozenset(("center", "expandtabs", "format", "format_map", "ljust", "rjust", "zfill"))


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**", "%"))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: object, right: object) -> object:
        if operator != "**" and isinstance(left, int | float) and isinstance(right, int | float):
            return left * right if operator == "*" else left % right
        raise jinja2.exceptions.SecurityError(f"operator {operator} is not allowed on these values")

    def is_safe_attribute(self, obj: object, attr: str, value: object) -> bool:
        return not (isinstance(obj, str) and attr in _PADDING) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: object) -> None:
        """No safe str.format: a width makes any size."""


def _environment() -> _Environment:
    # trim_blocks and lstrip_blocks as transformers has them (utils/chat_template_utils.py): templates rely on both.
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = _raise_exception
    environment.filters["tojson"] = _to_json
    for name in _PADDING & environment.filters.keys():
        del environment.filters[name]
    return environment


def _raise_exception(reason: object) -> NoReturn:
    raise _Refusal(str(reason)[:MAX_REASON_CHARS])


def _to_json(value: object, indent: int | None = None) -> str:
    # Jinja's own escapes HTML, which a model was not trained on.
    return json.dumps(value, ensure_ascii=False, indent=indent)


class ChatTemplate:
    """One model's template, compiled. Rendering is thread-safe."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, budget_s: float) -> None:
        """Compile and try it. Raises ValueError if it is no template, or too slow for one short message."""
        self._special_tokens = dict(special_tokens)
        self._budget_s = budget_s
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"not a chat template: {error}") from error
        self._try()

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt for the assistant's next turn. Raises BadRequest(param="messages") in the template's own words."""
        deadline = time.monotonic() + self._budget_s
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(
                messages=list(messages), add_generation_prompt=True, **self._special_tokens
            ):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_RENDERED_CHARS or time.monotonic() > deadline:
                    raise BadRequest(
                        f"messages take more than {MAX_RENDERED_CHARS:,} characters or {self._budget_s} s to render",
                        param="messages",
                    )
        except _Refusal as refusal:
            raise BadRequest(f"messages: {refusal}", param="messages") from refusal
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            logger.warning("chat template failed", extra={"error": type(error).__name__})
            raise BadRequest("the model's chat template cannot render these messages", param="messages") from error
        return "".join(pieces)

    def _try(self) -> None:
        started = time.monotonic()
        try:
            self.render([{"role": "user", "content": "Hello"}])
        except BadRequest as error:
            raise ValueError(f"the chat template refuses a plain user message: {error.message}") from error
        if time.monotonic() - started > self._budget_s:
            raise ValueError(f"the chat template takes more than {self._budget_s} s for one message")

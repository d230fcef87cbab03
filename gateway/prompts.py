"""A client's prompt to token ids, without holding up the event loop.

One of prompt, messages or input_ids. Short texts are tokenized where we are (some 20 us); long ones in a small pool
of threads, so that a megabyte of text neither stops other streams nor takes every core.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from gateway.chat import ChatTemplate
from gateway.limits import GatewayLimits
from gateway.models import ServedModel
from gateway.schemas import ChatMessage, PromptBody
from wire.errors import BadRequest, ContextLengthExceeded

Result = TypeVar("Result")

MARK: Final = "\ue000"  # private use: means nothing to a template


class Prompts:
    """Turns bodies into ids within the limits."""

    def __init__(self, limits: GatewayLimits) -> None:
        self._limits = limits
        self._threads = ThreadPoolExecutor(limits.text_threads, thread_name_prefix="text")

    async def ids(self, body: PromptBody, model: ServedModel) -> list[int]:
        """The prompt's ids, at least one. Raises BadRequest, ContextLengthExceeded for a text that is far too long."""
        given = [name for name in ("prompt", "messages", "input_ids") if name in body.model_fields_set]
        if len(given) != 1:
            what = f"{' and '.join(given)} are both given" if given else "there is no prompt"
            raise BadRequest(
                f"{what}; give exactly one of prompt, messages or input_ids", param=(given or ["prompt"])[-1]
            )
        if body.input_ids:
            check_ids(body.input_ids, "input_ids", model)
            return body.input_ids
        size = len(body.prompt) + sum(len(message.content) for message in body.messages)
        ids = await self.apart(size, lambda: self._encode(body, model))
        if not ids:
            raise BadRequest(f"{given[0]} is empty: a model needs at least one token", param=given[0])
        return ids

    async def apart(self, size: int, work: Callable[[], Result]) -> Result:
        """`work()`, here if it concerns few characters, else in a thread."""
        if size <= self._limits.inline_chars:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _encode(self, body: PromptBody, model: ServedModel) -> list[int]:
        messages = body.messages
        if not messages:
            return self._encode_text(body.prompt, model, add_special_tokens=True)
        if len(messages) > self._limits.max_messages:
            raise BadRequest(
                f"messages has {len(messages):,} items; at most {self._limits.max_messages:,} are accepted",
                param="messages",
            )
        if model.chat is None:
            raise BadRequest(f"model {model.model_id} has no chat template; send prompt or input_ids", param="messages")
        contents = [message.content for message in messages]
        if any(map(model.tokenizer.spells_special_token, contents)):
            self._check_length("".join(contents), model)
            return self._encode_contents_as_text(messages, model, model.chat)
        text = model.chat.render([{"role": message.role, "content": message.content} for message in messages])
        return self._encode_text(text, model, add_special_tokens=False)  # the template writes them out

    def _encode_contents_as_text(
        self, messages: Sequence[ChatMessage], model: ServedModel, chat: ChatTemplate
    ) -> list[int]:
        """What a message says is text: if it spells <|end|>, it must not end a turn and speak for somebody else.

        Rare, so it may cost more: the template is rendered around marks, and each content encoded by itself.
        """
        marked = [{"role": message.role, "content": f"{MARK}{i}{MARK}"} for i, message in enumerate(messages)]
        ids: list[int] = []
        for at, part in enumerate(re.split(f"{MARK}([0-9]+){MARK}", chat.render(marked))):
            if at % 2 == 0:
                ids += self._encode_text(part, model, add_special_tokens=False)
            else:
                ids += model.tokenizer.encode_as_text(messages[int(part)].content)
        return ids

    def _encode_text(self, text: str, model: ServedModel, *, add_special_tokens: bool) -> list[int]:
        self._check_length(text, model)
        return model.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _check_length(self, text: str, model: ServedModel) -> None:
        at_least = model.tokenizer.min_tokens(text)
        if at_least >= model.max_model_len:
            over = at_least + 1 - model.max_model_len
            raise ContextLengthExceeded(
                f"the prompt has at least {at_least:,} tokens; model {model.model_id} accepts {model.max_model_len:,} "
                f"with the completion: at least {over:,} over",
            )


def check_ids(token_ids: list[int], name: str, model: ServedModel) -> None:
    """Raises BadRequest if an id is not in the model's vocabulary."""
    if token_ids and max(token_ids) >= model.vocab_size:
        at = next(i for i, token_id in enumerate(token_ids) if token_id >= model.vocab_size)
        raise BadRequest(
            f"{name}[{at}] is {token_ids[at]}; model {model.model_id} has the ids 0 to {model.vocab_size - 1}",
            param=f"{name}[{at}]",
        )

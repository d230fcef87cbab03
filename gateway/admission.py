"""Who may come in: a validated body becomes a request for the queue, or a typed error that says by how much it is
too big.

Everything that depends on the model or on the operator's limits is decided here, once, so that nothing later has to
doubt a request. What is drawn (the id, the seed) is drawn here too: from then on the completion is a function of
the request.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from gateway.caller import Caller
from gateway.limits import GatewayLimits
from gateway.models import Models, ServedModel
from gateway.prompts import Prompts, check_ids
from gateway.schemas import GenerateBody
from wire.errors import BadRequest, ContextLengthExceeded
from wire.messages import Generate, SamplingParams

SEED_BITS: Final = 53  # a drawn seed is an exact number in every JSON reader


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request for the queue, and what this gateway knows about it."""

    request: Generate
    model: ServedModel
    arrived_at: float  # time.perf_counter()


class Admission:
    """Admits bodies, within the limits, for the models served."""

    def __init__(self, models: Models, prompts: Prompts, limits: GatewayLimits) -> None:
        self._models = models
        self._prompts = prompts
        self._limits = limits

    async def admit(self, body: GenerateBody, caller: Caller, key: str | None = None) -> Admitted:
        """Raises UnknownModel, BadRequest or ContextLengthExceeded.

        `key`: the caller's Idempotency-Key. Nothing is drawn then: id and seed follow from it.
        """
        arrived_at = time.perf_counter()
        model = self._models.resolve(body.model)
        self._check_stops(body, model)
        prompt_ids = await self._prompts.ids(body, model)
        max_tokens = self._max_tokens(body, len(prompt_ids), model)
        if body.min_tokens > max_tokens:
            raise BadRequest(f"min_tokens is {body.min_tokens}; max_tokens is {max_tokens}", param="min_tokens")
        drawn = secrets.token_bytes(24) if key is None else _digest(caller, key)
        request = Generate(
            request_id=f"gen-{drawn[:16].hex()}",  # unguessable: who has it may read and cancel
            model=model.model_id,
            prompt_ids=prompt_ids,
            max_tokens=max_tokens,
            sampling=SamplingParams(
                temperature=body.temperature,
                top_k=body.top_k,
                top_p=body.top_p,
                min_p=body.min_p,
                seed=int.from_bytes(drawn[16:]) >> (64 - SEED_BITS) if body.seed is None else body.seed,
            ),
            stop_token_ids=_stop_token_ids(body, model),
            min_tokens=body.min_tokens,
            tenant=caller.tenant,
            priority=body.priority,
            deadline_ms=body.deadline_ms,
            weight=caller.weight,
            stop=body.stop,
            background=body.background,
        )
        return Admitted(request, model, arrived_at)

    def _check_stops(self, body: GenerateBody, model: ServedModel) -> None:
        limits = self._limits
        if len(body.stop) > limits.max_stop_strings:
            raise BadRequest(
                f"stop has {len(body.stop):,} strings; at most {limits.max_stop_strings} are accepted", param="stop"
            )
        for i, stop in enumerate(body.stop):
            if (size := len(stop.encode("utf-8"))) > limits.max_stop_bytes:
                raise BadRequest(
                    f"stop[{i}] has {size:,} bytes; at most {limits.max_stop_bytes} are accepted", param=f"stop[{i}]"
                )
        if len(body.stop_token_ids) > limits.max_stop_token_ids:
            raise BadRequest(
                f"stop_token_ids has {len(body.stop_token_ids):,} ids; at most {limits.max_stop_token_ids} accepted",
                param="stop_token_ids",
            )
        check_ids(body.stop_token_ids, "stop_token_ids", model)

    def _max_tokens(self, body: GenerateBody, prompt_tokens: int, model: ServedModel) -> int:
        """What was asked for, or the default cut to what fits. Raises ContextLengthExceeded with the tokens over."""
        room = model.max_model_len - prompt_tokens
        wanted = body.max_tokens or max(1, min(self._limits.default_max_tokens, room))
        if wanted > room:
            raise ContextLengthExceeded(
                f"prompt has {prompt_tokens:,} tokens and max_tokens is {wanted:,}; model {model.model_id} accepts "
                f"{model.max_model_len:,} together: {wanted - room:,} over",
                param=None if body.max_tokens is None else "max_tokens",
            )
        return wanted


def _digest(caller: Caller, key: str) -> bytes:
    """24 bytes that are the same for the same key of the same tenant, on every gateway."""
    return sha256(b"idempotency\0" + caller.tenant.encode() + b"\0" + key.encode()).digest()[:24]


def _stop_token_ids(body: GenerateBody, model: ServedModel) -> list[int]:
    own = () if body.ignore_eos else model.eos_token_ids
    return list(dict.fromkeys((*own, *body.stop_token_ids)))

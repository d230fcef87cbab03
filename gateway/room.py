"""What every route needs, in one frozen object: the parts of a gateway, put together once by create_app."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gateway.admission import Admission
from gateway.caller import Caller
from gateway.ledger import Ledger, Ticket
from gateway.limits import GatewayLimits
from gateway.models import Models
from gateway.probes import Health
from gateway.prompts import Prompts
from gateway.schemas import GenerateBody
from gateway.telemetry import Telemetry
from wire.errors import Conflict, Unavailable


@dataclass(frozen=True, slots=True)
class Room:
    """A gateway's parts."""

    models: Models
    limits: GatewayLimits
    telemetry: Telemetry
    health: Callable[[], Health]
    prompts: Prompts
    admission: Admission
    ledger: Ledger

    async def take_in(self, body: GenerateBody, caller: Caller, key: str | None = None) -> Ticket:
        """From a valid body to a request in the queue: the same for HTTP and sockets. Raises any MillraceError.

        `key`: an Idempotency-Key; a request that has it already is attached to, if its body is the same.
        """
        health = self.health()
        if health.is_draining:
            raise Unavailable(health.reason or "this server is draining; another one will answer")
        door = self.ledger.door
        if key is None:  # one that has been used may be answered even now
            door.check(caller.tenant, (len(body.input_ids) or 1) + (body.max_tokens or 1))
        admitted = await self.admission.admit(body, caller, key)
        if key is None:
            door.enter(caller.tenant, admitted.request.max_total_tokens)
        try:
            return await self.ledger.submit(admitted)
        except Conflict as conflict:
            words = "this Idempotency-Key came with another request before"
            raise Conflict(words, param="Idempotency-Key") from conflict

    async def close(self) -> None:
        await self.ledger.close()
        self.prompts.close()

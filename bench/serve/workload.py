"""What is asked: requests of one size, the same few over and over or all different, and their answers without load."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

from bench.serve.client import Client, Fields, request_bytes
from services.model_commands import SHIPPED_NAME

REPEATED = 8
FIRST_ID, NUM_IDS = 100, 1_500  # within every vocabulary here


def fields(number: int, prompt_tokens: int, new_tokens: int) -> dict[str, object]:
    """The request of this number: a prompt of its own, greedy, streamed, not ended before `new_tokens`."""
    start = number * 37 + number // NUM_IDS
    prompt = [FIRST_ID + (start + position * (11 + number // NUM_IDS)) % NUM_IDS for position in range(prompt_tokens)]
    return {
        "model": SHIPPED_NAME,
        "input_ids": prompt,
        "max_tokens": new_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }


def repeated(prompt_tokens: int, new_tokens: int) -> list[Fields]:
    """The few requests whose every token is checked: each second one sampled, with a seed."""
    return [
        {**fields(number, prompt_tokens, new_tokens), "temperature": 0.9 * (number % 2), "seed": 11 + number}
        for number in range(REPEATED)
    ]


def endless(prompt_tokens: int, new_tokens: int, **more: object) -> Iterator[bytes]:
    """Requests, all different, as they go over the wire."""
    number = 0
    while True:
        yield request_bytes({**fields(number, prompt_tokens, new_tokens), **more})
        number += 1


async def answers_alone(client: Client, requests: Sequence[bytes]) -> list[list[int]]:
    """The tokens of each request without load, one after the other. Raises SystemExit if one is not answered."""
    found: list[list[int]] = []
    for request in requests:
        answer = await client.ask(request)
        if not answer.is_whole:
            raise SystemExit(f"without load, a request was not answered: {answer.error or answer.status}")
        found.append(answer.token_ids)
    return found


async def stop(tasks: Sequence[asyncio.Task[None]], patience_s: float) -> int:
    """Wait for clients to come to their end. How many did not within `patience_s` and were cancelled."""
    if not tasks:
        return 0
    done, late = await asyncio.wait(tasks, timeout=patience_s)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    for task in done:
        task.result()
    return len(late)

"""Fixtures of the contract suites: every test runs once for each implementation."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from tests.contracts.queues import FACTORIES, QueueFactory, QueueOptions, QueueRig
from wire.queue import Queue

OpenRig = Callable[[QueueOptions], Awaitable[QueueRig]]


@pytest.fixture(params=sorted(FACTORIES))
def queue_factory(request: pytest.FixtureRequest) -> QueueFactory:
    """One implementation."""
    return FACTORIES[request.param]


@pytest.fixture
async def open_rig(queue_factory: QueueFactory) -> AsyncIterator[OpenRig]:
    """Opens queues with options of the test's own; closes them after the test."""
    async with AsyncExitStack() as stack:

        async def open_one(options: QueueOptions) -> QueueRig:
            return await stack.enter_async_context(queue_factory(options))

        yield open_one


@pytest.fixture
async def rig(open_rig: OpenRig) -> QueueRig:
    """A queue with the suite's default options and a clock in the test's hand."""
    return await open_rig(QueueOptions())


@pytest.fixture
def queue(rig: QueueRig) -> Queue:
    """The queue of `rig`."""
    return rig.queue

"""Redis as the manifests ship it: its access list admits the queue only, and its sentinels replace a master."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError

from services.queues.redis import RedisQueue
from services.redis_queue import open_queue
from services.settings import Settings
from tests.deploy.shipped_redis import PASSWORD, REPLICATION, ShippedPod, shipped_redis, shipped_sentinels
from tests.redis_server import until
from wire.errors import Unavailable
from wire.messages import Event, Finished, Generate, Tokens, Usage, WorkerReport
from wire.queue import Append, LeaseBudget

MODEL = "millpond@1"


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ShippedPod, str]]:
    with shipped_redis(tmp_path_factory.mktemp("redis")) as found:
        yield found


async def open_patiently(url: str) -> RedisQueue:
    """The queue as a gateway that is started again until it gets through."""
    for _ in range(150):
        try:
            return await open_queue(Settings(redis_url=url, unserved="wait"))
        except Unavailable:
            await asyncio.sleep(0.2)
    raise AssertionError("nobody answered within half a minute")


async def answer_one(queue: RedisQueue, request_id: str) -> list[Event]:
    """Everything that gateways and workers do for one request."""
    await queue.report(WorkerReport("worker-1", [MODEL], 1000, 1000, 0))
    await queue.submit(Generate(request_id, MODEL, [1, 2, 3], 8))
    (lease,) = await queue.lease(LeaseBudget("worker-1", (MODEL,), 1, 1000, 1000), 10.0)
    assert await queue.renew([(request_id, lease.epoch)]) == []
    tokens, finished = Tokens(request_id, 0, [7, 8]), Finished(request_id, "stop", Usage(3, 2))
    assert await queue.publish([Append(lease.epoch, tokens), Append(lease.epoch, finished)]) == []
    return [event async for event in queue.events(request_id)]


async def test_the_queue_does_all_its_work_behind_the_access_list(redis: tuple[ShippedPod, str]) -> None:
    queue = await open_queue(Settings(redis_url=redis[1]))
    try:
        events = await answer_one(queue, "one")
        assert [type(event) for event in events] == [Tokens, Finished]
        assert (await queue.depth()).running_requests == 0
        facts = await queue.redis()
        assert facts is not None
        assert facts.is_aof_ok
        assert facts.memory_max_bytes == 768 * 2**20
    finally:
        await queue.close()


@pytest.mark.parametrize(
    "words",
    ["FLUSHALL", "CONFIG GET *", "KEYS *", "EVAL 1 0", "ACL LIST", "SHUTDOWN", "SAVE", "GET other", "PUBLISH other x"],
)
def test_who_holds_the_password_may_not(redis: tuple[ShippedPod, str], words: str) -> None:
    with redis[0].client("millrace", PASSWORD) as client, pytest.raises(NoPermissionError):
        client.execute_command(*words.split())


def test_who_holds_none_may_only_ask_whether_it_lives(redis: tuple[ShippedPod, str]) -> None:
    with redis[0].client() as client:
        assert client.ping()
        for words in ("GET mr:{0}:acct", "INFO", "FUNCTION LIST", "SUBSCRIBE mr:{0}:work"):
            with pytest.raises(NoPermissionError):
                client.execute_command(*words.split())
    with redis[0].client("millrace", "guessed") as client, pytest.raises(AuthenticationError):
        client.ping()


def test_the_password_is_in_no_file(redis: tuple[ShippedPod, str]) -> None:
    pages = [path for path in redis[0].directory.rglob("*") if path.is_file()]
    assert any(path.name == "users.acl" for path in pages)
    assert not [path for path in pages if PASSWORD.encode() in path.read_bytes()]


# ---- three and three ----


def _master(servers: list[ShippedPod]) -> ShippedPod | None:
    for pod in servers:
        try:
            with pod.client("sentinel", REPLICATION) as client:
                if pod.process is not None and client.execute_command("ROLE")[0] == b"master":
                    return pod
        except RedisError:
            continue
    return None


def _is_whole(servers: list[ShippedPod], watchers: list[ShippedPod]) -> bool:
    """One master with two replicas in step, and each sentinel knows all."""
    master = _master(servers)
    if master is None:
        return False
    with master.client("sentinel", REPLICATION) as client:
        replicas = client.info("replication")
    states = [replicas.get(f"slave{i}", {}).get("state") for i in range(2)]
    known = []
    for watcher in watchers:
        with watcher.client(None, PASSWORD) as client:
            state = client.sentinel_master("millrace")
            known.append((state["num-slaves"], state["num-other-sentinels"], state["ip"]))
    return states == ["online"] * 2 and known == [(2, 2, master.host)] * 3


async def test_the_queue_goes_on_at_another_redis_when_its_master_is_killed(tmp_path: Path) -> None:
    with shipped_sentinels(tmp_path) as (pods, sentinels, url):
        servers, watchers = list(pods), list(sentinels)
        await asyncio.to_thread(until, "three and three are whole", lambda: _is_whole(servers, watchers))
        assert _master(servers) is servers[0]
        queue = await open_patiently(url)
        try:
            assert len(await answer_one(queue, "before")) == 2
            await asyncio.to_thread(_wait_for_replicas, servers[0])
            servers[0].kill()
            await asyncio.to_thread(until, "another is master", lambda: _master(servers[1:]) is not None)
            servers[0].start()  # asks the sentinels whom to follow
            await asyncio.to_thread(until, "three and three are whole again", lambda: _is_whole(servers, watchers))
            assert _master(servers) is not servers[0]
        finally:
            await queue.close()
        queue = await open_patiently(url)
        try:
            assert len([event async for event in queue.events("before")]) == 2
            assert len(await answer_one(queue, "after")) == 2
        finally:
            await queue.close()


def _wait_for_replicas(master: ShippedPod) -> None:
    """Until both have what the master has."""

    def offsets() -> set[int]:
        with master.client("sentinel", REPLICATION) as client:
            facts = client.info("replication")
        return {facts["master_repl_offset"], *(facts[f"slave{i}"]["offset"] for i in range(2))}

    until("replicas have caught up", lambda: len(offsets()) == 1)

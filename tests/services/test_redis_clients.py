"""Every kind of Redis, for real: one server, sentinels with a replica, a cluster. What fails over goes on."""

from __future__ import annotations

import asyncio
import secrets
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from redis import Redis as PlainRedis
from redis.asyncio.connection import SSLConnection
from redis.crc import key_slot
from redis.exceptions import ConnectionError as RedisConnectionError

from services.queues.protocol_core import QueueLimits
from services.queues.redis import RedisQueue
from services.queues.redis_address import parse_address
from services.queues.redis_clients import CONNECTIONS, redis_client
from services.queues.redis_news import Subscription
from services.redis_queue import open_queue
from services.settings import Settings, SettingsError
from tests.contracts.queues import (
    QueueOptions,
    budget,
    completion,
    finished,
    generate,
    held,
    lease_one,
    tokens,
)
from tests.redis_server import PATIENCE_S, RedisServer, Sentinel, Topology, cluster, free_ports, sentinels, until
from wire.errors import Unavailable
from wire.messages import Tokens
from wire.queue import RefusalReason, Status

LIMITS = QueueLimits(**asdict(QueueOptions(lease_ms=60_000)), orphan_ms=60_000)
PARTITION = "0"
SLOT = key_slot(PARTITION.encode())
KINDS = ("one server", "sentinels", "cluster")

Result = TypeVar("Result")


@contextmanager
def one_server(directory: Path) -> Iterator[Topology]:
    server = RedisServer(directory, port=free_ports(1)[0])
    server.start()
    yield Topology([server], server.url, server, server)
    server.stop()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """A new one each time, with a name short enough for a Unix socket."""
    return lambda: tmp_path_factory.mktemp("r")


@pytest.fixture(scope="module")
def server(directory: Callable[[], Path]) -> Iterator[Topology]:
    with one_server(directory()) as topology:
        yield topology


@pytest.fixture(scope="module")
def watched(directory: Callable[[], Path]) -> Iterator[Topology]:
    with sentinels(directory()) as topology:
        yield topology


@pytest.fixture(scope="module")
def nodes(directory: Callable[[], Path]) -> Iterator[Topology]:
    with cluster(directory(), SLOT) as topology:
        yield topology


@pytest.fixture
def topology(request: pytest.FixtureRequest) -> Topology:
    """Of each kind one, which no test breaks."""
    name = dict(zip(KINDS, ("server", "watched", "nodes"), strict=True))[request.param]
    found: Topology = request.getfixturevalue(name)
    return found


@asynccontextmanager
async def processes(
    url: str, count: int = 2, partition: str = PARTITION, limits: QueueLimits = LIMITS
) -> AsyncIterator[list[RedisQueue]]:
    """So many queue objects over one Redis, as if each were in a process of its own."""
    queues: list[RedisQueue] = []
    try:
        for _ in range(count):
            queues.append(await RedisQueue.open(redis_client(url, partition), limits, partition=partition))
        yield queues
    finally:
        for queue in queues:
            await queue.close()


async def patiently(call: Callable[[], Awaitable[Result]]) -> Result:
    """As gateways and workers do: try again while the queue is away."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await call()
            except Unavailable:
                await asyncio.sleep(0.1)


async def next_tokens(reader: AsyncIterator[object]) -> list[int]:
    async with asyncio.timeout(PATIENCE_S):
        event = await anext(reader)
    assert isinstance(event, Tokens)
    return event.token_ids


def listeners(client: PlainRedis, partition: str = PARTITION) -> int:
    """How many hear of waiting requests at this server: every queue object does."""
    reply = client.execute_command("PUBSUB", "NUMSUB", f"mr:{{{partition}}}:work")  # type: ignore[no-untyped-call]
    return int(reply[1])


def connections_of_news(client: PlainRedis) -> set[str]:
    clients: Any = client.client_list(_type="pubsub")
    return {each["id"] for each in clients}


async def eventually(claim: Callable[[], bool]) -> None:
    await asyncio.to_thread(until, "what the test waits for", claim)


@pytest.mark.parametrize("topology", KINDS, indirect=True)
async def test_a_queue_does_its_work_on_every_kind_of_redis(topology: Topology) -> None:
    limits = replace(LIMITS, lease_ms=400)
    async with processes(topology.url, 3, secrets.token_hex(4), limits) as (gateway, worker, other):
        assert await gateway.submit(generate())
        assert not await gateway.submit(generate())
        reader = gateway.events("r")
        lease = await lease_one(worker)
        await worker.publish([tokens(lease, 0, 5, 6)])
        assert await next_tokens(reader) == [5, 6]
        (again,) = await other.lease(budget(worker_id="other"), wait_s=PATIENCE_S)  # when the first has lapsed
        assert again.token_ids == (5, 6)
        await other.publish([tokens(again, 2, 7), finished(again, 3)])
        assert [each.reason for each in await worker.renew([held(lease)])] == [RefusalReason.FENCED]
        assert await next_tokens(reader) == [7]
        assert (await completion(other)).token_ids == [5, 6, 7]
        assert (await completion(gateway, start=2)).token_ids == [7]
        assert (await other.standing("r")).status is Status.ENDED


@pytest.mark.parametrize("topology", KINDS, indirect=True)
async def test_two_thousand_submits_at_once_share_few_connections(topology: Topology) -> None:
    async with processes(f"{topology.url}?client_name=counted", 1, secrets.token_hex(4)) as (gateway,):
        accepted = await asyncio.gather(*(gateway.submit(generate(f"r{number}")) for number in range(2_000)))
        assert 1 < topology.num_connections("counted") <= CONNECTIONS + 1  # one for news
        assert accepted == [True] * 2_000
        assert (await gateway.depth()).queued_requests == 2_000


async def test_calls_that_are_cancelled_give_their_connections_back(server: Topology) -> None:
    async with processes(server.url, 1, secrets.token_hex(4)) as (gateway,):
        for moment in range(8 * CONNECTIONS):
            calls = [asyncio.create_task(gateway.depth()) for _ in range(2 * CONNECTIONS)]
            for _ in range(moment % 32):
                await asyncio.sleep(0)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        await asyncio.gather(*(gateway.depth() for _ in range(2 * CONNECTIONS)))


@pytest.mark.parametrize("several", [sentinels, lambda directory: cluster(directory, SLOT)], ids=KINDS[1:])
async def test_a_stream_goes_on_when_the_master_is_killed(
    several: Callable[[Path], AbstractContextManager[Topology]], directory: Callable[[], Path]
) -> None:
    with several(directory()) as topology:
        async with processes(topology.url) as (gateway, worker):
            await gateway.submit(generate())
            await gateway.submit(generate("waiting"))
            reader = gateway.events("r")
            lease = await lease_one(worker)
            await worker.publish([tokens(lease, 0, 1, 2, 3)])
            assert await next_tokens(reader) == [1, 2, 3]
            await asyncio.to_thread(topology.settle)
            topology.master.stop(signal.SIGKILL)
            assert await patiently(lambda: worker.publish([tokens(lease, 3, 4)])) == []
            assert await next_tokens(reader) == [4]
            await patiently(lambda: worker.publish([tokens(lease, 4, 5), finished(lease, 5)]))
            assert await next_tokens(reader) == [5]
            assert (await completion(gateway)).token_ids == [1, 2, 3, 4, 5]
            assert await gateway.submit(generate("new"))
            assert {each.request.request_id for each in await worker.lease(budget())} == {"waiting", "new"}


async def test_calls_and_news_leave_a_master_that_does_not_know_it_was_superseded(
    directory: Callable[[], Path],
) -> None:
    with sentinels(directory(), count=1) as topology, topology.clients() as (old, new, _):
        async with processes(topology.url) as (gateway, worker):
            await gateway.submit(generate())
            reader = gateway.events("r")
            lease = await lease_one(worker)
            await asyncio.to_thread(topology.settle)
            old.acl_setuser("default", enabled=True, commands=["-replicaof", "-slaveof"])
            sentinel = topology.servers[2]
            assert isinstance(sentinel, Sentinel)
            await asyncio.to_thread(sentinel.fail_over, "mine")
            async with asyncio.timeout(PATIENCE_S):
                while (listeners(old), listeners(new)) != (0, 2):
                    await asyncio.sleep(0.1)
                    await asyncio.gather(gateway.depth(), worker.depth(), return_exceptions=True)
            assert topology.master.is_master()
            await worker.publish([tokens(lease, 0, 1)])
            assert await next_tokens(reader) == [1]


async def test_a_server_that_became_a_replica_is_away_until_it_is_master_again(server: Topology) -> None:
    with server.master.client() as client:
        async with processes(server.url, 1, secrets.token_hex(4)) as (gateway,):
            listening = connections_of_news(client)
            client.replicaof("127.0.0.1", free_ports(1)[0])
            with pytest.raises(Unavailable, match="not the master"):
                await gateway.submit(generate())
            # News too come over another connection, which finds the new master if the address leads there by now.
            await eventually(lambda: not listening & connections_of_news(client))
            client.replicaof("NO", "ONE")
            assert await gateway.submit(generate())


@pytest.mark.parametrize(
    ("name", "refusing", "usual"),
    [
        ("min-replicas-to-write", "7", "0"),  # NOREPLICAS: what keeps a master that is cut off from taking requests
        ("maxmemory", "1", "0"),  # OOM
    ],
)
async def test_a_redis_that_refuses_writes_is_away(server: Topology, name: str, refusing: str, usual: str) -> None:
    with server.master.client() as client:
        async with processes(server.url, 1, secrets.token_hex(4)) as (gateway,):
            client.config_set(name, refusing)
            with pytest.raises(Unavailable, match="does not serve this now"):
                await gateway.submit(generate())
            client.config_set(name, usual)
            assert await gateway.submit(generate())


async def test_a_partition_moves_to_another_node_of_the_cluster_with_all_it_has(nodes: Topology) -> None:
    partition = secrets.token_hex(4)
    slot = key_slot(partition.encode())
    async with processes(nodes.url, 2, partition) as (gateway, worker):
        await gateway.submit(generate())
        reader = gateway.events("r")
        lease = await lease_one(worker)
        await worker.publish([tokens(lease, 0, 1)])
        assert await next_tokens(reader) == [1]
        with nodes.clients() as clients:
            source = next(each for each in clients if cluster_words(each, "COUNTKEYSINSLOT", slot))
            target = next(each for each in clients[:3] if each is not source)
            names = {each: cluster_words(each, "MYID") for each in (source, target)}
            cluster_words(target, "SETSLOT", slot, "IMPORTING", names[source])
            cluster_words(source, "SETSLOT", slot, "MIGRATING", names[target])
            with pytest.raises(Unavailable, match="does not serve this now"):  # and not one half here, one half there
                await gateway.submit(generate("meanwhile"))
            keys = cluster_words(source, "GETKEYSINSLOT", slot, 1000)
            target_port = nodes.servers[clients.index(target)].port
            assert source.migrate("127.0.0.1", target_port, keys, 0, 5000)
            for each in (target, source):
                cluster_words(each, "SETSLOT", slot, "NODE", names[target])
            await patiently(lambda: worker.publish([tokens(lease, 1, 2)]))
            assert await next_tokens(reader) == [2]
            await patiently(gateway.depth)
            await eventually(lambda: listeners(target, partition) == 2)
            await worker.publish([tokens(lease, 2, 3), finished(lease, 3)])
            assert await next_tokens(reader) == [3]
            assert (await completion(gateway)).token_ids == [1, 2, 3]


def cluster_words(client: PlainRedis, *words: object) -> Any:
    return client.execute_command("CLUSTER", *words)  # type: ignore[no-untyped-call]


async def test_a_lost_connection_leaves_no_listener_behind(server: Topology) -> None:
    partition = secrets.token_hex(4)
    with server.master.client() as client:
        async with processes(server.url, 2, partition) as (gateway, worker):
            for index in range(3):
                assert client.client_kill_filter(_type="pubsub") == 2
                await eventually(lambda: gateway.is_connected and worker.is_connected)
                await gateway.submit(generate(f"r{index}"))
                reader = gateway.events(f"r{index}")
                lease = await lease_one(worker, f"r{index}")
                await worker.publish([tokens(lease, 0, index)])
                assert await next_tokens(reader) == [index]
            assert listeners(client, partition) == 2


async def test_silence_is_borne_while_redis_answers_and_ends_a_subscription_when_it_does_not(
    directory: Callable[[], Path],
) -> None:
    with one_server(directory()) as topology:
        client = redis_client(topology.url)
        subscription = await Subscription.open(client, "news", silence_s=0.1)
        heard = asyncio.create_task(subscription.next())
        await asyncio.sleep(1.0)  # ten times as long as it waits before it asks
        await client.publish("news", "late")
        assert await heard == (b"news", b"late")
        topology.master.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(RedisConnectionError, match="silent"):
                await asyncio.wait_for(subscription.next(), PATIENCE_S)
        finally:
            topology.master.send_signal(signal.SIGCONT)
        await subscription.close()
        await client.aclose()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://localhost", "begins with 'http://'; known are redis://, rediss://, unix://, redis\\+sentinel://"),
        ("localhost:6379", "begins with 'localhost://'"),
        ("redis://", "'' names no host"),
        ("redis://one:port", "'one:port' is no host:port"),
        ("redis://one:70000", "'one:70000' is no host:port"),
        ("redis://one,two", "names 2 hosts"),
        ("redis://one/queue", "'queue' is no number of a database"),
        ("redis://one?colour=red", "'colour'"),
        ("redis://one?socket_timeout=soon", "'socket_timeout'"),
        ("redis://one?max_connections=0", "max_connections is 0"),
        ("unix://", "names no socket"),
        ("redis+sentinel://one,two", "names no master"),
        ("redis+sentinel://one,,two/mine", "'' names no host"),
        ("redis+sentinel://one/mine/3/4", "'3/4' is no number of a database"),
        ("redis+sentinel://" + ",".join(["one"] * 65) + "/mine", "names 65 hosts; at most 64"),
        ("redis+cluster://one/1", "names database 1; a cluster has only 0"),
    ],
)
async def test_an_address_that_is_none_is_refused_with_what_is_wrong(url: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words) as caught:
        await open_queue(Settings(redis_url=url.replace("://", "://me:secret@") if "one" in url else url))
    assert "secret" not in str(caught.value)


def test_an_address_is_taken_apart_as_redis_py_would() -> None:
    found = parse_address(
        "rediss+sentinel://me:p%40ss@one:1,[::1]:2,three/mine/4?ssl_ca_certs=ca.pem&sentinel_password=other"
    )
    assert found.seeds == (("one", 1), ("::1", 2), ("three", 26379))
    assert (found.master, found.options["username"], found.options["password"]) == ("mine", "me", "p@ss")
    assert (found.options["db"], found.options["ssl_ca_certs"]) == (4, "ca.pem")
    assert found.options["connection_class"] is found.seed_options["connection_class"] is SSLConnection
    assert found.seed_options["password"] == "other"
    assert not {"username", "db"} & set(found.seed_options)
    nodes = parse_address("redis+cluster://:word@one,two:7")
    assert nodes.seeds == (("one", 6379), ("two", 7))
    assert nodes.options["password"] == nodes.seed_options["password"] == "word"


async def test_an_address_that_leads_to_something_else_is_refused_with_what_is_there(
    server: Topology, watched: Topology, nodes: Topology
) -> None:
    one, sentinel = server.master.host, watched.servers[2].host
    elsewhere = next(each.host for each in nodes.servers[:3] if each is not nodes.master)
    for url, words in (
        (f"redis+cluster://{one}", "cannot say where the master is: .*cluster support disabled"),
        (f"redis+sentinel://{one}/mine", "cannot say where the master is: unknown command"),
        (f"redis+sentinel://{sentinel}/yours", "knows no master 'yours'"),
        (f"redis://{sentinel}", "unknown command"),
        (f"redis://{elsewhere}", "node of a cluster: the address must begin with redis\\+cluster://"),
        (f"redis://me:secret@{one}", "invalid username-password pair"),
    ):
        with pytest.raises(SettingsError, match=words) as caught:
            await open_queue(Settings(redis_url=url))
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["redis://{}", "redis+sentinel://{}/mine", "redis+cluster://{}"])
async def test_where_nobody_answers_the_queue_is_away(url: str) -> None:
    with pytest.raises(Unavailable, match="Redis cannot be reached"):
        await open_queue(Settings(redis_url=url.format(f"127.0.0.1:{free_ports(1)[0]}")))

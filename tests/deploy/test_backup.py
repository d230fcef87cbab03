"""What docs/backup.md says, done: a queue is copied while it runs and restored elsewhere; a store is copied."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from model_store.store import Store
from services.queues.redis import RedisQueue
from services.redis_queue import open_queue
from services.settings import Settings
from tests.contracts.queues import PATIENCE_S, budget, completion, finished, generate, lease_one, tokens
from tests.redis_server import RedisServer, redis_program, until


@pytest.fixture
def servers(tmp_path: Path) -> dict[str, Path]:
    redis_program()
    found = {name: tmp_path / name for name in ("old", "new")}
    for directory in found.values():
        directory.mkdir()
    return found


async def connect(server: RedisServer) -> RedisQueue:
    return await open_queue(Settings(redis_url=server.url, unserved="wait", lease_s=0.2))


async def test_a_queue_is_restored_from_a_copy_and_requests_end_as_they_would_have(servers: dict[str, Path]) -> None:
    old = RedisServer(servers["old"], keeps_data=True)
    old.start()
    queue = await connect(old)
    await queue.submit(generate())
    lease = await lease_one(queue)
    await queue.publish([tokens(lease, 0, 5, 6)])
    cli = redis_program().replace("-server", "-cli")
    copy = [cli, "-s", old.socket, "--rdb", str(servers["new"] / "queue.rdb")]
    await asyncio.to_thread(subprocess.run, copy, check=True, capture_output=True, timeout=30)
    await queue.publish([tokens(lease, 2, 7)])  # after the copy: is not in it
    await queue.close()
    old.stop()

    reading = RedisServer(servers["new"], options=("--dbfilename", "queue.rdb"))
    reading.start()
    with reading.client() as client:
        client.config_set("appendonly", "yes")
        until("the file of appends is written", lambda: client.info("persistence")["aof_rewrite_in_progress"] == 0)
    reading.stop()

    new = RedisServer(servers["new"], keeps_data=True)
    new.start()
    queue = await connect(new)
    try:
        [again] = await queue.lease(budget(), wait_s=PATIENCE_S)  # once the lease that is in the copy has lapsed
        assert (again.request, again.token_ids, again.delivery) == (generate(), (5, 6), 2)
        await queue.publish([tokens(again, 2, 7, 8), finished(again, 4)])
        assert (await completion(queue)).token_ids == [5, 6, 7, 8]
        assert await queue.lease(budget()) == []
    finally:
        await queue.close()
        new.stop()


def test_a_store_is_copied_while_it_serves_and_every_file_is_whole(shipped_settings: Settings, tmp_path: Path) -> None:
    archive, copy = tmp_path / "store.tar", tmp_path / "copy"
    copy.mkdir()
    leave_out = ("--exclude=./.incoming", "--exclude=./.lock")
    store = str(shipped_settings.store)
    subprocess.run(["tar", "-C", store, *leave_out, "-cf", str(archive), "."], check=True, timeout=60)
    subprocess.run(["tar", "-C", str(copy), "-xf", str(archive)], check=True, timeout=60)
    assert [manifest.model_id for manifest in Store(copy).list()] == [
        manifest.model_id for manifest in Store(shipped_settings.store).list()
    ]
    assert Store(copy).verify("millpond") == Store(shipped_settings.store).show("millpond")

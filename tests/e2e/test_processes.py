"""Gateway, worker and Redis as separate processes: the same answers as in one, and they survive each other."""

from __future__ import annotations

import concurrent.futures
import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from services.settings import Settings
from services.worker_list import show_workers
from tests.e2e.server import Server, serve
from tests.e2e.test_embedded import LONG, sse
from tests.redis_server import RedisServer

LEASE_S = "1.0"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path, keeps_data=True)
    server.start()
    yield server
    server.stop()


def over(redis: RedisServer) -> dict[str, str]:
    return {"redis_url": redis.url, "lease_s": LEASE_S, "log_level": "info"}


def streamed(client: httpx.Client, body: dict[str, object]) -> list[int]:
    with client.stream("POST", "/generate", json={**body, "stream": True}) as stream:
        return [token for event in sse(stream) for token in event.get("token_ids") or []]  # type: ignore[attr-defined]


@pytest.fixture
def expected(client: httpx.Client) -> list[int]:
    """What one process answers."""
    answer: list[int] = client.post("/generate", json=LONG).json()["token_ids"]
    return answer


def test_separate_processes_answer_as_one_does(
    shipped_settings: Settings, redis: RedisServer, expected: list[int]
) -> None:
    store = shipped_settings.store
    with serve(store, "gateway", **over(redis)) as gateway, serve(store, "worker", **over(redis)) as worker:
        with gateway.client() as client, worker.client() as probes:
            assert client.post("/generate", json=LONG).json()["token_ids"] == expected
            assert streamed(client, LONG) == expected
            assert client.get("/readyz").status_code == probes.get("/readyz").status_code == 200
            assert probes.get("/livez").json() == {"status": "live"}
        assert worker.metric("millrace_engine_steps_total") > 0


def test_workers_are_listed_and_without_one_requests_are_refused(
    shipped_settings: Settings, redis: RedisServer, capsys: pytest.CaptureFixture[str]
) -> None:
    store = shipped_settings.store
    settings = replace(shipped_settings, redis_url=redis.url)
    with serve(store, "gateway", **over(redis)) as gateway, gateway.client() as client:
        refused = client.post("/generate", json=LONG)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert show_workers(settings, as_json=False) == 1
        assert "no worker" in capsys.readouterr().out
        with serve(store, "worker", **over(redis)):
            assert client.post("/generate", json=LONG).status_code == 200
            assert show_workers(settings, as_json=True) == 0
            (worker,) = json.loads(capsys.readouterr().out)
            assert (worker["running_requests"], worker["is_draining"]) == (0, False)
            assert worker["free_tokens"] == worker["capacity_tokens"] > 0
            assert show_workers(settings, as_json=False) == 0
            assert "ready" in capsys.readouterr().out


def test_a_stream_survives_the_death_of_its_worker(
    shipped_settings: Settings, redis: RedisServer, expected: list[int]
) -> None:
    """Killed in the middle of many streams; another worker continues each at the next token, and no token differs."""
    store = shipped_settings.store
    body = {**LONG, "temperature": 0.9, "seed": 7}
    with (
        serve(store, "gateway", **over(redis)) as gateway,
        gateway.client() as client,
        serve(store, "worker", **over(redis)) as first,
        concurrent.futures.ThreadPoolExecutor(24) as pool,
    ):
        sampled = streamed(client, body)
        streams = [pool.submit(streamed, client, each) for each in (LONG, body) * 12]
        until(lambda: running(first) > 4)
        first.process.send_signal(signal.SIGKILL)
        assert not all(stream.done() for stream in streams)
        with serve(store, "worker", **over(redis)):
            answers = [stream.result(60) for stream in streams]
    assert answers == [expected, sampled] * 12


def test_redis_may_go_away_and_come_back(shipped_settings: Settings, redis: RedisServer, expected: list[int]) -> None:
    store = shipped_settings.store
    with serve(store, "gateway", **over(redis)) as gateway, serve(store, "worker", **over(redis)) as worker:
        with gateway.client() as client, concurrent.futures.ThreadPoolExecutor(1) as pool:
            stream = pool.submit(streamed, client, LONG)
            until(lambda: running(worker) > 0)
            redis.stop(signal.SIGKILL)
            with gateway.client() as other:
                refused = other.post("/generate", json=LONG)
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
                assert other.get("/readyz").status_code == 503
            redis.start()
            assert stream.result(60) == expected
            until(lambda: client.get("/readyz").status_code == 200)
            assert client.post("/generate", json=LONG).json()["token_ids"] == expected
        assert gateway.process.poll() is worker.process.poll() is None


def test_a_drained_worker_hands_over_without_waiting_for_its_lease(
    shipped_settings: Settings, redis: RedisServer, expected: list[int]
) -> None:
    store = shipped_settings.store
    with (
        serve(store, "gateway", **over(redis)) as gateway,
        gateway.client() as client,
        serve(store, "worker", **over(redis), drain_s="0") as first,
        serve(store, "worker", **over(redis)),
        concurrent.futures.ThreadPoolExecutor(6) as pool,
    ):
        streams = [pool.submit(streamed, client, LONG) for _ in range(6)]
        until(lambda: running(first) > 0 or all(stream.done() for stream in streams))
        first.process.send_signal(signal.SIGTERM)
        assert [stream.result(60) for stream in streams] == [expected] * 6
        assert first.process.wait(20) == 0


def test_a_drained_gateway_ends_the_streams_it_has(
    shipped_settings: Settings, redis: RedisServer, expected: list[int]
) -> None:
    store = shipped_settings.store
    with (
        serve(store, "worker", **over(redis)) as worker,
        serve(store, "gateway", **over(redis)) as gateway,
        gateway.client() as client,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        stream = pool.submit(streamed, client, LONG)
        until(lambda: running(worker) > 0)
        gateway.process.send_signal(signal.SIGTERM)
        assert stream.result(60) == expected
        assert gateway.process.wait(20) == 0


def until(holds: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def running(worker: Server) -> float:
    return worker.metric("vllm:num_requests_running")

"""Start and stop of the whole process."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import time

import httpx
import pytest

from services.settings import Settings
from tests.e2e.server import ROOT, serve
from tests.e2e.test_embedded import LONG, sse


def millrace(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.cli", *arguments],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_sigterm_lets_running_streams_finish_and_refuses_new_ones(shipped_settings: Settings) -> None:
    with serve(shipped_settings.store) as server, server.client() as client:
        expected = client.post("/generate", json=LONG).json()["token_ids"]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(client.post, "/generate", json=LONG) for _ in range(4)]
            while server.metric("vllm:num_requests_running") < 4 and not any(a.done() for a in answers):
                time.sleep(0.01)
            server.process.send_signal(signal.SIGTERM)
            assert [answer.result().json()["token_ids"] for answer in answers] == [expected] * 4
        assert server.process.wait(20) == 0
        with pytest.raises(httpx.TransportError):
            client.get("/livez")


def test_a_request_larger_than_the_kv_pool_is_refused_with_its_numbers_while_a_stream_goes_on(
    shipped_settings: Settings,
) -> None:
    with serve(shipped_settings.store, kv_memory_bytes=str(200_000)) as server, server.client() as client:
        body = {**LONG, "max_tokens": 60}
        expected = client.post("/generate", json=body).json()["token_ids"]
        with client.stream("POST", "/generate", json={**body, "stream": True}) as stream, server.client() as other:
            refused = other.post("/generate", json=LONG)
            assert refused.status_code == 413
            error = refused.json()["error"]
            assert error["code"] == "request_too_large"
            assert "403" in error["message"]  # 3 + 400 tokens asked for
            assert "128" in error["message"]  # 8 blocks of 16
            assert [token for event in sse(stream) for token in event.get("token_ids") or []] == expected  # type: ignore[attr-defined]
        server.wait_idle()


def test_a_taken_port_is_said_in_words(shipped_settings: Settings) -> None:
    with serve(shipped_settings.store) as server:
        port = server.address.rsplit(":", 1)[1]
        second = millrace("up", "--port", port, "--store", str(shipped_settings.store))
        assert second.returncode == 2
        assert f"cannot listen on 127.0.0.1:{port}" in second.stderr


def test_generate_prints_the_same_tokens_as_the_server(shipped_settings: Settings) -> None:
    printed = millrace(
        "generate", "--model", "millpond", "--input-ids", "100,101,102", "--max-tokens", "32", "--temperature", "0",
        "--ignore-eos", "--json", "--store", str(shipped_settings.store),
    )  # fmt: skip
    assert printed.returncode == 0, printed.stderr
    answer = json.loads(printed.stdout)
    assert answer["finish_reason"] == "length"
    with serve(shipped_settings.store) as server, server.client() as client:
        served = client.post("/generate", json={**LONG, "max_tokens": 32}).json()
    assert answer["token_ids"] == served["token_ids"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "--model", "nobody", "hi"), "nobody"),
        (("generate", "--input-ids", "1,x"), "'1,x'"),
        (("generate",), "one of the two"),
        (("generate", "hi", "--temperature", "nan"), "temperature"),
        (("generate", "hi", "--max-tokens", "100000"), "1,024"),
        (("up", "--port", "http"), "--port"),
        (("models", "import", "/no/such/dir", "--name", "x"), "/no/such/dir"),
    ],
)
def test_wrong_usage_is_answered_in_words(shipped_settings: Settings, arguments: tuple[str, ...], words: str) -> None:
    done = millrace(*arguments, MILLRACE_STORE=str(shipped_settings.store))
    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_and_the_store_speak_json(shipped_settings: Settings) -> None:
    store = str(shipped_settings.store)
    listed = json.loads(millrace("models", "list", "--json", MILLRACE_STORE=store).stdout)
    assert [each["model"].split("@")[0] for each in listed] == ["millpond"]
    assert (
        json.loads(millrace("models", "verify", "millpond", "--json", MILLRACE_STORE=store).stdout)["verified"] is True
    )
    doctor = json.loads(millrace("doctor", "--json", MILLRACE_STORE=store).stdout)
    assert doctor["models"][0]["kv_tokens"] >= 1024
    assert doctor["problems"] == []


def test_bench_engine_reports_what_it_measured(shipped_settings: Settings) -> None:
    done = millrace(
        "bench", "engine", "--model", "millpond", "--prompt-tokens", "32", "--new-tokens", "8", "--concurrency", "1,4",
        "--rounds", "1", "--profile", "--json", MILLRACE_STORE=str(shipped_settings.store),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [row["concurrency"] for row in report["results"]] == [1, 4]
    assert all(row["total_tokens_per_s"] > 0 for row in report["results"])
    assert {"QLinear", "PagedAttention", "Sample"} <= report["operators_ms_per_step"]["mean"].keys()

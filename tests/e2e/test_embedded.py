"""What a newcomer meets: one process, real HTTP, the shipped model."""

from __future__ import annotations

import concurrent.futures
import json
import socket

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.e2e.server import Server

QUESTION = {"messages": [{"role": "user", "content": "What is 12 + 30?"}], "temperature": 0}
# Token ids without an end token: runs to max_tokens, whatever the model thinks of it.
LONG = {"input_ids": [100, 101, 102], "max_tokens": 400, "ignore_eos": True, "temperature": 0}


def sse(response: httpx.Response) -> list[dict[str, object]]:
    """The data lines of a stream."""
    return [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]


def test_the_first_question_of_the_readme_is_answered(client: httpx.Client) -> None:
    answer = client.post("/generate", json=QUESTION).raise_for_status().json()
    assert "42" in answer["text"]
    assert answer["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len(answer["token_ids"])
    assert answer["usage"]["prompt_tokens"] > 5
    assert answer["timings"]["total_ms"] >= answer["timings"]["ttft_ms"] > 0


@pytest.mark.parametrize("body", [QUESTION, {**LONG, "temperature": 0.9, "seed": 7, "top_p": 0.9, "max_tokens": 60}])
def test_streamed_whole_websocket_and_resumed_are_the_same_answer(
    server: Server, client: httpx.Client, body: dict[str, object]
) -> None:
    whole = client.post("/generate", json=body).raise_for_status().json()
    with client.stream("POST", "/generate", json={**body, "stream": True}) as response:
        identity = response.headers["x-generation-id"]
        streamed = sse(response)
    with client.stream("GET", f"/streams/{identity}", params={"from": 3}) as response:
        resumed = sse(response)
    with connect(server.websocket) as socket_:
        socket_.send(json.dumps({"type": "generate", "id": "a", **body}))
        frames: list[dict[str, object]] = []
        while not frames or frames[-1]["type"] not in ("done", "error"):
            frames.append(json.loads(socket_.recv(timeout=30)))

    def ids(events: list[dict[str, object]]) -> list[int]:
        return [token for event in events for token in event.get("token_ids") or []]  # type: ignore[attr-defined]

    def text(events: list[dict[str, object]]) -> str:
        return "".join(str(event.get("text") or "") for event in events)

    assert ids(streamed) == whole["token_ids"] == ids(frames)
    assert text(streamed) == whole["text"] == text(frames)
    assert ids(resumed) == whole["token_ids"][3:]
    assert streamed[-1]["finish_reason"] == whole["finish_reason"] == frames[-1]["finish_reason"]


def test_the_same_seed_gives_the_same_answer_under_load(client: httpx.Client) -> None:
    body = {**LONG, "max_tokens": 40, "temperature": 1.0, "seed": 11}
    alone = client.post("/generate", json=body).json()["token_ids"]
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        others = [pool.submit(client.post, "/generate", json={**body, "seed": seed}) for seed in range(24)]
        again = [pool.submit(client.post, "/generate", json=body) for _ in range(8)]
        assert all(answer.result().json()["token_ids"] == alone for answer in again)
        assert len({tuple(answer.result().json()["token_ids"]) for answer in others}) > 1


@pytest.mark.parametrize(
    ("body", "status", "code", "words"),
    [
        ({"input_ids": [5] * 1100}, 413, "context_length_exceeded", "1,024"),
        ({"input_ids": [5] * 1000, "max_tokens": 100}, 413, "context_length_exceeded", "1,024"),
        ({"prompt": "hi", "model": "nobody"}, 404, "unknown_model", "nobody"),
        ('{"prompt": "hi"', 400, "bad_request", "JSON"),
        ('{"prompt": "hi", "temperature": NaN}', 400, "bad_request", "temperature"),
        ({"prompt": "hi", "temperature": -1}, 400, "bad_request", "temperature"),
        ({"prompt": "hi", "max_tokens": 0}, 400, "bad_request", "max_tokens"),
        ({"prompt": "hi", "colour": "red"}, 400, "bad_request", "colour"),
        ({"prompt": "hi", "n": 2}, 400, "bad_request", "n"),
        ({"input_ids": [999_999]}, 400, "bad_request", "999"),
        ({}, 400, "bad_request", "prompt"),
    ],
)
def test_bad_input_gets_its_words_while_a_stream_goes_on(
    client: httpx.Client, body: dict[str, object] | str, status: int, code: str, words: str
) -> None:
    expected = client.post("/generate", json={**LONG, "max_tokens": 100}).json()["token_ids"]
    with client.stream("POST", "/generate", json={**LONG, "max_tokens": 100, "stream": True}) as stream:
        raw = body if isinstance(body, str) else json.dumps(body)
        refused = client.post("/generate", content=raw, headers={"content-type": "application/json"})
        assert refused.status_code == status, refused.text
        error = refused.json()["error"]
        assert error["code"] == code
        assert words in error["message"] + str(error.get("param"))
        assert [token for event in sse(stream) for token in event.get("token_ids") or []] == expected  # type: ignore[attr-defined]


def test_a_web_page_whose_name_points_here_is_refused(client: httpx.Client) -> None:
    """DNS rebinding: to its browser such a page is where the server is, so only the name tells."""
    body = {"prompt": "Hello", "max_tokens": 1}
    refused = client.post("/generate", json=body, headers={"host": "attacker.example:8000"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "Host"
    for host in ("localhost", "localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert client.post("/generate", json=body, headers={"host": host}).status_code == 200


def test_a_websocket_frame_that_is_not_json_gets_an_error_and_the_socket_lives_on(server: Server) -> None:
    with connect(server.websocket) as socket_:
        socket_.send("this is not JSON")
        error = json.loads(socket_.recv(timeout=10))
        assert (error["type"], error["code"]) == ("error", "bad_request")
        socket_.send(json.dumps({"type": "generate", "id": "after", **QUESTION}))
        frame = {"type": ""}
        while frame["type"] != "done":
            frame = json.loads(socket_.recv(timeout=30))
            assert frame["type"] != "error", frame


def test_clients_that_leave_mid_stream_stop_their_work_and_nobody_elses(server: Server, client: httpx.Client) -> None:
    expected = client.post("/generate", json={**LONG, "max_tokens": 300}).json()["token_ids"]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        staying = pool.submit(client.post, "/generate", json={**LONG, "max_tokens": 300})
        for _ in range(5):
            with (
                server.client() as leaving,
                leaving.stream("POST", "/generate", json={**LONG, "stream": True}) as stream,
            ):
                next(stream.iter_lines())
        with connect(server.websocket) as socket_:
            socket_.send(json.dumps({"type": "generate", "id": "gone", **LONG}))
            socket_.recv(timeout=10)
        assert staying.result().json()["token_ids"] == expected
    server.wait_idle()


def test_half_a_request_and_a_reset_connection_harm_nobody(server: Server, client: httpx.Client) -> None:
    host, port = server.address.removeprefix("http://").split(":")
    for bytes_sent in (b"", b"POST /gen", b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{"):
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(bytes_sent)
    assert client.post("/generate", json=QUESTION).status_code == 200


def test_probes_and_metrics_say_how_it_is(server: Server, client: httpx.Client) -> None:
    assert client.get("/livez").status_code == client.get("/readyz").status_code == 200
    before = server.metric("vllm:generation_tokens_total")
    answer = client.post("/generate", json={**LONG, "max_tokens": 7}).json()
    assert len(answer["token_ids"]) == 7
    assert server.metric("vllm:generation_tokens_total") == before + 7
    assert server.metric("millrace_up") == 1


def test_a_websocket_left_open_does_not_keep_work_alive(server: Server) -> None:
    with connect(server.websocket) as socket_:
        for index in range(4):
            socket_.send(json.dumps({"type": "generate", "id": str(index), **LONG}))
        for index in range(4):
            socket_.send(json.dumps({"type": "cancel", "id": str(index)}))
        ended: set[str] = set()
        while len(ended) < 4:
            frame = json.loads(socket_.recv(timeout=30))
            if frame["type"] == "done":
                ended.add(frame["id"])
                assert frame["finish_reason"] in ("cancelled", "length")
        server.wait_idle()
    with pytest.raises(ConnectionClosed):
        socket_.send("after closing")

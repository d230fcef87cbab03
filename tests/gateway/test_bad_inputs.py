"""Whatever a client sends, it gets a 4xx in the one shape, soon, and the gateway goes on."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import httpx
import pytest

from gateway.limits import GatewayLimits
from gateway.models import Models
from tests.gateway.support import CONTEXT, Rig, ids_of, rig, served_model

JSON = {"content-type": "application/json"}
HUGE = "9" * 5_000


def body(**fields: str) -> str:
    """A request with these fields, given as raw JSON."""
    fields = {"prompt": '"Hello"', **fields}
    return "{" + ", ".join(f'"{name}": {raw}' for name, raw in fields.items()) + "}"


def message(content: str) -> str:
    """A conversation of one message, its content given as raw JSON."""
    return f'{{"messages": [{{"role": "user", "content": {content}}}]}}'


def check_error(response: httpx.Response, status: int, code: str, param: str | None, words: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    assert answer.keys() == {"error"}
    error = answer["error"]
    assert error.keys() - {"param"} == {"code", "message", "retryable", "request_id"}
    assert error["code"] == code
    assert error.get("param") == param
    assert words in error["message"]
    assert len(error["message"]) < 400
    assert error["request_id"] == response.headers["x-request-id"]
    assert error["retryable"] is (status in (429, 503))


BIG = ["2147483648", "9223372036854775808"]
NOT_NUMBERS = ["NaN", "Infinity", "-Infinity", "1e309", '"1"', "true", "[]", "{}"]
# field, value, what the message says beside the field's name
NUMBERS = [
    *[("max_tokens", value, "an integer from 1 to 2147483647") for value in ["-1", "0", *BIG, "1.5", *NOT_NUMBERS]],
    *[("temperature", value, "a number from 0.0 to 100.0") for value in ["-0.001", "100.1", "1e308", *NOT_NUMBERS]],
    *[("top_p", value, "a number above 0.0 and at most 1.0") for value in ["-1", "0", "1.01", *NOT_NUMBERS]],
    *[("min_p", value, "a number from 0.0 to 1.0") for value in ["-1", "1.01", *NOT_NUMBERS]],
    *[("top_k", value, "an integer from 0 to 2147483647") for value in ["-1", "2147483648", "0.5", *NOT_NUMBERS]],
    *[("seed", value, "an integer from 0 to 9223372036854775807") for value in ["-1", BIG[1], "0.5", *NOT_NUMBERS]],
    *[("min_tokens", value, "an integer from 0 to 2147483647") for value in ["-1", "2147483648", *NOT_NUMBERS]],
    *[("priority", value, "an integer from -1 to 1") for value in ["-2", "2", *NOT_NUMBERS]],
    *[("deadline_ms", value, "an integer from 1 to 86400000") for value in ["-1", "0", "86400001", *NOT_NUMBERS]],
    *[("stream", value, "true or false") for value in ["0", "1", '"true"', "NaN"]],
    *[("ignore_eos", value, "true or false") for value in ["0", '"no"']],
]  # fmt: skip


# One application for the table: an input that broke it would be seen by the next.
async def test_every_number_out_of_bounds_is_refused_by_name_with_its_bounds() -> None:
    async with rig() as gateway:
        for field, value, words in NUMBERS:
            response = await gateway.client.post("/generate", content=body(**{field: value}), headers=JSON)
            check_error(response, 400, "bad_request", field, words)
        assert gateway.worker.requests == []
        assert gateway.telemetry.refusals == ["bad_request"] * len(NUMBERS)


CONTENT = "messages[0].content"
NOT_YET = "not supported yet"
# name, body, param, words
BODIES: list[tuple[str, str | bytes, str | None, str]] = [
    ("no body", "", None, "not JSON"),
    ("no JSON", "prompt=Hello", None, "not JSON"),
    ("no end", '{"prompt": "Hello"', None, "not JSON"),
    ("two values", '{"prompt": "Hello"} {}', None, "not JSON"),
    ("comment", '{"prompt": "Hello" /* */}', None, "not JSON"),
    ("an array", "[]", None, "must be a JSON object"),
    ("a string", '"Hello"', None, "must be a JSON object"),
    ("null", "null", None, "must be a JSON object"),
    ("byte order mark", "\ufeff{}", None, "not JSON"),
    ("not UTF-8", b'{"prompt": "\xff"}', None, "not UTF-8"),
    ("UTF-16", body().encode("utf-16"), None, "not"),
    ("half a surrogate pair", body(prompt='"\\ud800"'), None, "surrogate"),
    ("half a pair in a key", body(**{"\\udfff": "1"}), None, "surrogate"),
    ("nested arrays", body(stop="[" * 10_000 + "]" * 10_000), None, "nested too deeply"),
    ("nested objects", '{"a":' * 10_000 + "1" + "}" * 10_000, None, "nested too deeply"),
    ("a key twice", '{"prompt": "a", "prompt": "b"}', "prompt", "given twice"),
    ("an inner key twice", body(logit_bias='{"1": 1, "1": 2}'), "1", "given twice"),
    ("too many members", body(**{f"f{i}": "1" for i in range(100)}), None, "at most 64"),
    ("a million members", "{" + ",".join(f'"{i}":1' for i in range(90_000)) + "}", None, "at most 64"),
    ("endless integer", body(max_tokens=HUGE), None, "too many digits"),
    ("endless exponent", body(temperature="1e" + "9" * 400), "temperature", "number from"),
    ("unknown field", body(max_token="1"), "max_token", "unknown field: 'max_token'"),
    ("unknown fields", body(a="1", b="2"), "a", "unknown fields: 'a', 'b'"),
    ("no prompt", "{}", "prompt", "there is no prompt"),
    ("only nulls", '{"prompt": null, "messages": null}', "prompt", "there is no prompt"),
    ("two prompts", body(input_ids="[1]"), "input_ids", "prompt and input_ids are both given"),
    ("empty prompt", body(prompt='""'), "prompt", "at least one token"),
    ("prompt as array", body(prompt='["a"]'), "prompt", "must be a string"),
    ("model as number", body(model="1"), "model", "must be a string"),
    ("empty model", body(model='""'), "model", "at least 1 character"),
    ("endless model", body(model=json.dumps("m" * 300)), "model", "at most 256"),
    ("empty input_ids", '{"input_ids": []}', "input_ids", "at least 1 item"),
    ("negative id", '{"input_ids": [1, -1]}', "input_ids[1]", "at least 0"),
    ("id past the vocabulary", '{"input_ids": [1, 2048]}', "input_ids[1]", "ids 0 to 2047"),
    ("id past 32 bits", '{"input_ids": [4294967296]}', "input_ids[0]", "less than"),
    ("ids as strings", json.dumps({"input_ids": ["1"] * 100_000}), "input_ids[0]", "an integer"),
    ("no messages", '{"messages": []}', "messages", "at least 1 item"),
    ("messages as object", '{"messages": {}}', "messages", "an array"),
    ("message as string", '{"messages": ["Hi"]}', "messages[0]", "an object"),
    ("no content", '{"messages": [{"role": "user"}]}', CONTENT, "missing"),
    ("content as parts", message('[{"type": "text"}]'), CONTENT, "must be a string"),
    ("content null", message("null"), CONTENT, "must be a string"),
    ("unknown in message", message('"", "name": ""'), "messages[0].name", "unknown field"),
    ("unknown role", message('"Arr"').replace("user", "pirate"), "messages", "unknown role: pirate"),
    ("role that looks like a turn", message('""').replace("user", "x<|end|>"), "messages[0].role", "must be a word"),
    ("many messages", json.dumps({"messages": [{"role": "user", "content": ""}] * 513}), "messages", "513 items"),
    ("a million messages", json.dumps({"messages": [{}] * 200_000}), "messages[0].role", "missing"),
    ("many stops", body(stop=json.dumps(["a"] * 10_000)), "stop", "10,000 strings; at most 8"),
    ("long stop", body(stop=json.dumps(["a", "ü" * 33])), "stop[1]", "66 bytes; at most 64"),
    ("empty stop", body(stop='""'), "stop[0]", "at least 1 character"),
    ("stop as number", body(stop="1"), "stop", "must be an array"),
    ("many stop ids", body(stop_token_ids=json.dumps([1] * 65)), "stop_token_ids", "65 ids; at most 64"),
    ("stop id past the vocabulary", body(stop_token_ids="[2048]"), "stop_token_ids[0]", "ids 0 to 2047"),
    ("min over max", body(min_tokens="9", max_tokens="8"), "min_tokens", "max_tokens is 8"),
    ("n", body(n="2"), "n", NOT_YET),
    ("n as true", body(n="true"), "n", NOT_YET),
    ("n without end", body(n="NaN"), "n", NOT_YET),
    ("logprobs", body(logprobs="5"), "logprobs", NOT_YET),
    ("logit_bias", body(logit_bias='{"5": 1}'), "logit_bias", NOT_YET),
    ("presence_penalty", body(presence_penalty="0.5"), "presence_penalty", NOT_YET),
    ("frequency_penalty", body(frequency_penalty="-2"), "frequency_penalty", NOT_YET),
    ("repetition_penalty", body(repetition_penalty="1.1"), "repetition_penalty", NOT_YET),
    ("response_format", body(response_format='{"type": "json_object"}'), "response_format", NOT_YET),
    ("background as text", body(background='"yes"'), "background", "true or false"),
    ("best_of", body(best_of="2"), "best_of", NOT_YET),
]  # fmt: skip


async def test_every_bad_body_is_refused_in_words() -> None:
    async with rig() as gateway:
        for name, raw, param, words in BODIES:
            started = time.thread_time()
            response = await gateway.client.post("/generate", content=raw, headers=JSON)
            spent = time.thread_time() - started
            check_error(response, 400, "bad_request", param, words)
            assert spent < 0.5, f"{name} took {spent:.3f} s of CPU"


@pytest.mark.parametrize("name", ["gpt", "../../etc/passwd", "millpond@", "\n"])
async def test_an_unknown_model_is_a_404_that_lists_what_is_served(name: str) -> None:
    async with rig() as gateway:
        response = await ask(gateway, prompt="Hello", model=name)
        check_error(response, 404, "unknown_model", "model", "served: millpond@0123456789ab")


async def test_fields_that_ask_for_nothing_are_accepted() -> None:
    neutral = {
        "n": 1, "best_of": 1, "logprobs": False, "top_logprobs": 0, "presence_penalty": 0, "frequency_penalty": 0.0,
        "repetition_penalty": 1, "logit_bias": {}, "response_format": {"type": "text"},
        "seed": None,
    }  # fmt: skip
    async with rig() as gateway:
        response = await gateway.client.post("/generate", json={"prompt": "Hello", **neutral})
        assert response.status_code == 200


async def ask(gateway: Rig, **fields: object) -> httpx.Response:
    return await gateway.client.post("/generate", json=fields)


async def test_a_request_that_does_not_fit_the_context_is_told_by_how_much() -> None:
    async with rig() as gateway:
        full = await ask(gateway, input_ids=[70] * CONTEXT)
        check_error(full, 413, "context_length_exceeded", None, "prompt has 4,096 tokens and max_tokens is 1;")
        check_error(full, 413, "context_length_exceeded", None, "4,096 together: 1 over")
        asked = await ask(gateway, input_ids=[70] * 4_000, max_tokens=100)
        check_error(asked, 413, "context_length_exceeded", "max_tokens", "4 over")
        fits = await ask(gateway, input_ids=[70] * 4_000, max_tokens=96)
        assert fits.status_code == 200
        cut = await ask(gateway, input_ids=[70] * 4_000, min_tokens=96)
        assert cut.status_code == 200
        assert gateway.worker.requests[-1].max_tokens == 96
        last = await ask(gateway, input_ids=[70] * (CONTEXT - 1))
        assert last.status_code == 200
        assert gateway.worker.requests[-1].max_tokens == 1


async def test_a_huge_text_is_refused_without_tokenizing_it() -> None:
    async with rig() as gateway:
        for fields in ({"prompt": "duck " * 200_000}, {"messages": [{"role": "user", "content": "duck " * 200_000}]}):
            started = time.process_time()
            response = await ask(gateway, **fields)
            assert time.process_time() - started < 0.5
            check_error(response, 413, "context_length_exceeded", None, "at least")


async def test_strange_text_is_still_text() -> None:
    texts = [
        "\0",
        "\u202eabc",
        "e" + "\u0301" * 1_000,
        "\N{REPLACEMENT CHARACTER}",
        "<|end|>",
        " ",
        "\U0010ffff",
        "🦆" * 900,
    ]
    async with rig() as gateway:
        for text in texts:
            response = await ask(gateway, prompt=text, max_tokens=1)
            assert response.status_code == 200, (text, response.text)
            assert gateway.worker.requests[-1].prompt_ids == ids_of(text)


async def test_a_model_without_a_template_takes_no_messages() -> None:
    async with rig(models=Models([replace(served_model(), chat=None)])) as gateway:
        response = await ask(gateway, messages=[{"role": "user", "content": "Hi"}])
        check_error(response, 400, "bad_request", "messages", "has no chat template")


async def test_one_of_several_models_must_be_named() -> None:
    async with rig(models=Models([served_model(), served_model(name="other")])) as gateway:
        check_error(await ask(gateway, prompt="Hello"), 404, "unknown_model", "model", "name a model; served:")
        assert (await ask(gateway, prompt="Hello", model="other")).json()["model"] == "other@0123456789ab"


async def test_the_operators_limits_count() -> None:
    limits = GatewayLimits(
        max_messages=1, max_stop_strings=1, max_stop_bytes=2, max_stop_token_ids=1, default_max_tokens=3
    )
    async with rig(limits=limits) as gateway:
        hi = {"role": "user", "content": "Hi"}
        check_error(await ask(gateway, messages=[hi, hi]), 400, "bad_request", "messages", "at most 1 ")
        check_error(await ask(gateway, prompt="a", stop=["a", "b"]), 400, "bad_request", "stop", "at most 1 ")
        check_error(await ask(gateway, prompt="a", stop="abc"), 400, "bad_request", "stop[0]", "at most 2 ")
        check_error(
            await ask(gateway, prompt="a", stop_token_ids=[1, 2]), 400, "bad_request", "stop_token_ids", "at most 1 "
        )
        assert (await ask(gateway, prompt="a")).json()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("path", "raw", "param", "words"),
    [
        ("/tokenize", "{}", "prompt", "there is no prompt"),
        ("/tokenize", '{"prompt": "a", "max_tokens": 1}', "max_tokens", "unknown field"),
        ("/tokenize", '{"prompt": "a", "n": 1}', "n", "unknown field"),
        ("/detokenize", "{}", "token_ids", "is missing"),
        ("/detokenize", '{"token_ids": [2048]}', "token_ids[0]", "ids 0 to 2047"),
        ("/detokenize", '{"token_ids": ["1"]}', "token_ids[0]", "must be an integer"),
        ("/detokenize", '{"token_ids": [NaN]}', "token_ids[0]", "must be an integer"),
    ],
)
async def test_the_tokenizer_routes_refuse_in_the_same_words(path: str, raw: str, param: str, words: str) -> None:
    async with rig() as gateway:
        response = await gateway.client.post(path, content=raw, headers=JSON)
        check_error(response, 400, "bad_request", param, words)


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "param", "words"),
    [
        ("GET", "/streams/gen-nobody", 404, "unknown_request", None, "never accepted"),
        ("GET", "/requests/gen-nobody", 404, "unknown_request", None, "never accepted"),
        ("DELETE", "/requests/gen-nobody", 404, "unknown_request", None, "never accepted"),
        ("GET", "/streams/gen-nobody?from=-1", 400, "bad_request", "from", "greater than or equal to 0"),
        ("GET", "/streams/gen-nobody?from=NaN", 400, "bad_request", "from", "integer"),
        ("GET", "/streams/gen-nobody?from=9223372036854775808", 400, "bad_request", "from", "less than"),
        ("GET", "/streams/" + "x" * 200, 400, "bad_request", "request_id", "128"),
        ("GET", "/requests/..%2f..%2fetc", 404, "not_found", None, "no such route"),
        ("GET", "/generate", 405, "bad_request", None, "does not answer that method"),
        ("POST", "/livez", 405, "bad_request", None, "does not answer that method"),
        ("GET", "/nowhere", 404, "not_found", None, "no such route"),
        ("GET", "/docs", 404, "not_found", None, "no such route"),
        ("GET", "/generate/stream", 404, "not_found", None, "no such route"),
    ],
)
async def test_bad_paths_and_methods(
    method: str, path: str, status: int, code: str, param: str | None, words: str
) -> None:
    async with rig() as gateway:
        check_error(await gateway.client.request(method, path), status, code, param, words)


async def test_a_bad_last_event_id_is_refused() -> None:
    async with rig() as gateway:
        for value in ("-1", "x", "1.5", "9223372036854775808"):
            response = await gateway.client.get("/streams/gen-1", headers={"Last-Event-ID": value})
            check_error(response, 400, "bad_request", "last-event-id", "")

"""What a token's way through gateway, Redis and worker costs: `python -m bench.path [--redis-url URL] [--json]`.

Starts `millrace up` (one process), and `millrace gateway` with `millrace worker` (over Redis), both on the shipped
model, and streams the same requests from each in turn, round after round, with one client. The difference between the
gaps from token to token is what the separate path adds. Redis must run already; the shipped model must be in the store.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
START_S = 120.0
PROMPT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Round:
    """Times of one round's streams, in s."""

    elapsed: float
    first: list[float]  # from sending a request to its first token
    gaps: list[float]  # from one event with tokens to the next of the same stream


@contextlib.contextmanager
def running(commands: Sequence[str], redis_url: str) -> Iterator[int]:
    """Processes of `millrace`, ready; the port of the first."""
    processes: list[subprocess.Popen[bytes]] = []
    ports = [_free_port() for _ in commands]
    try:
        for command, port in zip(commands, ports, strict=True):
            settings = {"PORT": str(port), "REDIS_URL": redis_url, "LOG_LEVEL": "warning"}
            environment = {**os.environ, **{f"MILLRACE_{name}": value for name, value in settings.items()}}
            arguments = [sys.executable, "-m", "services.cli", command]
            processes.append(subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL))
        for process, port in zip(processes, ports, strict=True):
            _await_ready(process, port)
        yield ports[0]
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(30)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _await_ready(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5).close()
            return
        if process.poll() is not None:
            raise SystemExit(f"a process ended with code {process.returncode} before it was ready; see above")
        if time.monotonic() > deadline:
            raise SystemExit(f"a process was not ready within {START_S:.0f} s")
        time.sleep(0.1)


async def run_round(port: int, streams: int, tokens: int) -> Round:
    """`streams` requests at once, each to its last token."""
    start = time.perf_counter()
    times = await asyncio.gather(*(_stream(port, number, tokens) for number in range(streams)))
    elapsed = time.perf_counter() - start
    gaps = [later - earlier for each in times for earlier, later in pairwise(each[1:])]
    return Round(elapsed, [each[1] - each[0] for each in times], gaps)


async def _stream(port: int, number: int, tokens: int) -> list[float]:
    """When the request was sent and when each event with tokens came."""
    prompt = [100 + (number * 37 + position) % 1000 for position in range(PROMPT_TOKENS)]
    fields = {"input_ids": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True}
    body = json.dumps(fields).encode()
    head = (
        f"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    times = [time.perf_counter()]
    writer.write(f"{head}\r\nConnection: close\r\n\r\n".encode() + body)
    seen = 0
    async for line in reader:
        if line.startswith(b"data: "):
            ids = json.loads(line[6:]).get("token_ids") or ()
            if ids:
                times.append(time.perf_counter())
                seen += len(ids)
    writer.close()
    if seen != tokens:
        raise SystemExit(f"a stream had {seen} tokens, {tokens} were asked for")
    return times


def figures(rounds: Sequence[Round], streams: int, tokens: int) -> dict[str, list[float]]:
    """[median, smallest, largest] of the rounds' figures."""

    def of_rounds(values: Sequence[float], digits: int) -> list[float]:
        return [round(value, digits) for value in (median(values), min(values), max(values))]

    def percentile(name: str, share: float) -> list[float]:
        return of_rounds([1000 * float(np.percentile(getattr(each, name), share)) for each in rounds], 3)

    return {
        "tokens_per_s": of_rounds([streams * tokens / each.elapsed for each in rounds], 1),
        "first_token_ms_p50": percentile("first", 50),
        "first_token_ms_p99": percentile("first", 99),
        "gap_ms_p50": percentile("gaps", 50),
        "gap_ms_p99": percentile("gaps", 99),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.path", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--redis-url", default="redis://127.0.0.1:6379/0")
    parser.add_argument("--streams", default="1,8", help="how many at once, comma separated")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    counts = [int(part) for part in options.streams.split(",")]
    paths = {"one process": ("up",), "gateway, Redis, worker": ("gateway", "worker")}
    results: list[dict[str, object]] = []
    with contextlib.ExitStack() as stack:
        ports = {name: stack.enter_context(running(commands, options.redis_url)) for name, commands in paths.items()}
        for count in counts:
            rounds: dict[str, list[Round]] = {name: [] for name in paths}
            for number in range(options.rounds + 1):
                for name, port in ports.items():
                    found = asyncio.run(run_round(port, count, options.tokens))
                    if number:  # the first warms up
                        rounds[name].append(found)
            for name, some in rounds.items():
                results.append({"path": name, "streams": count} | figures(some, count, options.tokens))
    if options.json:
        print(json.dumps(results))
        return 0
    for row in results:
        print(f"{row['path']}, {row['streams']} streams: median (smallest-largest) of {options.rounds} rounds")
        for name, value in row.items():
            if isinstance(value, list):
                print(f"  {name:<20} {value[0]:>10,} ({value[1]:,}-{value[2]:,})")
    return 0


if __name__ == "__main__":
    sys.exit(main())

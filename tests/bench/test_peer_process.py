"""The other process is asked, ended when it hangs, and started again. Real processes; small programs play the peer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from bench.gpu.peer_process import PeerError, PeerProcess

PROGRAM = """
import json, sys, time
for line in sys.stdin:
    command = json.loads(line)
    if command["do"] == "hang":
        time.sleep(60)
    if command["do"] == "die":
        sys.exit(3)
    if command["do"] == "reference":
        import numpy as np
        with np.load(command["prompts"]) as prompts:
            np.savez(command["out"], **{name: np.eye(9, dtype=np.float32)[prompts[name]] for name in prompts.files})
    answer = {"error": "Traceback: refused"} if command["do"] == "fail" else {"heard": command}
    print(json.dumps(answer), flush=True)
"""


@contextmanager
def _peer() -> Iterator[PeerProcess]:
    peer = PeerProcess("cpu", (sys.executable, "-c", PROGRAM))
    try:
        yield peer
    finally:
        peer.close()


def test_answers_come_in_order_and_errors_are_raised() -> None:
    with _peer() as peer:
        assert peer.ask(20, do="first", number=1) == {"heard": {"do": "first", "number": 1}}
        with pytest.raises(PeerError, match="Traceback: refused"):
            peer.ask(20, do="fail")
        assert peer.ask(20, do="second") == {"heard": {"do": "second"}}


def test_one_that_hangs_is_ended_and_the_next_command_gets_its_own_answer() -> None:
    with _peer() as peer:
        with pytest.raises(TimeoutError, match="within 1 s"):
            peer.ask(1, do="hang")
        assert peer.ask(20, do="after") == {"heard": {"do": "after"}}


def test_one_that_dies_says_with_which_code_and_is_started_again() -> None:
    with _peer() as peer:
        with pytest.raises(PeerError, match="ended with code 3"):
            peer.ask(20, do="die")
        assert peer.ask(20, do="after") == {"heard": {"do": "after"}}


def test_a_program_that_cannot_run_is_an_error_and_not_a_wait() -> None:
    peer = PeerProcess("cpu", (sys.executable, "-c", "raise SystemExit(5)"))
    with pytest.raises(PeerError, match="ended with code 5"):
        peer.ask(20, do="first")
    peer.close()


def test_prompts_and_logits_keep_their_order(tmp_path: Path) -> None:
    prompts = [np.array(ids, np.int64) for ids in ([3], [1, 2], [8, 0, 4])]
    with _peer() as peer:
        logits = peer.reference(tmp_path, prompts, timeout_s=20)
    assert [each.argmax(axis=-1).tolist() for each in logits] == [[3], [1, 2], [8, 0, 4]]
    assert {each.dtype for each in logits} == {np.dtype(np.float32)}

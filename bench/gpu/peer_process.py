"""The peer's process as this one sees it: started early, asked with a limit of time, ended when it hangs."""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bench.gpu.peer_terms import CONFIGURATIONS, ratio, speed
from bench.gpu.run import Results, Run
from bench.random_model import SHAPES

ROOT: Final = Path(__file__).resolve().parents[2]
CONFIGURATION_S: Final = 45.0  # the longest that one may take


class PeerError(Exception):
    """The peer could not do what it was asked; the text is the end of its traceback."""


class PeerProcess:
    """Starts at once, so that its imports run beside the first steps. Commands are answered in order."""

    def __init__(self, device: str, command: Sequence[str] = (sys.executable, "-m", "bench.gpu.peer")) -> None:
        self._device = device
        self._command = command
        self._start()

    def ask(self, timeout_s: float, **command: object) -> Results:
        """The answer. Raises PeerError, TimeoutError after `timeout_s`; a new process is then started."""
        if self._process.poll() is not None:
            self._start()
        pipe, answers = self._process.stdin, self._answers
        if pipe is None:
            raise PeerError("the peer has no standard input: this is a bug")
        try:
            pipe.write(json.dumps(command) + "\n")
            pipe.flush()
            answer = answers.get(timeout=max(timeout_s, 0.0))
        except queue.Empty:
            self.close()
            self._start()
            raise TimeoutError(f"the peer did not answer within {timeout_s:.0f} s and was ended") from None
        except BrokenPipeError:
            answer = None
        if answer is None:
            self.close()
            raise PeerError(f"the peer's process ended with code {self._process.returncode}")
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def reference(
        self, checkpoint: Path, prompts: Sequence[NDArray[np.int64]], *, timeout_s: float
    ) -> list[NDArray[np.float32]]:
        """Logits [T, V] of `prompts` by transformers in float32 (a model_store.parity.Reference)."""
        return ask_reference(
            checkpoint, prompts, lambda **files: self.ask(timeout_s, do="reference", device=self._device, **files)
        )

    def generate(self, checkpoint: Path, timeout_s: float, **settings: object) -> Results:
        """One configuration's figures: see bench/gpu/peer.py."""
        return self.ask(timeout_s, do="generate", checkpoint=str(checkpoint), device=self._device, **settings)

    def close(self) -> None:
        """End the process, and with it all it holds on the device."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what was not written goes nowhere
                if pipe:
                    pipe.close()

    def _start(self) -> None:
        self._answers: queue.Queue[Results | None] = queue.Queue()
        self._process = subprocess.Popen(
            self._command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        threading.Thread(target=_read, args=(self._process, self._answers), daemon=True).start()


def _read(process: subprocess.Popen[str], answers: queue.Queue[Results | None]) -> None:
    with contextlib.suppress(ValueError):  # the pipe was closed
        for line in process.stdout or ():
            answers.put(json.loads(line))
    answers.put(None)


def ask_reference(
    checkpoint: Path, prompts: Sequence[NDArray[np.int64]], ask: Callable[..., object]
) -> list[NDArray[np.float32]]:
    """Logits by way of files beside the checkpoint: too large for a line. `ask` is Peer.reference or what calls it."""
    asked, given = checkpoint / "prompts.npz", checkpoint / "logits.npz"
    named = {f"prompt-{index}": prompt for index, prompt in enumerate(prompts)}
    with asked.open("wb") as file:
        np.savez(file, allow_pickle=False, **named)
    ask(checkpoint=str(checkpoint), prompts=str(asked), out=str(given))
    with np.load(given) as stored:
        return [stored[name] for name in named]


def compare(run: Run, peer: PeerProcess, source: Path, model: Results, options: argparse.Namespace) -> Results:
    """Every configuration that fits the budget, and the name of the best continuous one. Raises PeerError if none ran.

    `model` is where the engine's rows are: the ratio is to the row of the same concurrency.
    """
    found: Results = {}
    for name in CONFIGURATIONS:
        limit_s = min(CONFIGURATION_S, run.left_s())
        if limit_s < 5:
            run.note(f"transformers {name}: left out, {limit_s:.0f} s of the budget were left")
            continue
        try:
            found[name] = peer.generate(
                source,
                limit_s,
                configuration=name,
                vocab_size=SHAPES[source.name]["vocab_size"],
                prompt_tokens=options.prompt_tokens,
                new_tokens=options.new_tokens,
                count=options.peer_concurrency,
                rounds=options.peer_rounds,
            )
        except (PeerError, TimeoutError) as error:
            found[name] = {"error": str(error)[-1500:]}
        print(f"         transformers {name}: {_said(found[name])}", flush=True)
    with contextlib.suppress(PeerError, TimeoutError):
        peer.ask(10, do="release")
    if not any("passes" in figures for figures in found.values()):
        raise PeerError("; ".join(f"{name}: {figures['error'][-300:]}" for name, figures in found.items()) or "no time")
    return {"configurations": found} | ratio(found, model, options.peer_concurrency)


def _said(figures: Mapping[str, Any]) -> str:
    return f"{speed(figures):,.0f} tokens/s" if "passes" in figures else f"failed: {figures['error'][-200:]}"

"""`python -m tests.faults.worker`: the real `millrace worker`, whose backend breaks on command.

SIGUSR1: the next step never returns, while the process lives on. A batch in which a prompt begins with POISON kills
the process, as a bug in a native kernel would.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable

import numpy as np

from batcher.backend import ModelInput, SamplingInput, StepOutput
from services.backends.onnxruntime import OnnxRuntimeBackend
from services.cli import main

POISON = (7, 77, 7, 777, 7)

Forward = Callable[..., StepOutput]


def broken(forward: Forward, is_hung: threading.Event) -> Forward:
    """`forward` with the two faults."""

    def hooked(
        backend: OnnxRuntimeBackend, batch: ModelInput, sampling: SamplingInput, *, keeps_logits: bool = False
    ) -> StepOutput:
        if is_hung.is_set():
            threading.Event().wait()
        if is_poisoned(batch):
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(backend, batch, sampling, keeps_logits=keeps_logits)

    return hooked


def is_poisoned(batch: ModelInput) -> bool:
    """Whether some sequence that starts in this step starts with POISON."""
    starts = np.flatnonzero(batch.positions == 0)
    return any(tuple(batch.input_ids[start : start + len(POISON)].tolist()) == POISON for start in starts)


if __name__ == "__main__":
    hang = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: hang.set())
    OnnxRuntimeBackend.forward = broken(OnnxRuntimeBackend.forward, hang)  # type: ignore[method-assign]
    sys.exit(main())

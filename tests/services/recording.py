"""A backend that keeps every logits row it saw by (seed, position): with its own seed, a request's whole history."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from batcher.backend import Backend, BackendLimits, ModelInput, SamplingInput, StepOutput


class RecordingBackend:
    """Wraps a real backend; the same (seed, position) seen twice must have the same bits."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.rows: dict[tuple[int, int], NDArray[np.float32]] = {}
        self.largest_batch = 0

    @property
    def limits(self) -> BackendLimits:
        return self._backend.limits

    def forward(self, batch: ModelInput, sampling: SamplingInput, *, keeps_logits: bool = False) -> StepOutput:
        output = self._backend.forward(batch, sampling, keeps_logits=True)
        self.largest_batch = max(self.largest_batch, len(batch.past_lens))
        for row, key in enumerate(zip(sampling.seed.tolist(), sampling.position.tolist(), strict=True)):
            logits = output.logits[row].copy()
            if key in self.rows and self.rows[key].tobytes() != logits.tobytes():
                raise AssertionError(f"logits of {key} changed between two computations")
            self.rows[key] = logits
        return output

    def close(self) -> None:
        self._backend.close()

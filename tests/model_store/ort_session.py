"""Run an artifact with ONNX Runtime, without the engine: what the tests of this room compare with the checkpoint.

Sequences go into one packed step, or into several (chunks); their KV blocks are interleaved in the pool, so that a
graph that mixes up blocks, rows or positions gives wrong logits here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from kernels.loader import library_path
from model_store.manifest import GRAPH_FILE, ModelManifest

TokenIds = NDArray[np.int64]
Logits = NDArray[np.float32]


@dataclass(slots=True)
class Session:
    """An open artifact. Every call starts from an empty cache."""

    runtime: ort.InferenceSession
    manifest: ModelManifest
    token_ids: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # of the last step

    def __call__(self, token_ids: TokenIds) -> Logits:
        """Logits [T, V] of one sequence, in one step."""
        return self.batch([token_ids])[0]

    def batch(self, sequences: Sequence[TokenIds], chunk: int | None = None) -> list[Logits]:
        """Logits [T, V] of each sequence, all in the same steps of at most `chunk` tokens a sequence."""
        block_size = self.manifest.kv_cache.block_size
        blocks = max(-(-len(sequence) // block_size) for sequence in sequences)
        # Block b of sequence s is b * S + s: neighbours in the pool belong to different sequences.
        table = np.arange(blocks, dtype=np.int32) * len(sequences) + np.arange(len(sequences), dtype=np.int32)[:, None]
        pool = self._pool(blocks * len(sequences))
        logits: list[list[Logits]] = [[] for _ in sequences]
        done = [0] * len(sequences)
        while active := [i for i, sequence in enumerate(sequences) if done[i] < len(sequence)]:
            steps = [sequences[i][done[i] :][:chunk] for i in active]
            rows = self._step(pool, table[active], steps, [done[i] for i in active])
            ends = np.cumsum([len(step) for step in steps])[:-1]
            for i, step, given in zip(active, steps, np.split(rows, ends), strict=True):
                logits[i].append(given)
                done[i] += len(step)
        return [np.concatenate(parts) for parts in logits]

    def _pool(self, num_blocks: int) -> ort.OrtValue:
        kv = self.manifest.kv_cache
        shape = (self.manifest.geometry.num_layers, 2, num_blocks, *kv.block_shape)
        return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, kv.dtype))

    def _step(
        self, pool: ort.OrtValue, table: NDArray[np.int32], steps: Sequence[TokenIds], done: Sequence[int]
    ) -> Logits:
        """One step with logits for every token: [T, V]."""
        block_size = self.manifest.kv_cache.block_size
        positions = [np.arange(start, start + len(step)) for start, step in zip(done, steps, strict=True)]
        slots = [table[i][where // block_size] * block_size + where % block_size for i, where in enumerate(positions)]
        count = sum(len(step) for step in steps)
        inputs: dict[str, NDArray[np.generic]] = {
            "input_ids": np.concatenate(steps).astype(np.int64),
            "positions": np.concatenate(positions).astype(np.int64),
            "cu_seqlens": np.cumsum([0, *(len(step) for step in steps)]).astype(np.int32),
            "past_lens": np.array(done, np.int32),
            "block_table": table,
            "slot_mapping": np.concatenate(slots).astype(np.int32),
            "logits_rows": np.arange(count, dtype=np.int32),
            "temperature": np.zeros(count, np.float32),
            "top_k": np.zeros(count, np.int32),
            "top_p": np.ones(count, np.float32),
            "min_p": np.zeros(count, np.float32),
            "seed": np.zeros(count, np.int64),
            "sample_position": np.concatenate(positions).astype(np.int64) + 1,
        }
        binding = self.runtime.io_binding()
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        binding.bind_ortvalue_input("kv_cache", pool)
        binding.bind_output("token_ids")
        binding.bind_output("logits")
        self.runtime.run_with_iobinding(binding)
        outputs: list[Any] = binding.copy_outputs_to_cpu()
        self.token_ids = outputs[0]
        logits: Logits = outputs[1]
        return logits


@contextmanager
def open_session(directory: Path, manifest: ModelManifest, threads: int = 1) -> Iterator[Session]:
    """A candidate factory (model_store/importing.py) over ONNX Runtime's CPU provider and our operators."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.register_custom_ops_library(str(library_path()))
    yield Session(
        ort.InferenceSession(str(directory / GRAPH_FILE), options, providers=["CPUExecutionProvider"]), manifest
    )

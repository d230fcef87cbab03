"""Run an artifact of target cuda without a GPU: ONNX's evaluator over what cuda_operators.py says the operators mean.

The same interface as ort_session.py. Sequences go into one packed step, or into several (chunks); their KV blocks are
interleaved in the pool, which begins as rubbish, so that a graph that mixes up blocks, rows or positions gives wrong
logits here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from model_store.importing import import_model
from model_store.manifest import GRAPH_FILE, ModelManifest
from model_store.spec import DecoderSpec
from model_store.store import Store
from tests.model_store.checkpoints import Case
from tests.model_store.cuda_operators import OPERATORS

TokenIds = NDArray[np.int64]
Logits = NDArray[np.float32]
Int32s = NDArray[np.int32]
Array = NDArray[Any]  # of a graph input's dtype

RUBBISH = 3.0  # what a pool holds before it is written


@dataclass(frozen=True, slots=True)
class Step:
    """What one step computes: the next tokens of some sequences."""

    tokens: Sequence[TokenIds]  # of each sequence
    past_lens: Sequence[int]
    block_table: Int32s  # [B, M]
    is_written: Sequence[bool] | None = None  # whether a sequence's keys and values go into the cache; None: all do

    def inputs(self, block_size: int) -> dict[str, Array]:
        """The graph's inputs but for the caches; every token's logits are wanted."""
        lengths = [len(tokens) for tokens in self.tokens]
        positions = [past + np.arange(length) for past, length in zip(self.past_lens, lengths, strict=True)]
        slots = [
            row[where // block_size] * block_size + where % block_size if written else np.full(len(where), -1)
            for row, where, written in zip(
                self.block_table, positions, self.is_written or [True] * len(lengths), strict=True
            )
        ]
        longest = max(past + length for past, length in zip(self.past_lens, lengths, strict=True))
        return {
            "input_ids": np.concatenate(self.tokens).astype(np.int64),
            "cu_seqlens": np.cumsum([0, *lengths]).astype(np.int32),
            "past_lens": np.array(self.past_lens, np.int32),
            "block_table": self.block_table,
            "slot_mapping": np.concatenate(slots).astype(np.int32),
            "logits_rows": np.arange(sum(lengths), dtype=np.int32),
            "attention_metadata": np.array([max(lengths), longest, longest], np.int32),
        }


@dataclass(frozen=True, slots=True)
class CudaSession:
    """An open artifact. Every call starts from a cache that nobody wrote."""

    evaluator: ReferenceEvaluator
    manifest: ModelManifest

    def __call__(self, token_ids: TokenIds) -> Logits:
        """Logits [T, V] of one sequence, in one step."""
        return self.batch([token_ids])[0]

    def batch(self, sequences: Sequence[TokenIds], chunk: int | None = None) -> list[Logits]:
        """Logits [T, V] of each sequence, all in the same steps of at most `chunk` tokens a sequence."""
        block_size = self.manifest.kv_cache.block_size
        blocks = max(-(-len(sequence) // block_size) for sequence in sequences)
        # Block b of sequence s is b * S + s: neighbours in the pool belong to different sequences.
        table = np.arange(blocks, dtype=np.int32) * len(sequences) + np.arange(len(sequences), dtype=np.int32)[:, None]
        caches = self.caches(blocks * len(sequences))
        logits: list[list[Logits]] = [[] for _ in sequences]
        done = [0] * len(sequences)
        while active := [i for i, sequence in enumerate(sequences) if done[i] < len(sequence)]:
            tokens = [sequences[i][done[i] :][:chunk] for i in active]
            rows = self.step(Step(tokens, [done[i] for i in active], table[active]), caches)
            ends = np.cumsum([len(part) for part in tokens])[:-1]
            for i, part, given in zip(active, tokens, np.split(rows, ends), strict=True):
                logits[i].append(given)
                done[i] += len(part)
        return [np.concatenate(parts) for parts in logits]

    def caches(self, num_blocks: int) -> dict[str, Array]:
        """A pool by the graph's input names."""
        kv = self.manifest.kv_cache
        names = [
            f"{kind}_cache.{layer}" for layer in range(self.manifest.geometry.num_layers) for kind in ("key", "value")
        ]
        return {name: np.full((num_blocks, *kv.block_shape), RUBBISH).astype(kv.dtype) for name in names}

    def step(self, step: Step, caches: dict[str, Array]) -> Logits:
        """Logits [T, V] of every token; writes `caches`."""
        inputs = step.inputs(self.manifest.kv_cache.block_size) | caches
        if set(inputs) != set(self.evaluator.input_names):
            raise ValueError(f"the graph's inputs are {self.evaluator.input_names}, given are {sorted(inputs)}")
        outputs: list[Any] = list(self.evaluator.run(["logits"], inputs))
        logits: Logits = outputs[0]
        return logits


@contextmanager
def open_cuda_session(directory: Path, manifest: ModelManifest) -> Iterator[CudaSession]:
    """A candidate factory (model_store/importing.py) for artifacts of target cuda."""
    model = onnx.load(str(directory / GRAPH_FILE))
    evaluator = ReferenceEvaluator(model, new_ops=OPERATORS, check_shape_annotations=True)
    yield CudaSession(evaluator, manifest)


def quiet(_: str, __: int, ___: int) -> None:
    """No progress."""


def some_text(vocab_size: int) -> list[TokenIds]:
    """What ranges are measured on: not the ids that parity is measured on."""
    random = np.random.default_rng(3)
    return [random.integers(0, vocab_size, 500, dtype=np.int64) for _ in range(2)]


@contextmanager
def imported(
    tmp_path: Path, case: Case, target: str, scheme: str, bound: float, spec: DecoderSpec | None = None
) -> Iterator[CudaSession]:
    """`case` as an artifact in tmp_path/store, open; with `spec`, what lies in tmp_path/source already."""
    spec = spec or case.write(tmp_path / "source")
    store = Store(tmp_path / "store")
    manifest = import_model(
        tmp_path / "source",
        store,
        "pond",
        scheme=scheme,
        target=target,
        candidate_factory=open_cuda_session,
        progress=quiet,
        parity_bound=bound,
        calibration_ids=some_text(spec.vocab_size),
    )
    with open_cuda_session(store.resolve("pond"), manifest) as session:
        yield session

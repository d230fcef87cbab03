"""All inputs of a step side by side in one piece of memory, so that one copy carries them to the device.

Pure layout: offsets for given extents, numpy views of a buffer, and filling them. A decode step of a bucket (a fixed
number of rows and of blocks a row) always has the same layout, which is what lets a CUDA graph replay it; rows that the
step does not use are padding: one token at position 0 that is written nowhere (slot -1) and sampled greedily.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from batcher.backend import BackendLimits, ModelInput, SamplingInput

Array = NDArray[Any]  # of the dtype that _shapes names
Bytes = NDArray[np.uint8]

ALIGNMENT: Final = 256  # bytes: what CUDA's own allocations have
NOT_WRITTEN: Final = -1  # a slot


@dataclass(frozen=True, slots=True)
class Extents:
    """How much a step computes: T tokens of B sequences, M blocks a row, R rows of logits."""

    tokens: int
    sequences: int
    blocks: int
    rows: int


@dataclass(frozen=True, slots=True)
class Field:
    """Where one input lies in the image."""

    offset: int
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def view(self, image: Bytes) -> Array:
        return image[self.offset : self.offset + self.num_bytes].view(self.dtype).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """The fields of an image by name, and its size."""

    fields: Mapping[str, Field]
    num_bytes: int

    def views(self, image: Bytes) -> dict[str, Array]:
        return {name: field.view(image) for name, field in self.fields.items()}


def _shapes(extents: Extents) -> dict[str, tuple[type[np.generic], tuple[int, ...]]]:
    tokens, sequences, rows = (extents.tokens,), (extents.sequences,), (extents.rows,)
    return {
        "input_ids": (np.int64, tokens),
        "cu_seqlens": (np.int32, (extents.sequences + 1,)),
        "past_lens": (np.int32, sequences),
        "block_table": (np.int32, (extents.sequences, extents.blocks)),
        "slot_mapping": (np.int32, tokens),
        "logits_rows": (np.int32, rows),
        "temperature": (np.float32, rows),
        "top_k": (np.int32, rows),
        "top_p": (np.float32, rows),
        "min_p": (np.float32, rows),
        "seed": (np.int64, rows),
        "position": (np.int64, rows),
    }


@lru_cache(maxsize=4096)
def layout(extents: Extents) -> Layout:
    """The image of a step of these extents."""
    fields, offset = {}, 0
    for name, (kind, shape) in _shapes(extents).items():
        fields[name] = Field(offset, np.dtype(kind), shape)
        offset += -(-fields[name].num_bytes // ALIGNMENT) * ALIGNMENT
    return Layout(fields, offset)


def extents_of(batch: ModelInput) -> Extents:
    """What this step computes, as it is."""
    sequences, blocks = batch.block_table.shape
    return Extents(len(batch.input_ids), sequences, blocks, len(batch.logits_rows))


def largest(limits: BackendLimits) -> Extents:
    """What no step exceeds."""
    blocks = -(-limits.max_model_len // limits.block_size)
    return Extents(limits.max_batch_tokens, limits.max_batch_seqs, blocks, limits.max_batch_seqs)


def fill(views: Mapping[str, Array], batch: ModelInput, sampling: SamplingInput) -> None:
    """Write a step into an image of its own extents."""
    for name in ("input_ids", "cu_seqlens", "past_lens", "block_table", "slot_mapping", "logits_rows"):
        views[name][...] = getattr(batch, name)
    for name in ("temperature", "top_k", "top_p", "min_p", "seed", "position"):
        views[name][...] = getattr(sampling, name)


def fill_decode(views: Mapping[str, Array], batch: ModelInput, sampling: SamplingInput) -> None:
    """Write a pure decode step (one token a sequence, each sampled) into the image of its bucket."""
    count = len(batch.input_ids)
    for name in ("input_ids", "past_lens", "slot_mapping"):
        views[name][:count] = getattr(batch, name)
    for name in ("temperature", "top_k", "top_p", "min_p", "seed", "position"):
        views[name][:count] = getattr(sampling, name)
    table = views["block_table"]
    table[:count, : batch.block_table.shape[1]] = batch.block_table[:, : table.shape[1]]
    pad(views, count)


def pad(views: Mapping[str, Array], count: int) -> None:
    """Make rows from `count` on padding; every row of a decode image is one token and one row of logits."""
    rows = len(views["past_lens"])
    views["cu_seqlens"][...] = np.arange(rows + 1)
    views["logits_rows"][...] = np.arange(rows)
    views["past_lens"][count:] = 0
    views["slot_mapping"][count:] = NOT_WRITTEN
    views["temperature"][count:] = 0
    views["block_table"][count:] = 0


def advance(views: Mapping[str, Array], token_ids: NDArray[np.int64]) -> None:
    """What the device's advance kernel does to a decode image: every row moves on to the token it has sampled.

    Padding rows stay where they are: their position must not leave their block.
    """
    moves = views["slot_mapping"] >= 0
    views["input_ids"][moves] = np.maximum(token_ids[moves], 0)
    for name in ("past_lens", "position", "slot_mapping"):
        views[name][moves] += 1

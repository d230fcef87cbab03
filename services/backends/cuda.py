"""The CUDA backend: the graph, sampling after it and the KV pool on one device, on one stream.

    pinned image ──copy──> inputs ─┬─ the graph (ONNX Runtime) ── logits ── sample ── token ids ──copy──> host
                                   └─ advance <──────────────────────────────┘

A step's inputs travel in one copy; nothing comes back but the token ids, and waiting for them is the only moment the
host waits. Pure decode steps are padded to a bucket (rows and blocks a row rounded up) and replayed as a CUDA graph.
While the batcher commits a step and plans the next, the device may already compute it: `advance` makes the next inputs
from the tokens on the device, and forward() takes that result if the batcher then asks for exactly these inputs.
Otherwise the result is dropped: what it wrote to the KV pool lies behind each sequence's end and is written again.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from batcher.backend import BackendError, BackendErrorKind, BackendLimits, ModelInput, SamplingInput, StepOutput
from model_store.manifest import ModelManifest
from services.backends.cuda_parts import CudaParts, StepRun, StepSession
from services.backends.cuda_session import Located
from services.backends.look_ahead import Patience
from services.backends.step_image import (
    Array,
    Bytes,
    Extents,
    Layout,
    advance,
    extents_of,
    fill,
    fill_decode,
    largest,
    layout,
    pad,
)

logger = logging.getLogger(__name__)

TOP_PARTS: Final = 16  # as sample.cu cuts a row
TOP_THREADS: Final = 256
SAMPLE_THREADS: Final = 512  # its registers do not allow 1024
ADVANCE_THREADS: Final = 256
_GRAPH_INPUTS: Final = ("input_ids", "cu_seqlens", "past_lens", "block_table", "slot_mapping", "logits_rows")
_SAMPLING_FIELDS: Final = ("temperature", "top_k", "top_p", "min_p", "seed", "position")
# Errors after which the device may be used again; any other leaves the context, or the device, lost.
_MEMORY_WORDS: Final = ("out of memory", "failed to allocate", "cublas error 3", "cuda error 2 ")


@dataclass(frozen=True, slots=True)
class Bucket:
    """Decode steps that share a graph: up to `rows` sequences of up to `blocks` blocks."""

    rows: int
    blocks: int


@dataclass(slots=True)
class _Decode:
    """A bucket in use."""

    layout: Layout
    run: StepRun
    replay: Callable[[], None] | None = None  # the captured graph: model and sampling


@dataclass(slots=True)
class _Answer:
    """Where a step's token ids arrive."""

    token_ids: NDArray[np.int64]  # pinned
    event: object


@dataclass(frozen=True, slots=True)
class _Ahead:
    """A step that runs although nobody has asked for it yet."""

    bucket: Bucket
    expected: Bytes  # the image that makes it the right one
    answer: _Answer


def round_up_to_power(value: int, most: int) -> int:
    """The least power of two that is not below `value`, at most `most`."""
    return min(1 << max(0, value - 1).bit_length(), most)


def _powers(most: int) -> list[int]:
    """1, 2, 4 ... and `most` itself."""
    return sorted({round_up_to_power(1 << shift, most) for shift in range(most.bit_length() + 1)})


class CudaBackend:
    """A Backend (batcher/backend.py) on one GPU. Not thread-safe: one engine thread owns it."""

    def __init__(
        self,
        parts: CudaParts,
        manifest: ModelManifest,
        limits: BackendLimits,
        *,
        use_graphs: bool = True,
        look_ahead: bool = True,
    ) -> None:
        """`look_ahead`: compute decode steps before they are asked for; logits can then not be read."""
        self._device = parts.device
        self._session: StepSession | None = parts.session
        self._parts = parts
        self._limits = limits
        self._use_graphs = use_graphs
        self._patience = Patience() if look_ahead else None
        self._ahead: _Ahead | None = None
        self._decodes: dict[Bucket, _Decode] = {}
        self._most = largest(limits)
        self._image = self._device.pinned(layout(self._most).num_bytes)
        self._inputs = self._device.allocate(layout(self._most).num_bytes)
        self._logits = self._device.allocate(limits.max_batch_seqs * limits.vocab_size * 4)
        self._tops = self._device.allocate(limits.max_batch_seqs * TOP_PARTS * 16)
        self._token_ids = self._device.allocate(limits.max_batch_seqs * 8)
        self._answers = tuple(self._new_answer() for _ in range(2))
        self._pool = self._device.allocate(manifest.geometry.num_layers * 2 * self._block_bytes(manifest))
        self._caches = dict(self._cache_inputs(manifest))
        self._general = self._new_run()
        self._metadata = np.zeros(3, np.int32)
        self._general.bind_host("attention_metadata", self._metadata)

    @property
    def limits(self) -> BackendLimits:
        return self._limits

    @property
    def is_ahead(self) -> bool:
        """Whether the device computes a step that nobody has asked for yet."""
        return self._ahead is not None

    def forward(self, batch: ModelInput, sampling: SamplingInput, *, keeps_logits: bool = False) -> StepOutput:
        """One step; see Backend.forward. Running out of device memory is CAPACITY, a lost device FATAL."""
        try:
            self._device.attach()
            bucket = self._bucket(batch)
            if bucket is None:
                return self._step(batch, sampling)
            return self._decode(bucket, batch, sampling, may_go_ahead=not keeps_logits)
        except BackendError:
            raise
        except Exception as error:  # ONNX Runtime's errors share no base class that its stubs name
            self._ahead = None
            raise BackendError(kind_of(error), str(error)) from error

    def prepare(self, blocks: int) -> None:
        """Capture the graphs of every number of rows, for sequences of up to `blocks` blocks, so that no request waits.

        Those of longer sequences are captured when the first such step has run.
        """
        self._device.attach()
        for columns in _powers(min(blocks, self._most.blocks)):
            for rows in _powers(self._most.rows):
                bucket = Bucket(rows, columns)
                decode = self._decodes.get(bucket) or self._open_bucket(bucket)
                image = self._image[: decode.layout.num_bytes]
                image[:] = 0
                views = decode.layout.views(image)
                pad(views, 0)
                views["past_lens"][:] = self._least_context(bucket)
                self._device.copy_in(self._inputs, image)
                self._launch_decode(decode, bucket)
                self._device.synchronize()
                if self._use_graphs and decode.replay is None:
                    self._capture(decode, bucket)

    def close(self) -> None:
        """Free the device memory, the session's included."""
        self._device.attach()
        self._device.synchronize()
        self._decodes.clear()
        del self._general
        self._session = None
        for address in (self._inputs, self._logits, self._tops, self._token_ids, self._pool):
            self._device.release(address)
        self._parts.close()

    # ---- any step, as it is ----

    def _step(self, batch: ModelInput, sampling: SamplingInput) -> StepOutput:
        extents = extents_of(batch)
        plan = layout(extents)
        image = self._image[: plan.num_bytes]
        fill(plan.views(image), batch, sampling)
        counts = np.diff(batch.cu_seqlens)
        self._metadata[:] = (counts.max(), (batch.past_lens + counts).max(), 0)
        self._device.copy_in(self._inputs, image)
        self._general.bind(self._located(plan), self._outputs(extents.rows))
        self._ahead = None
        self._general.run()
        return self._finish(plan, extents.rows)

    def _finish(self, plan: Layout, rows: int) -> StepOutput:
        answer = self._answers[0]
        if rows:
            self._launch_sample(plan, rows)
            self._fetch(answer, rows)
        else:
            self._device.record(answer.event)
        self._device.wait(answer.event)
        return StepOutput(answer.token_ids[:rows].copy(), lambda: self._read_logits(rows))

    # ---- decode steps, padded to a bucket ----

    def _bucket(self, batch: ModelInput) -> Bucket | None:
        """The bucket of a pure decode step."""
        extents = extents_of(batch)
        if not extents.tokens == extents.sequences == extents.rows:
            return None
        used = int(batch.past_lens.max()) // self._limits.block_size + 1
        return Bucket(round_up_to_power(extents.rows, self._most.rows), round_up_to_power(used, self._most.blocks))

    def _decode(self, bucket: Bucket, batch: ModelInput, sampling: SamplingInput, *, may_go_ahead: bool) -> StepOutput:
        decode = self._decodes.get(bucket) or self._open_bucket(bucket)
        image = self._image[: decode.layout.num_bytes]
        views = decode.layout.views(image)
        fill_decode(views, batch, sampling)
        answer = self._take_ahead(bucket, image)
        if answer is None:
            answer = self._answers[0]
            self._device.copy_in(self._inputs, image)
            self._launch_decode(decode, bucket)
            self._fetch(answer, bucket.rows)
        follower = self._start_ahead(decode, bucket, views, answer) if may_go_ahead else None
        self._device.wait(answer.event)
        token_ids = answer.token_ids[: bucket.rows].copy()
        if follower is not None:
            expected = image.copy()
            advance(decode.layout.views(expected), token_ids)
            self._ahead = _Ahead(bucket, expected, follower)
        elif self._use_graphs and decode.replay is None:
            self._capture(decode, bucket)
        rows = len(batch.input_ids)
        return StepOutput(token_ids[:rows], lambda: self._read_logits(rows))

    def _open_bucket(self, bucket: Bucket) -> _Decode:
        extents = Extents(bucket.rows, bucket.rows, bucket.blocks, bucket.rows)
        decode = _Decode(layout(extents), self._new_run())
        decode.run.bind(self._located(decode.layout), self._outputs(bucket.rows))
        # Bounds for every step of the bucket: one query token; the most and the least that its longest sequence holds.
        most, least = bucket.blocks * self._limits.block_size, self._least_context(bucket)
        decode.run.bind_host("attention_metadata", np.array([1, most, least + 1 if least else 0], np.int32))
        self._decodes[bucket] = decode
        return decode

    def _least_context(self, bucket: Bucket) -> int:
        """Tokens that the longest sequence of a step in this bucket has in the cache at least."""
        return bucket.blocks // 2 * self._limits.block_size if bucket.blocks > 1 else 0

    def _launch_decode(self, decode: _Decode, bucket: Bucket) -> None:
        if decode.replay is not None:
            decode.replay()
            return
        decode.run.run()
        self._launch_sample(decode.layout, bucket.rows)

    def _capture(self, decode: _Decode, bucket: Bucket) -> None:
        """Record the bucket's step, which has just run once: whatever is made at a first run is there."""
        try:
            decode.replay = self._device.capture(lambda: self._launch_decode(decode, bucket))
        except Exception as error:
            if kind_of(error) is not BackendErrorKind.RETRYABLE:
                raise
            self._use_graphs = False
            logger.warning("CUDA graphs are off", extra={"reason": str(error)})

    # ---- ahead of the batcher ----

    def _take_ahead(self, bucket: Bucket, image: Bytes) -> _Answer | None:
        """The running step, if it is the one that is asked for now."""
        ahead, self._ahead = self._ahead, None
        if self._patience is None:
            return None
        is_right = ahead is not None and ahead.bucket == bucket and np.array_equal(ahead.expected, image)
        if ahead is not None:
            self._patience.note(was_right=is_right)
        return ahead.answer if is_right and ahead is not None else None

    def _start_ahead(
        self, decode: _Decode, bucket: Bucket, views: Mapping[str, Array], answer: _Answer
    ) -> _Answer | None:
        """Put the step after this one on the stream, if it can be known and is likely to be asked for."""
        if self._patience is None or decode.replay is None or not self._patience.allows():
            return None
        if not self._may_advance(bucket, views):
            return None
        follower = self._answers[1] if answer is self._answers[0] else self._answers[0]
        at = {name: self._inputs + field.offset for name, field in decode.layout.fields.items()}
        self._parts.advance.launch(
            -(-bucket.rows // ADVANCE_THREADS),
            ADVANCE_THREADS,
            *(ctypes.c_void_p(at[name]) for name in ("input_ids", "past_lens", "slot_mapping", "position")),
            ctypes.c_void_p(self._token_ids),
            ctypes.c_int(bucket.rows),
        )
        decode.replay()
        self._fetch(follower, bucket.rows)
        return follower

    def _may_advance(self, bucket: Bucket, views: Mapping[str, Array]) -> bool:
        """Whether every row's next token goes into a block that it has, at a position the model knows."""
        moves = views["slot_mapping"] >= 0
        following = views["past_lens"][moves] + 1
        is_inside = bool((following % self._limits.block_size).all())
        return is_inside and int(following.max()) < self._limits.max_model_len

    # ---- what all steps share ----

    def _launch_sample(self, plan: Layout, rows: int) -> None:
        fields = [ctypes.c_void_p(self._inputs + plan.fields[name].offset) for name in _SAMPLING_FIELDS]
        logits = (ctypes.c_void_p(self._logits), ctypes.c_longlong(self._limits.vocab_size))
        tops, token_ids = ctypes.c_void_p(self._tops), ctypes.c_void_p(self._token_ids)
        self._parts.top.launch(rows * TOP_PARTS, TOP_THREADS, *logits, tops)
        self._parts.sample.launch(rows, SAMPLE_THREADS, *logits, tops, *fields, token_ids)

    def _fetch(self, answer: _Answer, rows: int) -> None:
        self._device.copy_out(answer.token_ids[:rows].view(np.uint8), self._token_ids)
        self._device.record(answer.event)

    def _read_logits(self, rows: int) -> NDArray[np.float32]:
        if self._ahead is not None:
            raise RuntimeError("the next step has begun and its logits overwrite these: open without look_ahead")
        logits = np.empty((rows, self._limits.vocab_size), np.float32)
        self._device.attach()
        self._device.copy_out(logits.reshape(-1).view(np.uint8), self._logits)
        self._device.synchronize()
        return logits

    def _located(self, plan: Layout) -> dict[str, Located]:
        """The graph's inputs where this layout puts them."""
        return {
            name: Located(
                self._inputs + plan.fields[name].offset, plan.fields[name].dtype.name, plan.fields[name].shape
            )
            for name in _GRAPH_INPUTS
        }

    def _outputs(self, rows: int) -> dict[str, Located]:
        return {"logits": Located(self._logits, "float32", (rows, self._limits.vocab_size))}

    def _new_run(self) -> StepRun:
        if self._session is None:
            raise BackendError(BackendErrorKind.FATAL, "the backend is closed")
        run = self._session.new_run()
        run.bind(self._caches, {})
        return run

    def _new_answer(self) -> _Answer:
        pinned = self._device.pinned(self._limits.max_batch_seqs * 8)
        return _Answer(pinned.view(np.int64), self._device.new_event())

    def _block_bytes(self, manifest: ModelManifest) -> int:
        return self._limits.num_blocks * manifest.kv_cache.block_bytes

    def _cache_inputs(self, manifest: ModelManifest) -> Mapping[str, Located]:
        """Keys and values of each layer, one after another in the pool."""
        cache, size = manifest.kv_cache, self._block_bytes(manifest)
        shape = (self._limits.num_blocks, *cache.block_shape)
        names = [f"{what}_cache.{layer}" for layer in range(manifest.geometry.num_layers) for what in ("key", "value")]
        return {name: Located(self._pool + index * size, cache.dtype, shape) for index, name in enumerate(names)}


def kind_of(error: Exception) -> BackendErrorKind:
    """What a failed step means: memory is CAPACITY, a failed capture RETRYABLE, the rest has lost the device."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or any(words in text for words in _MEMORY_WORDS):
        return BackendErrorKind.CAPACITY
    return BackendErrorKind.RETRYABLE if "capture" in text else BackendErrorKind.FATAL

"""The CUDA backend without a GPU: its device, its stream and its graph made of numpy.

The stream is lazy: what is put on it runs only when somebody waits, in order, so that a host that changes a buffer too
early, or reads an answer too soon, is caught. The graph runs in ONNX's evaluator (tests/model_store/cuda_operators.py),
sampling is the reference, and memory is real memory at real addresses.
"""

from __future__ import annotations

import atexit
import ctypes
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (teaches numpy the names of 16-bit and 8-bit floats)
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from batcher.backend import SamplingInput
from batcher.sampling import sample
from bench.random_model import SHAPES, write_checkpoint
from model_store.importing import import_model
from model_store.manifest import GRAPH_FILE, ModelManifest
from model_store.store import Store
from services.backends.cuda import CudaBackend
from services.backends.cuda_parts import CudaParts
from services.backends.cuda_session import Located
from services.backends.sizing import StepLimits, backend_limits, bytes_per_block
from tests.model_store.cuda_operators import OPERATORS
from tests.model_store.cuda_session import open_cuda_session

Array = NDArray[Any]
SHAPE = {**SHAPES["tiny"], "num_hidden_layers": 1, "vocab_size": 300, "max_position_embeddings": 600}


def array_at(address: int, dtype: str, shape: tuple[int, ...]) -> Array:
    """The memory at `address`, as an array."""
    kind = np.dtype(dtype)
    count = int(np.prod(shape, dtype=np.int64))
    raw = (ctypes.c_uint8 * (count * kind.itemsize)).from_address(address)
    return np.frombuffer(memoryview(raw), kind, count).reshape(shape)


@dataclass
class HostEvent:
    """A mark on the stream: how often it was set there, and which of these the stream has passed."""

    recorded: int = 0
    passed: int = 0

    def pass_(self, number: int) -> None:
        self.passed = number


def event_of(event: object) -> HostEvent:
    """The device's own kind of event."""
    if not isinstance(event, HostEvent):
        raise TypeError(f"{event!r} is no event of this device")
    return event


class HostDevice:
    """A device whose stream runs when it is waited for."""

    def __init__(self) -> None:
        self._memory: dict[int, Array] = {}
        self._stream: deque[Callable[[], None]] = deque()
        self.captures = 0
        self.fails_with: Exception | None = None  # what the next copy to the device raises

    @property
    def allocations(self) -> int:
        return len(self._memory)

    def attach(self) -> None:
        """There is only one context."""

    def allocate(self, num_bytes: int) -> int:
        memory = np.zeros(num_bytes, np.uint8)
        self._memory[memory.ctypes.data] = memory
        return memory.ctypes.data

    def release(self, address: int) -> None:
        del self._memory[address]

    def pinned(self, num_bytes: int) -> NDArray[np.uint8]:
        return np.zeros(num_bytes, np.uint8)

    def copy_in(self, target: int, source: NDArray[np.uint8]) -> None:
        if self.fails_with is not None:
            error, self.fails_with = self.fails_with, None
            raise error
        self.put(lambda: ctypes.memmove(target, source.ctypes.data, source.nbytes))

    def copy_out(self, target: NDArray[np.uint8], source: int) -> None:
        self.put(lambda: ctypes.memmove(target.ctypes.data, source, target.nbytes))

    def new_event(self) -> object:
        return HostEvent()

    def record(self, event: object) -> None:
        mark = event_of(event)
        mark.recorded += 1
        number = mark.recorded
        self.put(lambda: mark.pass_(number))

    def wait(self, event: object) -> None:
        mark = event_of(event)
        while mark.passed < mark.recorded:  # the last record counts, as in CUDA
            self._stream.popleft()()

    def synchronize(self) -> None:
        while self._stream:
            self._stream.popleft()()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        outside, self._stream = self._stream, deque()
        work()
        recorded, self._stream = list(self._stream), outside
        self.captures += 1
        return lambda: self._stream.extend(recorded)

    def put(self, work: Callable[[], object]) -> None:
        """Add to the stream."""

        def run() -> None:
            work()

        self._stream.append(run)


@dataclass
class HostRun:
    """A graph with its tensors in place."""

    device: HostDevice
    evaluator: ReferenceEvaluator
    inputs: dict[str, Located] = field(default_factory=dict)
    outputs: dict[str, Located] = field(default_factory=dict)
    host: dict[str, NDArray[np.int32]] = field(default_factory=dict)

    def bind(self, inputs: Mapping[str, Located], outputs: Mapping[str, Located]) -> None:
        self.inputs.update(inputs)
        self.outputs.update(outputs)

    def bind_host(self, name: str, values: NDArray[np.int32]) -> None:
        self.host[name] = values

    def run(self) -> None:
        # Addresses and host inputs are read when work is put on the stream, device memory when it runs.
        inputs, outputs = dict(self.inputs), dict(self.outputs)
        host = {name: values.copy() for name, values in self.host.items()}
        self.device.put(lambda: self._compute(inputs, outputs, host))

    def _compute(
        self, inputs: Mapping[str, Located], outputs: Mapping[str, Located], host: Mapping[str, Array]
    ) -> None:
        feeds = {name: array_at(at.address, at.dtype, at.shape) for name, at in inputs.items()}
        feeds.update(host)
        computed: list[Any] = list(self.evaluator.run(list(outputs), feeds))
        for at, values in zip(outputs.values(), computed, strict=True):
            array_at(at.address, at.dtype, at.shape)[...] = values


class HostSession:
    """An open graph."""

    def __init__(self, device: HostDevice, graph: Path) -> None:
        self._device = device
        self._evaluator = ReferenceEvaluator(onnx.load(str(graph)), new_ops=OPERATORS)

    def new_run(self) -> HostRun:
        return HostRun(self._device, self._evaluator)


class HostKernel:
    """A kernel as a function of the number of blocks and of its arguments' values, taken when it is launched."""

    def __init__(self, device: HostDevice, work: Callable[..., None]) -> None:
        self._device = device
        self._work = work

    def launch(self, blocks: int, threads: int, *arguments: Any) -> None:
        values = [argument.value for argument in arguments]
        self._device.put(lambda: self._work(blocks, *values))


def sample_rows(rows: int, logits: int, vocab_size: int, _tops: int, *fields: int) -> None:
    """millrace_sample by the reference."""
    *addresses, token_ids = fields
    kinds = ("float32", "int32", "float32", "float32", "int64", "int64")
    columns = [array_at(address, kind, (rows,)) for address, kind in zip(addresses, kinds, strict=True)]
    scores = array_at(logits, "float32", (rows, vocab_size))
    array_at(token_ids, "int64", (rows,))[...] = sample(scores, SamplingInput(*columns))


def advance_rows(
    _blocks: int, input_ids: int, past_lens: int, slots: int, position: int, tokens: int, rows: int
) -> None:
    """millrace_advance, row by row as the kernel does it."""
    slot_mapping = array_at(slots, "int32", (rows,))
    for row in np.flatnonzero(slot_mapping >= 0):
        array_at(input_ids, "int64", (rows,))[row] = max(0, array_at(tokens, "int64", (rows,))[row])
        for address, kind in ((past_lens, "int32"), (slots, "int32"), (position, "int64")):
            array_at(address, kind, (rows,))[row] += 1


@lru_cache(maxsize=1)
def emulated_model() -> tuple[Path, ModelManifest]:
    """A one-layer model built for the CUDA target."""
    directory = Path(tempfile.mkdtemp(prefix="millrace-cuda-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    write_checkpoint(directory / "source", SHAPE, seed=3)
    store = Store(directory / "store")
    manifest = import_model(
        directory / "source",
        store,
        "pond",
        scheme="bf16",
        target="cuda",
        candidate_factory=open_cuda_session,
        progress=lambda what, done, total: None,
        parity_bound=0.05,
    )
    return store.resolve("pond"), manifest


def emulated_backend(
    *, blocks: int = 40, batch_tokens: int = 64, batch_seqs: int = 8, use_graphs: bool = True, look_ahead: bool = False
) -> tuple[CudaBackend, HostDevice]:
    """The CUDA backend on a device of numpy."""
    directory, manifest = emulated_model()
    device = HostDevice()
    parts = CudaParts(
        device=device,
        session=HostSession(device, directory / GRAPH_FILE),
        top=HostKernel(device, lambda blocks, *arguments: None),
        sample=HostKernel(device, sample_rows),
        advance=HostKernel(device, advance_rows),
        close=lambda: None,
    )
    limits = StepLimits(batch_tokens, batch_seqs, blocks * bytes_per_block(manifest), threads=1)
    backend = CudaBackend(
        parts, manifest, backend_limits(manifest, limits), use_graphs=use_graphs, look_ahead=look_ahead
    )
    return backend, device

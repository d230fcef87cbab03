"""Does ONNX Runtime's own CUDA graph capture work with PagedAttention? Asked anew in every run.

The backend captures by itself (services/backends/cuda.py), because its graph holds sampling too; this is the other way:
`enable_cuda_graph` and a graph id for each run. It needs attention_metadata in host memory at one address.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from kernels.cuda.binding import LinearBinding
from kernels.cuda.device import Device
from model_store.manifest import GRAPH_FILE
from services.backends.cuda_session import ELEMENT_TYPES, PROVIDER
from services.backends.step_image import Extents, layout, pad
from services.loading import StoredModel

ROWS: Final = 4
RUNS: Final = 12


def ort_capture(model: StoredModel) -> dict[str, object]:
    """Whether replays give the logits of the run that was captured, follow changed inputs, and how long they take."""
    device = Device()
    binding = LinearBinding(device, model.manifest.activations, 1 << 24)
    try:
        session = _open(model, binding, device)
        return _compare(model, session, device)
    finally:
        binding.close()


def _open(model: StoredModel, binding: LinearBinding, device: Device) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_mem_pattern = False
    settings = {"device_id": "0", "user_compute_stream": str(device.stream), "enable_cuda_graph": "1", "use_tf32": "0"}
    with binding.session() as library:
        options.register_custom_ops_library(str(library))
        return ort.InferenceSession(str(model.directory / GRAPH_FILE), options, providers=[(PROVIDER, settings)])


def _compare(model: StoredModel, session: ort.InferenceSession, device: Device) -> dict[str, object]:
    geometry, cache = model.manifest.geometry, model.manifest.kv_cache
    plan = layout(Extents(ROWS, ROWS, 1, ROWS))
    image = device.pinned(plan.num_bytes)
    views = plan.views(image)
    pad(views, 0)
    views["slot_mapping"][:] = np.arange(ROWS) * cache.block_size
    views["block_table"][:, 0] = np.arange(ROWS)
    inputs, logits = device.allocate(plan.num_bytes), device.allocate(ROWS * geometry.vocab_size * 4)
    size = ROWS * cache.block_bytes
    pool = device.allocate(2 * geometry.num_layers * size)
    bound = session.io_binding()
    for name in ("input_ids", "cu_seqlens", "past_lens", "block_table", "slot_mapping", "logits_rows"):
        field = plan.fields[name]
        bound.bind_input(name, "cuda", 0, ELEMENT_TYPES[field.dtype.name], field.shape, inputs + field.offset)
    for index in range(2 * geometry.num_layers):
        name = f"{('key', 'value')[index % 2]}_cache.{index // 2}"
        bound.bind_input(name, "cuda", 0, ELEMENT_TYPES[cache.dtype], (ROWS, *cache.block_shape), pool + index * size)
    metadata = np.array([1, cache.block_size, 0], np.int32)
    bound.bind_input("attention_metadata", "cpu", 0, ELEMENT_TYPES["int32"], (3,), metadata.ctypes.data)
    bound.bind_output("logits", "cuda", 0, ELEMENT_TYPES["float32"], (ROWS, geometry.vocab_size), logits)
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", "1")
    seen: list[NDArray[np.float32]] = []
    seconds = []
    for number in range(RUNS):
        views["input_ids"][:] = np.arange(ROWS) + 7 * (number // 4)
        device.copy_in(inputs, image)
        start = time.perf_counter()
        session.run_with_iobinding(bound, options)
        device.synchronize()
        seconds.append(time.perf_counter() - start)
        seen.append(np.empty((ROWS, geometry.vocab_size), np.float32))
        device.copy_out(seen[-1].reshape(-1).view(np.uint8), logits)
        device.synchronize()
    return {
        "replays_equal_the_captured_run": all(np.array_equal(seen[0], seen[i]) for i in (1, 2, 3)),
        "replays_follow_changed_inputs": not np.array_equal(seen[3], seen[4]) and np.array_equal(seen[4], seen[7]),
        "first_run_ms": round(seconds[0] * 1000, 3),
        "replay_ms": round(median(seconds[2:]) * 1000, 3),
    }

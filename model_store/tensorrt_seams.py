"""Where a decoder is cut for TensorRT: it takes the dense parts, CUDA the attention and the tables between them.

    tables │ norm, qkv │ attention │ output, mlp, norm, qkv │ attention │ ... │ output, mlp │ tables
    CUDA   │ engine 0  │ CUDA      │ engine 1               │ CUDA      │     │ engine L    │ CUDA

Each engine is built for a range of every input it has, by name, so the names are known here: to the writer of the
graph (tensorrt_nodes.py) and, without ONNX, to who opens it (services/backends/engine_cache.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from model_store.manifest import Geometry

# What stands between a node's address and "out" in the names of values. ONNX Runtime splits lists of profile shapes at
# commas and colons, so neither may be in a name.
JOINT: Final = "."

# The operators that stay with CUDA: attention, and what reads the tables (an engine would hold a copy of them).
KEPT_OPERATORS: Final = ("Gather", "LinearF16", "PagedAttention")


def engine_inputs(geometry: Geometry) -> Mapping[str, int]:
    """Every input of every engine that has as many rows as the step has tokens: its name -> its width."""
    widths = {f"/embed{JOINT}out": geometry.hidden_size}
    stream = f"/embed/float{JOINT}out"  # of the residual stream, what enters each layer
    for layer in range(geometry.num_layers):
        widths[f"/layers.{layer}/attention{JOINT}out"] = geometry.num_heads * geometry.head_dim
        widths[stream] = geometry.hidden_size
        stream = f"/layers.{layer}/down/add{JOINT}out"
    return widths

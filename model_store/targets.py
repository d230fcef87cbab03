"""Where a model can run, and the schemes it can be stored in for that place.

A new target is a NodeWriter in a file of its own and a row here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

from model_store.calibration import Calibration
from model_store.cpu_nodes import CpuNodes
from model_store.cuda_nodes import CudaNBitsNodes, CudaNodes
from model_store.nodes import NodeWriter
from model_store.quantization import BLOCKED_FP32, BLOCKED_W8A8, Packing, Scheme, float_packing, nbits_packing
from model_store.tensorrt_nodes import TensorRtFp8Nodes, TensorRtInt4Nodes, TensorRtInt8Nodes
from model_store.tensorrt_packing import fp8_packing, int4_packing, int8_packing
from wire.errors import BadRequest

WriterFactory = Callable[[Scheme, Calibration | None], NodeWriter]


@dataclass(frozen=True, slots=True)
class Choice:
    """A scheme of a target, and what writes its graph."""

    scheme: Scheme
    nodes: WriterFactory


def _choices(*choices: Choice) -> Mapping[str, Choice]:
    return {choice.scheme.name: choice for choice in choices}


def _cpu(scheme: Scheme) -> Choice:
    return Choice(scheme, lambda scheme, _: CpuNodes(scheme))


def _cuda_float(name: str, dtype: str, bound: float, kv_dtype: str | None = None) -> Choice:
    packing = float_packing(dtype)
    scheme = Scheme(name, packing, packing, dtype, kv_dtype or dtype, bound, needs_calibration=kv_dtype is not None)
    return Choice(scheme, CudaNodes)


def _cuda_nbits(name: str, bits: int, group: int, bound: float) -> Choice:
    dtype = "bfloat16"
    scheme = Scheme(name, nbits_packing(bits, group, dtype), float_packing(dtype), dtype, dtype, bound)
    return Choice(scheme, partial(CudaNBitsNodes, bits=bits, group=group))


def _tensorrt(name: str, packing: Packing, bound: float, nodes: WriterFactory, *, needs_calibration: bool) -> Choice:
    dtype = "float16"
    scheme = Scheme(name, packing, float_packing(dtype), dtype, dtype, bound, needs_calibration=needs_calibration)
    return Choice(scheme, nodes)


TARGETS: Final[Mapping[str, Mapping[str, Choice]]] = {
    "cpu": _choices(
        _cpu(Scheme("w8a8", BLOCKED_W8A8, BLOCKED_W8A8, "float32", kv_dtype="float16", parity_bound=0.25)),
        _cpu(Scheme("fp32", BLOCKED_FP32, BLOCKED_FP32, "float32", kv_dtype="float32", parity_bound=1e-4)),
    ),
    "cuda": _choices(
        # Rounding in 16 bits costs wide models less than 1e-2 a row (tests, docs/performance.md); a narrow one more.
        _cuda_float("bf16", "bfloat16", 0.04),
        _cuda_float("fp16", "float16", 0.01),
        _cuda_float("bf16-kv-int8", "bfloat16", 0.1, kv_dtype="int8"),
        _cuda_float("bf16-kv-fp8", "bfloat16", 0.15, kv_dtype="float8_e4m3fn"),
        _cuda_nbits("w8a16", 8, 64, 0.1),
        _cuda_nbits("w4a16", 4, 64, 0.5),
    ),
    "tensorrt": _choices(
        _tensorrt("int8", int8_packing(), 0.35, TensorRtInt8Nodes, needs_calibration=True),
        _tensorrt("int4", int4_packing(64), 0.5, partial(TensorRtInt4Nodes, block=64), needs_calibration=False),
        _tensorrt("fp8", fp8_packing(), 0.25, TensorRtFp8Nodes, needs_calibration=True),
    ),
}


def choose(target: str, scheme: str | None) -> Choice:
    """The row for `scheme` of `target`; the target's first without a scheme. Raises BadRequest naming what there is."""
    if target not in TARGETS:
        raise BadRequest(f"unknown target {target[:80]!r}; known are {', '.join(TARGETS)}", param="target")
    choices = TARGETS[target]
    if scheme is None:
        return next(iter(choices.values()))
    if scheme not in choices:
        raise BadRequest(
            f"unknown scheme {scheme[:80]!r} for target {target}; known are {', '.join(choices)}", param="scheme"
        )
    return choices[scheme]

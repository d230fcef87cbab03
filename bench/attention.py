"""How close attention comes to the machine: `python -m bench.attention [--json]`.

A graph holds many PagedAttention nodes, each with a layer of its own in one cache, so that keys and values come from
memory, as they do in a model whose weights have gone through the caches in between; ONNX Runtime runs it on its own
threads. Beside each time stand the two limits, measured in the same minute. Rounds go through all cases in turn, so
that a noisy second hurts every case alike; medians and the spread of the middle half are printed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper

from kernels.limits import Limits, measure_limits
from kernels.loader import isa_active, isa_available, library_path, set_isa, threads

CacheType = type[np.float16] | type[np.float32]

COLD_BYTES = 96 << 20  # keys and values of a graph's layers together: more than any cache here
MAX_LAYERS = 400
ENOUGH_FLOPS = 2 * 10**9  # prefill is not about memory: enough that starting a run does not show


@dataclass(frozen=True, slots=True)
class Shape:
    """The attention of a model."""

    num_heads: int
    kv_num_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.num_heads}/{self.kv_num_heads} heads of {self.head_dim}"


@dataclass(frozen=True, slots=True)
class Case:
    """A step: so many sequences, each with `past` tokens in the cache and `new` ones."""

    num_seqs: int
    past: int
    new: int

    @property
    def keys_seen(self) -> int:
        """Pairs of query and key, over all sequences."""
        return self.num_seqs * sum(range(self.past + 1, self.past + self.new + 1))

    @property
    def keys_read(self) -> int:
        return self.num_seqs * (self.past + self.new)

    def __str__(self) -> str:
        kind = f"decode C={self.num_seqs}" if self.new == 1 else f"prefill {self.new}"
        return f"{kind}, context {self.past + self.new}"


SHAPES = (Shape(9, 3, 64), Shape(14, 2, 64), Shape(32, 8, 128))
CASES = (
    *(Case(num_seqs, context - 1, 1) for num_seqs in (1, 8, 32) for context in (160, 1024)),
    *(Case(1, past, new) for past, new in ((0, 128), (0, 512), (1536, 512))),
)


@dataclass(frozen=True, slots=True)
class Result:
    """One case: time of a node, and shares of the two limits."""

    shape: str
    case: str
    median_us: float
    spread_percent: float  # between the quartiles, of the median
    gb_s: float  # keys and values read once
    read_share: float
    gflop_s: float  # of the products, causal pairs only
    peak_share: float


class Runner:
    """A session, its cache and the inputs of one case."""

    def __init__(self, shape: Shape, case: Case, dtype: CacheType, rng: np.random.Generator) -> None:
        blocks = -(-(case.past + case.new) // 16)
        self.kv_bytes = 2 * case.keys_read * shape.kv_num_heads * shape.head_dim * np.dtype(dtype).itemsize
        self.flops = 4 * case.keys_seen * shape.num_heads * shape.head_dim
        enough = COLD_BYTES // self.kv_bytes if case.new == 1 else ENOUGH_FLOPS // self.flops
        self.layers = int(np.clip(enough, 2, MAX_LAYERS))
        num_blocks = case.num_seqs * blocks
        one_layer = 2, num_blocks, shape.kv_num_heads, 16 * shape.head_dim
        self._cache = aligned((self.layers, *one_layer), dtype)
        self._cache[:] = rng.standard_normal(one_layer, dtype=np.float32).astype(dtype)
        model = build_graph(shape, self.layers, dtype)
        options = ort.SessionOptions()
        options.register_custom_ops_library(str(library_path()))
        # Each session has threads of its own, which would go on spinning into the next session's turn.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self._binding = self._session.io_binding()
        self._feeds = {"kv_cache": self._cache, **step_inputs(shape, case, blocks, rng)}
        for name, array in self._feeds.items():
            self._binding.bind_cpu_input(name, array)
        self._out = np.empty((case.num_seqs * case.new, shape.num_heads * shape.head_dim), np.float32)
        for layer in range(self.layers):  # all into the same memory, as a model's activations are
            self._binding.bind_output(f"y{layer}", "cpu", 0, np.float32, self._out.shape, self._out.ctypes.data)

    def seconds(self) -> float:
        """One run, for each node."""
        started = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        return (time.perf_counter() - started) / self.layers


def aligned(shape: tuple[int, ...], dtype: CacheType) -> NDArray[np.generic]:
    """An array that starts where a line does, as the server's cache does: a block of keys then shares no line."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(num_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + num_bytes].view(dtype).reshape(shape)


def build_graph(shape: Shape, layers: int, dtype: CacheType) -> onnx.ModelProto:
    """Nodes that read the same projections, each with the next layer of the cache."""
    floats, half = onnx.TensorProto.FLOAT, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    i32, i64 = onnx.TensorProto.INT32, onnx.TensorProto.INT64
    types = {"qkv": (floats, 2), "kv_cache": (half, 5), "positions": (i64, 1), "cu_seqlens": (i32, 1)}
    types |= {"past_lens": (i32, 1), "block_table": (i32, 2), "slot_mapping": (i32, 1), "cos_sin": (floats, 2)}
    inputs = [helper.make_tensor_value_info(name, kind, [None] * rank) for name, (kind, rank) in types.items()]
    outputs = [helper.make_tensor_value_info(f"y{layer}", floats, [None, None]) for layer in range(layers)]
    heads = {"num_heads": shape.num_heads, "kv_num_heads": shape.kv_num_heads, "scale": shape.head_dim**-0.5}
    nodes = [
        helper.make_node("PagedAttention", list(types), [f"y{layer}"], domain="millrace", layer=layer, **heads)
        for layer in range(layers)
    ]
    graph = helper.make_graph(nodes, "layers", inputs, outputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("millrace", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def step_inputs(shape: Shape, case: Case, blocks: int, rng: np.random.Generator) -> dict[str, NDArray[np.generic]]:
    """A step's arrays; the blocks of all sequences are mixed, as they are after a while of serving."""
    table = rng.permutation(case.num_seqs * blocks).astype(np.int32).reshape(case.num_seqs, blocks)
    at = np.arange(case.past, case.past + case.new)
    width = (shape.num_heads + 2 * shape.kv_num_heads) * shape.head_dim
    return {
        "qkv": rng.standard_normal((case.num_seqs * case.new, width), dtype=np.float32),
        "positions": np.tile(at, case.num_seqs).astype(np.int64),
        "cu_seqlens": (np.arange(case.num_seqs + 1) * case.new).astype(np.int32),
        "past_lens": np.full(case.num_seqs, case.past, np.int32),
        "block_table": table,
        "slot_mapping": (table[:, at // 16] * 16 + at % 16).astype(np.int32).reshape(-1),
        "cos_sin": rng.standard_normal((case.past + case.new, shape.head_dim), dtype=np.float32),
    }


def measure(shape: Shape, cases: tuple[Case, ...], dtype: CacheType, rounds: int, limits: Limits) -> list[Result]:
    """Time every case of a shape, `rounds` times in turn."""
    rng = np.random.default_rng(0)
    runners = [Runner(shape, case, dtype, rng) for case in cases]
    times: list[list[float]] = [[] for _ in cases]
    for runner in runners:
        runner.seconds()
    for _ in range(rounds):
        for runner, seconds in zip(runners, times, strict=True):
            seconds.append(runner.seconds())
    return [summarize(shape, *row, limits) for row in zip(cases, runners, times, strict=True)]


def summarize(shape: Shape, case: Case, runner: Runner, seconds: list[float], limits: Limits) -> Result:
    """Median time and the rates that follow from it."""
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4)
    return Result(
        shape=str(shape),
        case=str(case),
        median_us=median * 1e6,
        spread_percent=100 * (high - low) / median,
        gb_s=runner.kv_bytes / median / 1e9,
        read_share=runner.kv_bytes / median / limits.read_bytes_per_s,
        gflop_s=runner.flops / median / 1e9,
        peak_share=runner.flops / median / limits.f32_ops_per_s,
    )


def print_table(limits: Limits, results: list[Result]) -> None:
    """The results for people."""
    print(
        f"kernels {isa_active()}, {threads()} threads; float peak {limits.f32_ops_per_s / 1e9:,.0f} GFLOP/s, "
        f"reading {limits.read_bytes_per_s / 1e9:.1f} GB/s"
    )
    print(f"{'heads':<22}{'step':<30}{'us':>10}{'spread':>8}{'GB/s':>8}{'of read':>9}{'GFLOP/s':>9}{'of peak':>9}")
    for r in results:
        print(
            f"{r.shape:<22}{r.case:<30}{r.median_us:>10.1f}{r.spread_percent:>7.0f}%{r.gb_s:>8.1f}{r.read_share:>9.0%}"
            f"{r.gflop_s:>9.1f}{r.peak_share:>9.0%}"
        )


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.attention", description="Measure PagedAttention.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds of every case")
    parser.add_argument("--form", choices=isa_available(), help="kernels to use; default: the widest")
    parser.add_argument("--float", action="store_true", help="a float32 cache instead of float16")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first so many shapes")
    options = parser.parse_args(arguments)
    set_isa(options.form)
    dtype = np.float32 if options.float else np.float16
    limits = measure_limits(threads())
    results = [r for shape in SHAPES[: options.shapes] for r in measure(shape, CASES, dtype, options.rounds, limits)]
    if options.json:
        report = {"limits": asdict(limits), "form": isa_active(), "results": [asdict(r) for r in results]}
        json.dump(report, sys.stdout, indent=1)
        print()
    else:
        print_table(limits, results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""How close the linear operators come to the machine: `python -m bench.kernels [--json]`.

Runs graphs of one operator many times over, each copy with weights of its own, in ONNX Runtime on its own threads: so
weights come from memory, as they do in a model, and the runtime's cost of starting a node is counted. Beside each
time stand the two limits, measured before and after every layer: multiply-adds of a loop over registers, and reading
memory in order. Rounds go through all numbers of rows in turn, so that a noisy second hurts every case alike.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from kernels.limits import Limits, measure_limits
from kernels.loader import isa_active, isa_available, library_path, set_isa
from model_store.packing import num_blocks

COLD_BYTES = 96 << 20  # weights of a graph's copies together: more than any cache here


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer: K inputs, `columns` columns of weights (gate and up both counted), operator and activation."""

    operator: str
    inputs: int
    columns: int
    activation: str = "none"

    @property
    def outputs(self) -> int:
        return self.columns // 2 if self.activation == "silu_mul" else self.columns

    @property
    def weight_bytes(self) -> int:
        return self.inputs * self.columns * (1 if self.operator == "QLinear" else 4)

    @property
    def copies(self) -> int:
        return max(1, round(COLD_BYTES / self.weight_bytes))


LAYERS = (
    # the layers of a model with hidden size 576 ...
    Layer("QLinear", 576, 960),
    Layer("QLinear", 576, 576),
    Layer("QLinear", 576, 3072, "silu_mul"),
    Layer("QLinear", 1536, 576),
    Layer("QLinear", 576, 49152),
    # ... and 896
    Layer("QLinear", 896, 1152),
    Layer("QLinear", 896, 9728, "silu_mul"),
    Layer("QLinear", 4864, 896),
    Layer("Linear", 576, 960),
    Layer("Linear", 576, 3072, "silu_mul"),
    Layer("Linear", 1536, 576),
)
ROWS = (1, 4, 8, 32, 128)


@dataclass(frozen=True, slots=True)
class Result:
    """One layer with T rows: time of a node, and shares of the two limits."""

    operator: str
    inputs: int
    columns: int
    activation: str
    rows: int
    median_us: float
    spread_percent: float  # between the quartiles, of the median
    gops: float
    peak_share: float
    gb_s: float  # weights read
    read_share: float


def open_session(layer: Layer, rng: np.random.Generator) -> ort.InferenceSession:
    """A graph of the layer's copies: all read x, each adds its result to the one before (the residual input)."""
    weights = [numpy_helper.from_array(weight, f"w{copy}") for copy, weight in enumerate(random_weights(layer, rng))]
    if layer.operator == "QLinear":
        columns = 64 * num_blocks(layer.columns)
        weights.append(numpy_helper.from_array(np.full(columns, 1e-4, np.float32), "scale"))
        weights.append(numpy_helper.from_array(np.zeros(columns, np.int32), "colsum"))
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["T", layer.inputs])
    y = helper.make_tensor_value_info(f"y{layer.copies - 1}", onnx.TensorProto.FLOAT, ["T", layer.outputs])
    nodes = [make_node(layer, copy) for copy in range(layer.copies)]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("millrace", 1)]
    graph = helper.make_graph(nodes, "copies", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library_path()))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def make_node(layer: Layer, copy: int) -> onnx.NodeProto:
    """The node of one copy."""
    vectors = ["scale", "colsum"] if layer.operator == "QLinear" else []
    inputs = ["x", f"w{copy}", *vectors]
    if copy:
        inputs += ["", "", f"y{copy - 1}"]  # no bias, no norm, a residual
    node = helper.make_node(layer.operator, inputs, [f"y{copy}"], domain="millrace")
    node.attribute.append(helper.make_attribute("N", layer.outputs))
    node.attribute.append(helper.make_attribute("activation", layer.activation))
    return node


def random_weights(layer: Layer, rng: np.random.Generator) -> Iterator[NDArray[np.int8] | NDArray[np.float32]]:
    """Packed weights for every copy: different places of one pool of random numbers."""
    depth = (-(-layer.inputs // 4), 64, 4) if layer.operator == "QLinear" else (layer.inputs, 64)
    shape = (num_blocks(layer.columns), *depth)
    size = math.prod(shape)
    pool: NDArray[np.int8] | NDArray[np.float32]
    if layer.operator == "QLinear":
        pool = rng.integers(-127, 128, size + layer.copies, dtype=np.int8)
    else:
        pool = rng.standard_normal(size + layer.copies, dtype=np.float32)
    for copy in range(layer.copies):
        yield pool[copy : copy + size].reshape(shape)


def measure(layers: tuple[Layer, ...], rows: tuple[int, ...], rounds: int, limits: Limits) -> list[Result]:
    """Time every layer with every number of rows, `rounds` times in turn."""
    rng = np.random.default_rng(0)
    results = []
    for layer in layers:  # one graph at a time: a hundred megabytes each
        session = open_session(layer, rng)
        inputs = [rng.standard_normal((count, layer.inputs), dtype=np.float32) for count in rows]
        for x in inputs:
            session.run(None, {"x": x})
        times: list[list[float]] = [[] for _ in rows]
        for _ in range(rounds):
            for x, seconds in zip(inputs, times, strict=True):
                started = time.perf_counter()
                session.run(None, {"x": x})
                seconds.append((time.perf_counter() - started) / layer.copies)
        results += [summarize(layer, count, seconds, limits) for count, seconds in zip(rows, times, strict=True)]
    return results


def summarize(layer: Layer, rows: int, seconds: list[float], limits: Limits) -> Result:
    """Median time and the rates that follow from it."""
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4)
    gops = 2 * rows * layer.inputs * layer.columns / median / 1e9
    gb_s = layer.weight_bytes / median / 1e9
    peak = (limits.int8_ops_per_s if layer.operator == "QLinear" else limits.f32_ops_per_s) / 1e9
    return Result(
        operator=layer.operator,
        inputs=layer.inputs,
        columns=layer.columns,
        activation=layer.activation,
        rows=rows,
        median_us=median * 1e6,
        spread_percent=100 * (high - low) / median,
        gops=gops,
        peak_share=gops / peak,
        gb_s=gb_s,
        read_share=gb_s / (limits.read_bytes_per_s / 1e9),
    )


def print_table(limits: Limits, results: list[Result]) -> None:
    """The results for people."""
    print(
        f"kernels {isa_active()}; peak int8 {limits.int8_ops_per_s / 1e9:,.0f} GOP/s, "
        f"float {limits.f32_ops_per_s / 1e9:,.0f} GOP/s; reading {limits.read_bytes_per_s / 1e9:.1f} GB/s"
    )
    print(f"{'layer':<32}{'T':>5}{'us':>10}{'spread':>8}{'GOP/s':>9}{'of peak':>9}{'GB/s':>8}{'of read':>9}")
    for r in results:
        name = f"{r.operator} {r.inputs}x{r.columns}{' silu_mul' if r.activation == 'silu_mul' else ''}"
        print(
            f"{name:<32}{r.rows:>5}{r.median_us:>10.1f}{r.spread_percent:>7.0f}%{r.gops:>9.1f}{r.peak_share:>9.0%}"
            f"{r.gb_s:>8.1f}{r.read_share:>9.0%}"
        )


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description="Measure the linear operators.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds of every case")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="numbers of rows T")
    parser.add_argument("--form", choices=isa_available(), help="kernels to use; default: the widest")
    parser.add_argument("--only", default="", help="only layers whose 'operator KxN' contains this")
    options = parser.parse_args(arguments)
    set_isa(options.form)
    layers = tuple(layer for layer in LAYERS if options.only in f"{layer.operator} {layer.inputs}x{layer.columns}")
    limits = measure_limits(os.cpu_count() or 1)
    results = measure(layers, tuple(options.rows), options.rounds, limits)
    if options.json:
        json.dump(
            {"limits": asdict(limits), "form": isa_active(), "results": [asdict(r) for r in results]},
            sys.stdout,
            indent=1,
        )
        print()
    else:
        print_table(limits, results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

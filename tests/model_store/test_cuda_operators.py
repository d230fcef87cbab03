"""What cuda_operators.py says operators mean is what ONNX Runtime computes, where its CPU provider has them too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, helper
from onnx.reference import ReferenceEvaluator

from model_store.quantization import nbits_packing
from tests.model_store.cuda_arithmetic import Refused
from tests.model_store.cuda_attention import Attention, attend
from tests.model_store.cuda_operators import OPERATORS

Array = NDArray[Any]
MICROSOFT = "com.microsoft"


def node_model(op_type: str, domain: str, inputs: Mapping[str, Array], output: str, **attributes: Any) -> ModelProto:
    """A graph of one node; an input whose name begins with an underscore is left out."""
    named = {name: array for name, array in inputs.items() if not name.startswith("_")}
    node = helper.make_node(
        op_type, [name if name in named else "" for name in inputs], ["y"], domain=domain, **attributes
    )
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in named.items()
    ]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(output))
    graph = helper.make_graph([node], "g", infos, [helper.make_tensor_value_info("y", kind, None)])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def both(op_type: str, domain: str, inputs: Mapping[str, Array], **attributes: Any) -> tuple[Array, Array]:
    """The node's output by our meaning and by ONNX Runtime's CPU provider."""
    model = node_model(op_type, domain, inputs, next(iter(inputs.values())).dtype.name, **attributes)
    feeds = {name: array for name, array in inputs.items() if not name.startswith("_")}
    ours: list[Any] = list(ReferenceEvaluator(model, new_ops=OPERATORS).run(None, dict(feeds)))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    theirs: list[Any] = session.run(None, feeds)
    return ours[0], theirs[0]


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (8, 64), (8, 128)])
@pytest.mark.parametrize("inputs", [64, 72, 256])
@pytest.mark.parametrize("has_bias", [False, True])
def test_packed_weights_multiply_in_onnx_runtime_as_they_do_here(
    bits: int, group: int, inputs: int, has_bias: bool
) -> None:
    random = np.random.default_rng(0)
    rows = random.standard_normal((48, inputs), np.float32)
    weight, scales = nbits_packing(bits, group, "float32").pack(rows)
    x = random.standard_normal((5, inputs), np.float32)
    bias = random.standard_normal(48, np.float32)
    given = {"x": x, "b": weight, "scales": scales, "_zero": x, "_groups": x, "bias" if has_bias else "_bias": bias}
    sizes = {"K": inputs, "N": 48, "bits": bits, "block_size": group}
    ours, theirs = both("MatMulNBits", MICROSOFT, given, **sizes)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    step = np.abs(rows).max() / (1 << (bits - 1))
    error = ours - (x @ rows.T + (bias if has_bias else 0))
    assert 0 < np.abs(error).max() < step * np.abs(x).sum(axis=1).max()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_norm_and_activation_are_onnx_runtimes(dtype: str) -> None:
    random = np.random.default_rng(1)
    x, scale = random.standard_normal((7, 96)).astype(dtype), random.standard_normal(96).astype(dtype)
    tolerance = 1e-6 if dtype == "float32" else 2e-3
    given = {"x": x, "scale": scale}
    ours, theirs = both("SimplifiedLayerNormalization", "", given, axis=-1, epsilon=1e-5, stash_type=1)
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)
    if dtype == "float32":  # what the CPU provider has
        ours, theirs = both("QuickGelu", MICROSOFT, {"x": x * 4}, alpha=1.0)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


TABLES: tuple[tuple[str, dict[str, float]], ...] = (
    ("plain", {}),
    ("one token back", {"local_window_size": 1}),
    ("window", {"local_window_size": 9}),
    ("softcap", {"softcap": 1.5}),
    ("scale", {"scale": 0.6}),
)


@pytest.mark.parametrize(("what", "attributes"), TABLES, ids=[what for what, _ in TABLES])
@pytest.mark.parametrize("chunk", [40, 7])
def test_paged_attention_is_group_query_attention_over_pages(
    what: str, attributes: dict[str, float], chunk: int
) -> None:
    num_tokens, num_heads, kv_heads, head_dim = 40, 4, 2, 16
    random = np.random.default_rng(2)
    qkv = random.standard_normal((num_tokens, (num_heads + 2 * kv_heads) * head_dim), np.float32)
    angles = np.arange(64)[:, None] * 100.0 ** -(np.arange(head_dim // 2) / (head_dim // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    caches = tuple(np.full((9, 16, kv_heads, head_dim), 7, np.float32) for _ in range(2))
    table = np.array([[4, 8, 1]], np.int32)
    node = Attention(num_heads, kv_heads, do_rotary=1, **attributes)  # type: ignore[arg-type]  # floats and ints
    outputs = []
    for start in range(0, num_tokens, chunk):
        part = qkv[start : start + chunk]
        positions = start + np.arange(len(part))
        outputs.append(
            attend(
                node,
                part,
                caches=(caches[0], caches[1]),
                cu_seqlens=np.array([0, len(part)], np.int32),
                past_lens=np.array([start], np.int32),
                block_table=table,
                rotation=(cos, sin),
                slot_mapping=(table[0, positions // 16] * 16 + positions % 16).astype(np.int32),
                head_norms=(None, None),
                scales=(None, None),
                metadata=np.array([len(part), start + len(part), 0], np.int32),
            )
        )
    given = {
        "qkv": qkv[None],
        "_key": qkv,
        "_value": qkv,
        "_past_key": qkv,
        "_past_value": qkv,
        "last": np.array([num_tokens - 1], np.int32),
        "total": np.array([num_tokens], np.int32),
        "cos": cos,
        "sin": sin,
    }
    heads = {"num_heads": num_heads, "kv_num_heads": kv_heads, "do_rotary": 1}
    model = node_model("GroupQueryAttention", MICROSOFT, given, "float32", **heads, **attributes)
    model.graph.node[0].output.extend(["keys", "values"])
    for name in ("keys", "values"):
        model.graph.output.append(helper.make_tensor_value_info(name, 1, None))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {name: array for name, array in given.items() if not name.startswith("_")}
    results: list[Any] = session.run(["y", "keys", "values"], feeds)
    np.testing.assert_allclose(np.concatenate(outputs), results[0][0], rtol=1e-4, atol=1e-5)
    for cache, theirs in zip(caches, results[1:], strict=True):  # theirs [1, KV, T, D]
        ours = cache[table[0]].reshape(-1, kv_heads, head_dim)[:num_tokens]
        np.testing.assert_allclose(ours, theirs[0].transpose(1, 0, 2), rtol=1e-5, atol=1e-6)


STEPS = (0.01, 0.001)  # what a code of keys and of values is worth: large ones do not fit
QKV = np.random.default_rng(4).standard_normal((3, 64)).astype(ml_dtypes.bfloat16)  # one head of 16, twice for q


def attend_three(cache_dtype: str, **changes: Any) -> tuple[Array, tuple[Array, Array]]:
    """Three tokens of two sequences, the first with two tokens; `changes` to what they are called with."""
    caches = tuple(np.zeros((2, 16, 1, 16), cache_dtype) for _ in range(2))
    quantized = cache_dtype in ("int8", "float8_e4m3fn")
    ones, zeros = (np.full((32, 8), value, ml_dtypes.bfloat16) for value in (1, 0))  # no rotation
    scales = tuple(np.full((1, 1, 16), step, np.float32) for step in STEPS) if quantized else (None, None)
    granularity = "PER_CHANNEL" if quantized else "NONE"
    node = Attention(2, 1, do_rotary=1, k_quant_type=granularity, v_quant_type=granularity)
    call: dict[str, Any] = {
        "caches": caches,
        "cu_seqlens": np.array([0, 2, 3], np.int32),
        "past_lens": np.array([0, 0], np.int32),
        "block_table": np.array([[1], [0]], np.int32),
        "rotation": (ones, zeros),
        "slot_mapping": np.array([16, 17, 0], np.int32),
        "head_norms": (None, None),
        "scales": scales,
        "metadata": np.array([2, 2, 1], np.int32),
    }
    out = attend(node, QKV, **{**call, **changes})
    return out, (caches[0], caches[1])


@pytest.mark.parametrize(("dtype", "least", "most"), [("int8", -128, 127), ("float8_e4m3fn", -448, 448)])
def test_a_quantized_cache_holds_the_nearest_codes_and_saturates(dtype: str, least: int, most: int) -> None:
    _, caches = attend_three(dtype)
    num_saturated = 0
    for cache, step, start in zip(caches, STEPS, (32, 48), strict=True):
        wanted = QKV[:, start : start + 16].astype(np.float32) / np.float32(step)
        codes = cache[[1, 1, 0], [0, 1, 0], 0].astype(np.float32)  # the slots of attend_three
        fits = np.abs(wanted) < most
        half_step = 0.5 if dtype == "int8" else np.maximum(np.abs(wanted) * 2.0**-4, 2.0**-10)  # 3 bits of mantissa
        assert (np.abs(codes - wanted) <= half_step * 1.001)[fits].all()
        assert (codes == np.where(wanted > 0, most, least))[np.abs(wanted) > most + 1].all()
        num_saturated += int((~fits).sum())
    assert 10 < num_saturated < 86


REFUSALS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"metadata": np.array([1, 2, 0], np.int32)}, "2 new tokens, bound 1"),
    ({"metadata": np.array([2, 1, 0], np.int32)}, "2 tokens in a sequence, bound 1"),
    ({"metadata": np.array([2, 2, 3], np.int32)}, "lower bound 3"),
    ({"metadata": np.array([2, 2, -1], np.int32)}, "metadata"),
    ({"metadata": np.array([2, 2], np.int64)}, "metadata"),
    ({"cu_seqlens": np.array([0, 1, 2], np.int32)}, "do not cut 3 tokens"),
    ({"slot_mapping": np.array([16, 16, 0], np.int32)}, "two tokens are written to one slot"),
    ({"slot_mapping": np.array([16, 17, 32], np.int32)}, "slots"),
    ({"block_table": np.array([[1], [2]], np.int32)}, "blocks"),
    ({"past_lens": np.array([0, 16], np.int32), "metadata": np.zeros(3, np.int32)}, "17 tokens, 1 blocks of 16"),
    ({"scales": (np.ones((1, 1, 16), np.float32),) * 2}, "takes no scales"),
    ({"caches": (np.zeros((2, 16, 1, 16), np.int8),) * 2}, "without scales|takes no scales"),
    ({"caches": (np.zeros((2, 8, 1, 16), ml_dtypes.bfloat16),) * 2}, "block size is 8"),
)


@pytest.mark.parametrize(("changes", "message"), REFUSALS, ids=[message for _, message in REFUSALS])
def test_attention_refuses_what_would_read_or_write_elsewhere(changes: dict[str, Any], message: str) -> None:
    attend_three("bfloat16")
    with pytest.raises(Refused, match=message):
        attend_three("bfloat16", **changes)


def test_unknown_bounds_are_zero() -> None:
    known, _ = attend_three("bfloat16")
    unknown, _ = attend_three("bfloat16", metadata=np.zeros(3, np.int32))
    np.testing.assert_array_equal(known, unknown)
